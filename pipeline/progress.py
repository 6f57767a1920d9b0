"""Progress for people, on standard error: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.ranks import is_first

PLAIN_LINES = 6  # lines about one training where there is no terminal
_PLAIN_SECONDS = 10.0  # between two lines about an export there; a shorter export has none


class TrainingProgressBar:
    """Steps with loss, tokens/s and time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, quiet=not is_first())
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", loss="-", speed="-")
        self._total = 1
        self._loss = "-"

    def start(self, total: int, completed: int) -> None:
        self._total = total
        self._progress.update(self._task, total=total, completed=completed)
        self._progress.start()

    def loss(self, loss: float) -> None:
        self._loss = f"{loss:.3f}"
        self._progress.update(self._task, loss=self._loss)

    def step(self, step: int, tokens_per_second: float) -> None:
        self._progress.update(self._task, completed=step, speed=f"{tokens_per_second:.0f}")
        if not self._console.is_terminal and step % max(1, self._total // PLAIN_LINES) == 0:
            self._console.print(
                f"train: step {step}/{self._total}, loss {self._loss}, {tokens_per_second:.0f} tokens/s",
                highlight=False,
            )

    def stop(self) -> None:
        self._progress.stop()


class ExportProgressBar:
    """What an export is at (a tensor, a shard being fetched, the importance matrix), how fast, and the time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("export"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)
        self._activity = ""
        self._begun_at = self._printed_at = time.monotonic()
        self._begun_with = 0

    def __enter__(self) -> ExportProgressBar:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A bar that was never shown would end with an empty line.
        if self._console.is_terminal:
            self._progress.stop()

    def written(self, tensor: str, done: int, total: int) -> None:
        """Bytes of all files, with the tensor at hand."""
        self._show("write", tensor, done, total, _gigabytes)

    def fetched(self, file: str, done: int, total: int) -> None:
        """Bytes of one file from the hub."""
        self._show(file, f"fetching {file}", done, total, _gigabytes)

    def measured(self, done: int, total: int) -> None:
        """Texts that the importance matrix was measured on."""
        self._show("measure", "importance matrix", done, total, lambda done, total, rate: f"{done} of {total}")

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _show(self, activity: str, what: str, done: int, total: int, amount: Callable[[int, int, float], str]) -> None:
        now = time.monotonic()
        if activity != self._activity:
            # What an earlier attempt had done, or another activity in between, is no speed of this one.
            self._activity, self._begun_at, self._begun_with = activity, now, done
        seconds, grown = now - self._begun_at, done - self._begun_with
        rate = grown / seconds if seconds > 0 else 0.0
        left = _minutes((total - done) / rate) if rate > 0 else "-:--"
        text = f"{what}, {amount(done, total, rate)}, {left} left"
        self._progress.update(self._task, description=text, completed=done, total=total)
        if not self._console.is_terminal and now - self._printed_at >= _PLAIN_SECONDS:
            self._printed_at = now
            self.note(f"export: {text}")


def _gigabytes(done: int, total: int, rate: float) -> str:
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s"


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
