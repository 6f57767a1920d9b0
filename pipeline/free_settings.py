"""Settings that cannot change what a stage makes, and therefore are no part of its fingerprint.

They say how long, with how much memory, on how many processes or how often something is done. Free are also those that
compute the same mathematics in another order: rounding, and which numbers a dropout draws, differ from one GPU to the
next anyway, and neither the GPU nor the type that ``model.dtype: auto`` finds there is in a fingerprint. So whoever
follows the advice after a lack of memory keeps the training.
"""

from __future__ import annotations

from typing import Any

from pipeline.config import TrainingConfig

_FREE = (
    "max_minutes",
    "processes",  # share the same examples of each step
    "report_to",
    "logging_steps",  # metrics.jsonl keeps the losses that it has
    "checkpoint_steps",  # an evaluation that may be the best saves a checkpoint of its own
    "eval_batch_size",  # held-out losses are sums over tokens, however many rows at a time
    "gradient_checkpointing",  # repeats the same operations on the same inputs, with the same random numbers
)


def settings_of_the_adapter(training: TrainingConfig) -> dict[str, Any]:
    """What of ``training`` decides which adapter comes out; settings that mean the same give the same."""
    values = training.model_dump(mode="json")
    for name in _FREE:
        del values[name]
    # The optimizer's step sees effective_batch examples in one order, however many go through the model at once.
    for name in ("batch_size", "gradient_accumulation", "step_examples"):
        del values[name]
    values["effective_batch"] = training.effective_batch
    if training.max_steps is not None:
        del values["epochs"]
    if training.warmup_steps:
        del values["warmup_ratio"]
    # Evaluations on the way choose among adapters (keep: best) or end the training (patience); others only measure.
    # Without any there is only the last adapter to keep.
    if training.eval_steps is None:
        values["keep"] = "last"
    elif training.keep == "last" and training.patience is None:
        values["eval_steps"] = None
    return values
