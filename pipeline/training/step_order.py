"""The order in which training reads its rows: examples of like length share a forward pass, so less of it is padding.

Only within an optimizer step, whose examples are the ones that the trainer's own shuffling gives it: the gradient is
the same sum. transformers' ``group_by_length`` changes which examples a step sees; its ``batch_rebalance`` (5.17)
always shuffles with seed 42 and, on several processes, gives every epoch the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler


class StepOrder(Sampler):
    """Indices of the rows, shuffled by ``seed`` and the epoch; those of one step from short to long.

    ``lengths`` are the rows' tokens, ``step_examples`` the examples a step of all processes.
    """

    def __init__(self, lengths: Sequence[int], step_examples: int, seed: int) -> None:
        self._lengths, self._step_examples = lengths, step_examples
        # What accelerate puts in place of the trainer's own sampler.
        self._shuffled: Any = SeedableRandomSampler(range(len(lengths)), data_seed=seed)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = list(self._shuffled)
        for start in range(0, len(order), self._step_examples):
            yield from sorted(order[start : start + self._step_examples], key=self._lengths.__getitem__)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader."""
        self._shuffled.set_epoch(epoch)
