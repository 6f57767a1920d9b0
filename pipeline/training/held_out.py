"""The loss on the held-out records, and what follows from its course: which adapter is best, when to stop early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline import ranks
from pipeline.results import LossPoint
from pipeline.training.piecewise_loss import summed_loss


def held_out_loss(trainer: Any) -> float:
    """Mean negative log-likelihood per labelled token of the trainer's ``eval_dataset`` (nats), over all processes.

    Draws no random number that training would have drawn, and leaves the model in the mode it was in.
    """
    import torch

    model, rows, size = trainer.model, trainer.eval_dataset, trainer.args.per_device_eval_batch_size
    own = ranks.own_share(range(len(rows)))
    loss = tokens = 0.0
    was_training = model.training
    model.eval()
    # Without a list every GPU's random state is taken, and a context made on those of the other processes.
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            for first in range(0, len(own), size):
                batch = trainer.data_collator([rows[index] for index in own[first : first + size]])
                tensors = [batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")]
                with trainer.accelerator.autocast():
                    own_loss, own_tokens = summed_loss(model, *tensors)
                loss, tokens = loss + own_loss, tokens + own_tokens
    finally:
        model.train(was_training)
    return ranks.total(loss) / ranks.total(tokens)


def best_of(points: Sequence[LossPoint]) -> LossPoint | None:
    """The evaluation of a trained adapter with the lowest loss, the first of several; step 0 is the base alone."""
    return min((point for point in points if point.step > 0), key=lambda point: point.loss, default=None)


def out_of_patience(points: Sequence[LossPoint], patience: int | None) -> bool:
    """Whether the last ``patience`` evaluations have brought no lower loss than the ones before."""
    trained = [point for point in points if point.step > 0]
    best = best_of(trained)
    return patience is not None and best is not None and len(trained) - trained.index(best) > patience
