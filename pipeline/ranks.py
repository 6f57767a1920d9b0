"""The processes that train together: which of them this is, and what they tell each other.

The numbers come from the environment that torchrun sets
(https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables); a process that torchrun did not start
is rank 0 of 1, and then nothing here imports PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def rank() -> int:
    """This process's number among all, over every machine: 0 ... world_size() - 1."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together, over every machine."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its own machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes files and messages."""
    return rank() == 0


def on_several_machines() -> bool:
    return world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join_group() -> None:
    """Meet the other processes; the first collective call waits until all are there."""
    if world_size() > 1:
        import torch

        # What accelerate would choose; objects and sums go through the CPU's side of it.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend)
        # accelerate 1.15 calls the CPU of several processes "cpu:0", where torch.load can put no checkpoint.
        torch.serialization.register_package(
            100, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
        )


def leave_group() -> None:
    if world_size() > 1:
        import torch

        torch.distributed.destroy_process_group()


def wait_for_all() -> None:
    """Go on when every process has come here."""
    from_all(None)


def from_all(value: T) -> list[T]:
    """The value that each process gives, by rank; values are pickled."""
    if world_size() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """What the first process gives, in all of them."""
    if world_size() == 1:
        return value
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def total(value: float) -> float:
    """The sum over all processes."""
    return sum(from_all(value))


def own_share(rows: Sequence[T]) -> Sequence[T]:
    """Every world_size()-th row, from this process's own number on: all shares together are ``rows``, each once."""
    return rows[rank() :: world_size()]
