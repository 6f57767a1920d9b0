"""What one model is asked in an evaluation, and its answers as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.held_out import HeldOutRecord
from bench.multiple_choice import choice_question
from bench.record_outcome import EvaluationSettings
from pipeline.prompts import ChatFormat
from pipeline.time_limit import NO_LIMIT, TimeLimit

_ROUND = 16  # records: what a GPU answers together


@dataclass(frozen=True)
class EvaluationTask:
    """A model and the records that it is asked; ``keys`` name their outcomes in the files of ``out_dir``."""

    path: Path
    records: Sequence[HeldOutRecord]
    keys: Sequence[str]
    out_dir: Path
    settings: EvaluationSettings
    limit: TimeLimit = NO_LIMIT

    @property
    def rounds(self) -> list[range]:
        """The records' indices in parts that models are given in turns, so that the limit finds all equally far."""
        whole = range(len(self.records))
        return [whole[start : start + _ROUND] for start in whole[::_ROUND]] if self.limit.is_set else [whole]


def answers(
    task: EvaluationTask,
    indices: Sequence[int],
    chat_format: ChatFormat,
    generate_many: Callable[[Sequence[Sequence[int]], int, TimeLimit], Iterator[tuple[int, list[int]]]],
) -> Iterator[tuple[int, list[int], list[int] | None]]:
    """(index, ids written for the question, for the question with options or None) as each record is complete.

    A record's two questions stay together, so that a break or the time limit costs few records.
    """
    asked: list[tuple[int, bool]] = []
    prompts = []
    for index in indices:
        record = task.records[index]
        for with_options in (False, True) if record.options else (False,):
            asked.append((index, with_options))
            text = choice_question(record) if with_options else record.example.question
            prompts.append(chat_format.question_ids(text))
    written: dict[int, dict[bool, list[int]]] = {}
    for place, new in generate_many(prompts, task.settings.max_new_tokens, task.limit):
        index, with_options = asked[place]
        found = written.setdefault(index, {})
        found[with_options] = new
        if len(found) == 1 + bool(task.records[index].options):
            yield index, found[False], found.get(True)
            del written[index]
