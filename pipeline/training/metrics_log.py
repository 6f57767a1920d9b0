"""metrics.jsonl: what training logged, one JSON object a line, each with its ``step``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_text
from pipeline.ranks import is_first
from pipeline.results import LossPoint


class MetricsLog:
    """The rows up to a checkpoint, and those that follow as training goes on from it.

    Every process of a training has the same ``rows``; the first one writes the file. ``follow`` is called with each
    new row.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        """Forget what was logged after ``last_step``: those steps are trained again."""
        self.path = path
        self.rows = [row for row in _whole_rows(path) if row["step"] <= last_step]
        self.follow: Callable[[Mapping[str, Any]], None] = lambda row: None
        if is_first():
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if is_first():
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
        self.follow(row)

    def points(self, key: str) -> list[LossPoint]:
        """The logged values of ``loss`` or ``eval_loss``."""
        return [LossPoint(step=row["step"], loss=row[key]) for row in self.rows if key in row]


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """A kill or a full disk may have torn the last line; it is left out."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
