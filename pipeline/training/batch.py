"""How many examples go through the model at once, and what to do when memory is too small for them.

The optimizer's step sees the same examples in the same order whatever the batch: a smaller one is made up for by more
forward passes.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import ranks
from pipeline.artifacts import write_text
from pipeline.batch_shares import share_of_step
from pipeline.config import Config, TrainingConfig

_FILE_NAME = "batch.json"
# What libraries say whose memory errors neither Python nor PyTorch nor accelerate has a type for: oneDNN, C++, and
# CUDA's own calls, which bitsandbytes and cuBLAS make beside PyTorch's allocator.
_MESSAGES = (
    "could not create a memory",
    "could not create a primitive",
    "could not execute a primitive",
    "bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Batch:
    """Of one process: examples per forward pass, and forward passes per optimizer step."""

    size: int
    accumulation: int

    def smaller(self) -> Batch | None:
        """As many examples a step with at most half of them at once; None for a batch of one."""
        examples = self.size * self.accumulation
        sizes = [size for size in range(1, self.size // 2 + 1) if examples % size == 0]
        return Batch(sizes[-1], examples // sizes[-1]) if sizes else None


def first_batch(training: TrainingConfig, folder: Path, fitting: Callable[[], int]) -> Batch:
    """As configured; with batch_size auto what an earlier session kept in ``folder``, else the ``fitting`` size."""
    size = fitting() if training.batch_size == "auto" else training.batch_size
    batch = Batch(*share_of_step(training.effective_batch, size, ranks.world_size()))
    if training.batch_size != "auto":
        return batch
    kept = _kept(folder / _FILE_NAME)
    if kept is not None and kept.size * kept.accumulation == batch.size * batch.accumulation:
        return kept
    # Another session may find more or less memory free; a training keeps to one batch all the same.
    batch = ranks.from_first(batch)
    keep_batch(batch, folder)
    return batch


def keep_batch(batch: Batch, folder: Path) -> None:
    write_text(folder / _FILE_NAME, json.dumps(asdict(batch)) + "\n")


def _kept(path: Path) -> Batch | None:
    try:
        return Batch(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def is_out_of_memory(error: Exception) -> bool:
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def memory_advice(config: Config, batch: Batch, last_whole_step: int) -> str:
    """The setting to change when a training step with ``batch`` ran out of memory, and what the change costs.

    ``last_whole_step`` is that of the last checkpoint, 0 without one. The first two keep the training
    (pipeline/free_settings.py).
    """
    training = config.training
    kept = f"; training is kept, and resumes from step {last_whole_step}" if last_whole_step else ""
    smaller = batch.smaller()
    if smaller is not None:
        processes = ranks.world_size()
        return (
            f"set training.batch_size={smaller.size} and training.gradient_accumulation="
            f"{smaller.accumulation * processes}, or training.batch_size=auto and training.step_examples="
            f"{training.effective_batch}{kept}"
        )
    if not training.gradient_checkpointing:
        return f"set training.gradient_checkpointing=true{kept}"
    advice = "lower model.max_seq_length or choose a smaller model.base"
    if not config.model.load_in_4bit:
        advice = "set model.load_in_4bit=true"
    if not last_whole_step:
        return advice
    return (
        f"{advice}; that starts training again, while the same command with more memory free resumes from step "
        f"{last_whole_step}"
    )


def evaluation_memory_advice(rows: int, step: int, last_whole_step: int) -> str:
    """What to do when the held-out evaluation of ``rows`` at once ran out of memory at ``step``: it costs no training.

    ``last_whole_step`` is that of the last checkpoint, 0 without one.
    """
    change = f"set training.eval_batch_size={rows // 2}" if rows > 1 else "end other programs that use memory"
    if last_whole_step:
        return f"{change}; training is kept, and the same command resumes from step {last_whole_step}"
    return f"{change}, and run the same command again" + (
        f"; no checkpoint was written before step {step}" * (step > 0)
    )


def free_memory() -> None:
    """Give back what an error's frames held, once the error is gone."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
