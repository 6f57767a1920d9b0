"""Progress for people, on standard error: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_LINES = 6  # lines about one training where there is no terminal


class TrainingProgressBar:
    """Steps with loss, tokens/s and time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
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
