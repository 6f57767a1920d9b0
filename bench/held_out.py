"""Held-out records as an evaluation reads them: question, reference answer, and options where there are any."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import MedcotError
from pipeline.prompts import Example

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class HeldOutRecord:
    """``options`` are texts, known as A, B, C, ... in this order; ``right`` is the right one's index."""

    example: Example
    options: tuple[str, ...] = ()
    right: int = 0


@dataclass(frozen=True)
class ReferenceQuestion:
    """A question that every evaluation asks, so that models can be read side by side; not part of any metric."""

    heading: str
    record: HeldOutRecord


REFERENCE_QUESTIONS = (
    ReferenceQuestion(
        "Mechanism of a drug",
        HeldOutRecord(
            Example(
                "What is the mechanism of action of metformin?",
                None,
                "Metformin lowers the liver's output of glucose, mainly by inhibiting complex I of the mitochondria, "
                "which activates AMP-activated protein kinase; it also makes muscle more sensitive to insulin.",
            )
        ),
    ),
    ReferenceQuestion(
        "Recognizing an illness",
        HeldOutRecord(
            Example(
                "What are the typical symptoms of acute appendicitis?",
                None,
                "Pain that begins around the navel and moves to the right lower abdomen, loss of appetite, nausea, "
                "vomiting and a mild fever, with tenderness over McBurney's point.",
            )
        ),
    ),
    ReferenceQuestion(
        "General knowledge", HeldOutRecord(Example("What is the capital of France?", None, "The capital is Paris."))
    ),
)


def read_records(path: Path, limit: int | None = None, choice_rows: int | None = None) -> list[HeldOutRecord]:
    """One JSON object a line with question, reasoning (or null) and answer, perhaps options and answer_idx.

    The columns of the raw data set (Question, Complex_CoT, Response) are understood as well. Where options come
    without an answer, the right option's text is the reference. Only the first ``choice_rows`` records with options
    keep them. Raises MedcotError naming file and line.
    """
    try:
        # Not splitlines: JSON may hold U+2028 and other line separators as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise MedcotError(f"{path} cannot be read ({error}): name a JSONL file of held-out records.") from error
    records: list[HeldOutRecord] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and (limit is None or len(records) < limit):
            records.append(_record(line, f"{path}:{number}"))
    if not records:
        raise MedcotError(f"{path} holds no records: name a JSONL file of held-out records.")
    return _with_options_on(records, choice_rows)


def _with_options_on(records: Sequence[HeldOutRecord], choice_rows: int | None) -> list[HeldOutRecord]:
    kept: list[HeldOutRecord] = []
    with_options = 0
    for record in records:
        with_options += bool(record.options)
        too_many = choice_rows is not None and with_options > choice_rows
        kept.append(replace(record, options=()) if too_many else record)
    return kept


def _record(line: str, where: str) -> HeldOutRecord:
    try:
        row = json.loads(line)
        raw = "question" not in row
        question = row["Question" if raw else "question"]
        reasoning = row.get("Complex_CoT" if raw else "reasoning")
        found, answer_idx = row.get("options"), row.get("answer_idx")
        answer = row.get("Response" if raw else "answer")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise MedcotError(f"{where}: expected a JSON object with question, answer and perhaps reasoning.") from error
    options, right = _options(found, answer_idx, where) if found else ((), 0)
    if answer is None and options:
        answer = options[right]
    if answer is None:
        raise MedcotError(f"{where}: expected an answer, or options with answer_idx.")
    if not all(isinstance(text, str) and text.strip() for text in (question, answer)) or not (
        reasoning is None or isinstance(reasoning, str)
    ):
        raise MedcotError(f"{where}: question and answer must be text that is not empty, reasoning text or null.")
    return HeldOutRecord(Example(question, reasoning or None, answer), options, right)


def _options(found: Any, answer_idx: Any, where: str) -> tuple[tuple[str, ...], int]:
    """The texts in order and the right one's index, from a mapping of labels to texts or a list."""
    labelled = dict(zip(LETTERS, found, strict=False)) if isinstance(found, list) else found
    if not isinstance(labelled, dict) or not 2 <= len(found) <= len(LETTERS):
        raise MedcotError(f"{where}: options must be 2 to {len(LETTERS)} texts, as a list or a mapping from letters.")
    if not all(isinstance(text, str) and text.strip() for text in labelled.values()):
        raise MedcotError(f"{where}: every option must be text that is not empty.")
    labels = list(labelled)
    if isinstance(answer_idx, int) and not isinstance(answer_idx, bool) and 0 <= answer_idx < len(labels):
        return tuple(labelled.values()), answer_idx
    if answer_idx not in labels:
        raise MedcotError(f"{where}: answer_idx is {answer_idx!r}, and the options are {', '.join(labels)}.")
    return tuple(labelled.values()), labels.index(answer_idx)
