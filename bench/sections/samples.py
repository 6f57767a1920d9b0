"""Questions with the models' outputs side by side."""

from __future__ import annotations

from bench.page import Section
from pipeline.results import Evaluation, Sample

LONGEST = 20_000  # characters of an output that a page shows: more than 4,000 tokens


def samples_sections(evaluation: Evaluation | None) -> list[Section]:
    """The questions that every evaluation asks, then the held-out ones."""
    samples = [] if evaluation is None else [_shortened(sample) for sample in evaluation.samples]
    sections = [
        Section(
            "Reference questions",
            ("The same questions in every run, whatever its data, with the models' whole outputs, greedy decoding.",),
            samples=tuple(sample for sample in samples if sample.kind == "reference"),
        ),
        Section(
            "Samples",
            ("Held-out questions with the models' whole outputs, greedy decoding, as they were written.",),
            samples=tuple(sample for sample in samples if sample.kind == "held-out"),
        ),
    ]
    return [section for section in sections if section.samples]


def _shortened(sample: Sample) -> Sample:
    return sample.model_copy(update={"outputs": {model: _shorten(text) for model, text in sample.outputs.items()}})


def _shorten(text: str) -> str:
    left_out = len(text) - LONGEST
    return text if left_out <= 0 else f"{text[:LONGEST]}\n[{left_out:,} more characters, in report.json]"
