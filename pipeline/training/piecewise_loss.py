"""The loss of a batch whose logits are never whole.

Logits are an evaluation's largest tensor by far: 4 rows of 2,048 positions over 128,256 entries take 4.2 GB in 32 bit,
in which accelerate's mixed precision hands them out, next to the 2.1 GB in 16 bit that they are made from. Hidden
states of a model 4,096 wide take 0.1 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pipeline.prompts import IGNORED_LABEL

PIECE_POSITIONS = 1024  # whose logits are there at a time


def summed_loss(model: Any, input_ids: Any, attention_mask: Any, labels: Any) -> tuple[float, int]:
    """The negative log-likelihoods of the labelled tokens, summed (nats), and the number of these tokens.

    All three tensors are [rows, positions]. As in transformers' own loss the logits of a position predict the label of
    the next one, and IGNORED_LABEL marks what nothing has to predict; such positions get no logits at all.

    The decoder runs once. Everything after it, from the output matrix to scales and soft caps of logits, is the causal
    language model's own forward, which sees up to PIECE_POSITIONS hidden states as if they were one row. Where that
    forward does not call its decoder as a module of its own (none of the architectures that medcot exports), the
    logits are whole.
    """
    import torch

    shifted = labels[:, 1:]
    rows, positions = (shifted != IGNORED_LABEL).nonzero(as_tuple=True)
    loss = 0.0
    logits = None
    with _decoder_run_once(model) as decoder:
        for start in range(0, len(rows), PIECE_POSITIONS):
            decoder.rows, decoder.positions = (each[start : start + PIECE_POSITIONS] for each in (rows, positions))
            if logits is None or decoder.was_called:
                # On a GPU Unsloth leaves the trainer's model ready to generate: it would keep keys and values.
                logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            chosen = logits[0] if decoder.was_called else logits[decoder.rows, decoder.positions]
            targets = shifted[decoder.rows, decoder.positions]
            loss += float(torch.nn.functional.cross_entropy(chosen.float(), targets, reduction="sum"))
    return loss, len(rows)


class _RunOnce:
    """A decoder's forward that computes at its first call and hands out the hidden states asked for at every call."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward
        self._outputs: Any = None
        self.rows: Any = None
        self.positions: Any = None

    @property
    def was_called(self) -> bool:
        return self._outputs is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._outputs is None:
            self._outputs = self._forward(*args, **kwargs)
        chosen = self._outputs.last_hidden_state[self.rows, self.positions]
        return replace(self._outputs, last_hidden_state=chosen.unsqueeze(0))


@contextmanager
def _decoder_run_once(model: Any) -> Iterator[_RunOnce]:
    causal_model = model.get_base_model() if hasattr(model, "get_base_model") else model  # without peft's wrapping
    decoder = causal_model.base_model
    if decoder is causal_model:
        yield _RunOnce(None)
        return
    own = vars(decoder).get("forward")  # what others have put in place of the class's
    stand_in = _RunOnce(decoder.forward)
    decoder.forward = stand_in
    try:
        yield stand_in
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
