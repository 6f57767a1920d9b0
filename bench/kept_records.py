"""The files that keep what is known of the records, so that a break or a time limit costs no answer.

    records-<model>.jsonl      whole outcomes
    likelihoods-<model>.jsonl  likelihoods of records without an outcome yet; gone once all have one
    answers-<model>.jsonl      what transformers wrote, until the GGUF's own measures are added; gone likewise

A line is written as soon as it is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from bench.evaluation_task import EvaluationTask
from bench.held_out import HeldOutRecord
from bench.record_outcome import EvaluationSettings, Likelihood, RecordOutcome, WrittenAnswer, record_keys
from pipeline.artifacts import write_text
from pipeline.results import EngineName

Line = TypeVar("Line", Likelihood, RecordOutcome, WrittenAnswer)


@dataclass(frozen=True)
class KeptRecords:
    """Of one model's records, in order; None for what is not known yet."""

    likelihoods: list[Likelihood | None]
    outcomes: list[RecordOutcome | None]

    @classmethod
    def read(cls, task: EvaluationTask) -> KeptRecords:
        outcomes = read_lines(records_path(task.out_dir, task.path), RecordOutcome, task.keys)
        likelihoods = read_lines(likelihoods_path(task.out_dir, task.path), Likelihood, task.keys)
        return cls(
            [outcomes.get(key) or likelihoods.get(key) for key in task.keys], [outcomes.get(key) for key in task.keys]
        )

    @property
    def complete(self) -> bool:
        return None not in self.outcomes

    @property
    def scored(self) -> list[Likelihood]:
        """The first likelihoods, up to one that is missing."""
        return [each for each in takewhile(lambda likelihood: likelihood is not None, self.likelihoods) if each]

    @property
    def answered(self) -> list[RecordOutcome]:
        """The first outcomes, up to one that is missing: not the quick ones of a batch, whose answers are short."""
        return [each for each in takewhile(lambda outcome: outcome is not None, self.outcomes) if each]


def records_path(out_dir: Path, model: Path) -> Path:
    return out_dir / f"records-{model.name}.jsonl"


def likelihoods_path(out_dir: Path, model: Path) -> Path:
    return out_dir / f"likelihoods-{model.name}.jsonl"


def answers_path(out_dir: Path, model: Path) -> Path:
    return out_dir / f"answers-{model.name}.jsonl"


def read_lines(path: Path, kind: type[Line], keys: Sequence[str]) -> dict[str, Line]:
    """By key, without half-written lines and those of another evaluation."""
    wanted = set(keys)
    found: dict[str, Line] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            item = kind.model_validate_json(line)
        except ValidationError:
            continue
        if item.key in wanted:
            found[item.key] = item
    return found


def rewrite(path: Path, lines: dict[str, Line]) -> None:
    """Remove from the file whatever is not among ``lines``; a file without any is removed."""
    text = "".join(line.model_dump_json() + "\n" for line in lines.values())
    if not text:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


def append(path: Path, line: Line) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line.model_dump_json() + "\n")


def answers_by_engine(
    models: Sequence[Path], records: Sequence[HeldOutRecord], out_dir: Path, settings: EvaluationSettings
) -> dict[EngineName, int]:
    """How many answers of an interrupted evaluation of the same records each engine has written."""
    written: Counter[EngineName] = Counter()
    for model in models:
        paths = (records_path(out_dir, model), answers_path(out_dir, model))
        if not any(path.is_file() for path in paths):
            continue  # the model is not hashed for nothing
        keys = record_keys(model, records, settings)
        outcomes = read_lines(paths[0], RecordOutcome, keys)
        written.update(outcome.engine for outcome in outcomes.values())
        written["transformers"] += sum(key not in outcomes for key in read_lines(paths[1], WrittenAnswer, keys))
    return dict(written)


def remove_unusable(out_dir: Path, model: Path, keys: Sequence[str], engine: EngineName) -> int:
    """Clean the model's files before they are appended to; how many answers of another engine were removed.

    Their likelihoods stay. ``engine`` is the one that answers now.
    """
    outcomes = read_lines(records_path(out_dir, model), RecordOutcome, keys)
    likelihoods = read_lines(likelihoods_path(out_dir, model), Likelihood, keys)
    answers = read_lines(answers_path(out_dir, model), WrittenAnswer, keys)
    others = {key: outcome for key, outcome in outcomes.items() if outcome.engine != engine}
    removed = len(others)
    if engine != "transformers":
        removed += sum(key not in outcomes for key in answers)
        answers = {}
    for key, outcome in others.items():
        likelihoods[key] = Likelihood(**outcome.model_dump(include=set(Likelihood.model_fields)))
        del outcomes[key]
    # The outcomes last: until then they hold the likelihoods too.
    rewrite(likelihoods_path(out_dir, model), likelihoods)
    rewrite(answers_path(out_dir, model), answers)
    rewrite(records_path(out_dir, model), outcomes)
    return removed


def remove_working_files(out_dir: Path, model: Path) -> None:
    """When every record has its outcome, which holds all that these files do."""
    likelihoods_path(out_dir, model).unlink(missing_ok=True)
    answers_path(out_dir, model).unlink(missing_ok=True)
