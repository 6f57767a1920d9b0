"""Trainings in several processes take turns, an optimizer step each, so that what slows the machine slows all alike.

The child waits before its first step and after each one until its parent says go:

    parent                                 child (a TrainerCallback)
    turn = Turn.make()
    Popen(..., pass_fds=turn.childs)       Turns(*turn.childs) joins transformers' callbacks
    turn.take()          -- go, done -->   one step, timed from go to done
    turn.end()           -- end of file->  goes on by itself
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

_GO = _DONE = b"."


@dataclass(frozen=True)
class Turn:
    """The parent's side: two pipes, of which the child gets the ends in ``childs`` (to read, to write)."""

    go: int
    done: int
    childs: tuple[int, int]

    @classmethod
    def make(cls) -> Turn:
        childs_read, go = os.pipe()
        done, childs_write = os.pipe()
        return cls(go, done, (childs_read, childs_write))

    def started(self) -> None:
        """Call once the child has its ends: an end kept open here would hide that the child has died."""
        for descriptor in self.childs:
            os.close(descriptor)

    def wait(self) -> bool:
        """Until the child is done with what it was at; False when it has ended."""
        return os.read(self.done, 1) == _DONE

    def take(self) -> bool:
        """Let the child make one step; False when it has ended."""
        try:
            os.write(self.go, _GO)
        except BrokenPipeError:
            return False
        return self.wait()

    def end(self) -> None:
        """Let the child go on without waiting."""
        os.close(self.go)
        os.close(self.done)


def wait_for_turns(read: int, write: int) -> list[float]:
    """In the child, before its trainer is made: have every step wait for its turn.

    Returns the list that will hold the seconds of each step, waiting left out. A step reaches from the end of the one
    before to its own end, so that its batch and the log of the one before are in it.
    """
    import torch
    import transformers.trainer
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Turns(TrainerCallback):
        def __init__(self) -> None:
            self._granted = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the step is done when the GPU is
            seconds.append(time.perf_counter() - self._granted)
            self._wait()

        def _wait(self) -> None:
            try:
                os.write(write, _DONE)
            except BrokenPipeError:  # the parent has had all steps that it wanted
                return
            os.read(read, 1)
            self._granted = time.perf_counter()

    # The trainer's own defaults, because the train stage makes its trainer itself.
    transformers.trainer.DEFAULT_CALLBACKS.append(Turns)
    return seconds
