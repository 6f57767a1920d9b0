"""Questions with the models' outputs side by side."""

from __future__ import annotations

from bench.page import Section
from pipeline.results import Evaluation


def samples_section(evaluation: Evaluation | None) -> Section | None:
    if evaluation is None or not evaluation.samples:
        return None
    return Section(
        "Samples",
        ("Held-out questions with the models' whole outputs, greedy decoding, as they were written.",),
        samples=tuple(evaluation.samples),
    )
