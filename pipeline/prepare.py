"""Stage 1: read records, reject what cannot be learned from, hold some out, and say what was done.

    medcot run --only prepare

Records stream through files: the sources are read once, usable records wait on disk, and what is kept in memory is
some 60 bytes a record for the order, the duplicates and the statistics.
"""

from __future__ import annotations

import itertools
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.artifacts import SCRATCH_NAME, atomic_path
from pipeline.base_model import load_chat_format, local_base
from pipeline.candidates import Candidates, json_line
from pipeline.config import Config
from pipeline.distributions import distribution
from pipeline.errors import MedcotError
from pipeline.overlap import HeldOutGrams
from pipeline.prompts import ChatFormat, Example
from pipeline.records import Rejected, usable_record
from pipeline.results import Distribution, Leakage, PreparedData
from pipeline.sources import read_rows

TRAIN_FILE = "train.jsonl"
EVAL_FILE = "eval.jsonl"
REJECTS_FILE = "rejects.jsonl"

Numbers = npt.NDArray[np.int64]


def prepare(config: Config, inputs: dict[str, Path], out_dir: Path) -> PreparedData:
    """Write train.jsonl, eval.jsonl and rejects.jsonl; every record read ends in exactly one place or is unused."""
    base = local_base(config.model.base, config.model.revision, weights=False)
    chat_format = load_chat_format(base, config.prompt.system)
    with _scratch(out_dir) as scratch, Candidates(scratch) as candidates, _Rejects(out_dir / REJECTS_FILE) as rejects:
        reading = read_candidates(config, chat_format, candidates, rejects)
        repeats, near = find_duplicates(config, candidates, rejects)
        dropped = {*repeats, *near} if config.data.duplicates == "drop" else set()
        order = _order(config, reading.drawn, dropped)
        parts = split(config, candidates, order, rejects)
        for name, numbers in ((TRAIN_FILE, parts.train), (EVAL_FILE, parts.held_out)):
            with atomic_path(out_dir / name) as path, path.open("wb") as stream:
                stream.writelines(candidates.line(number) for number in numbers)
        used = np.array([*parts.train, *parts.held_out], dtype=np.int64)
        return PreparedData(
            source=config.data.source,
            read=reading.read,
            train_rows=len(parts.train),
            eval_rows=len(parts.held_out),
            unused_rows=parts.unused,
            rejected=rejects.count,
            reject_reasons=dict(rejects.reasons.most_common()),
            repaired=dict(reading.repairs.most_common()),
            cut_rows=int(candidates.measure("cut", used).sum()),
            truncated_rows=int(candidates.measure("truncated", used).sum()),
            truncated_eval_rows=int(candidates.measure("truncated", np.array(parts.held_out, dtype=np.int64)).sum()),
            repeated_questions=len(repeats),
            near_duplicates=len(near),
            leakage=parts.leakage,
            with_reasoning=int((candidates.measure("reasoning", used) > 0).sum()),
            with_options=int(candidates.measure("options", used).sum()),
            words=_words(candidates, used),
            tokens=_tokens(candidates, used),
            template_sha256=chat_format.template_sha256,
        )


class _Rejects:
    """rejects.jsonl while it is written: one line for each record left out, with source, number and reason."""

    def __init__(self, path: Path) -> None:
        self._context = atomic_path(path)
        self._stream: BinaryIO
        self.reasons: Counter[str] = Counter()

    def __enter__(self) -> _Rejects:
        self._stream = self._context.__enter__().open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: Any) -> None:
        self._stream.close()
        if isinstance(value, MedcotError):  # too few are left: the rejected ones are what the user wants to see
            kind = value = at = None
        self._context.__exit__(kind, value, at)

    @property
    def count(self) -> int:
        return self.reasons.total()

    def add(self, source: str, number: int, reason: Rejected, columns: dict[str, Any] | None) -> None:
        self.reasons[reason.reason] += 1
        fields = {"source": source, "number": number, "reason": reason.reason, "detail": str(reason)}
        self._stream.write(json_line({**fields, "columns": columns}))

    def add_candidate(self, candidates: Candidates, number: int, reason: Rejected) -> None:
        fields = candidates.fields(number)
        self.add(fields.pop("source"), fields.pop("number"), reason, fields)


@dataclass
class Reading:
    """What reading found. ``drawn`` has an entry for each row that takes part in the shuffle: its candidate's number,
    or -1 where it was rejected all the same."""

    read: int = 0
    drawn: array[int] = field(default_factory=lambda: array("q"))
    repairs: Counter[str] = field(default_factory=Counter)


def read_candidates(config: Config, chat_format: ChatFormat, candidates: Candidates, rejects: _Rejects) -> Reading:
    """Read the source once; every row becomes a candidate or a reject."""
    reading = Reading()
    for row in read_rows(config.data):
        reading.read += 1
        try:
            record = usable_record(row, config, chat_format)
        except Rejected as reason:
            rejects.add(row.source, row.number, reason, row.columns)
            if reason.drawn:
                reading.drawn.append(-1)
        else:
            reading.drawn.append(len(candidates))
            candidates.append(record)
            reading.repairs.update(record.repairs)
    return reading


def find_duplicates(config: Config, candidates: Candidates, rejects: _Rejects) -> tuple[dict[int, int], dict[int, int]]:
    """Candidates that repeat an earlier one's question, and those nearly equal to an earlier one: number -> twin.

    They are rejected where the configuration drops duplicates.
    """
    repeats = candidates.repeats()
    skip = np.zeros(len(candidates), dtype=np.bool_)
    skip[list(repeats)] = True
    near = candidates.near.find(config.data.near_duplicate_similarity, skip, candidates.text)
    if config.data.duplicates == "drop":
        for reason, found in (("duplicate question", repeats), ("near duplicate", near)):
            for number, twin in sorted(found.items()):
                rejects.add_candidate(candidates, number, Rejected(reason, f"same as {candidates.place(twin)}"))
    return repeats, near


def _order(config: Config, drawn: array[int], dropped: set[int]) -> Numbers:
    """Candidates in the order in which they are taken, without the dropped ones."""
    numbers: Numbers = np.array(drawn, dtype=np.int64)
    if config.data.shuffle:
        # The permutation of datasets' Dataset.shuffle(seed), so that recipes written with it draw the same rows.
        numbers = numbers[np.random.default_rng(config.seed).permutation(len(numbers))]
    return numbers[(numbers >= 0) & ~np.isin(numbers, list(dropped))]


@dataclass(frozen=True)
class Split:
    train: array[int]
    held_out: list[int]
    unused: int
    leakage: Leakage


def split(config: Config, candidates: Candidates, order: Numbers, rejects: _Rejects) -> Split:
    """Training records, then the held-out ones after them; what gives a held-out one away is not trained on.

    The place of a training record that is left out goes to the next unused one.
    """
    data = config.data
    available = len(order) - data.eval_rows
    if available < (data.train_rows or 1):
        raise _too_few(config, len(order), rejects)
    first_held_out = available if data.train_rows is None else data.train_rows
    held_out = [int(number) for number in order[first_held_out : first_held_out + data.eval_rows]]
    spare = order[first_held_out + data.eval_rows :]
    grams = HeldOutGrams([candidates.text(number) for number in held_out])
    sharing: set[int] = set()
    given_away: set[int] = set()
    train = array("q")
    leaking = taken = 0
    for number in map(int, itertools.chain(order[:first_held_out], spare)):
        if len(train) == first_held_out:
            break
        taken += 1
        owners, shares = grams.shares(candidates.text(number))
        worst = int(shares.argmax()) if len(shares) else -1
        if worst >= 0 and shares[worst] >= data.leakage_overlap:
            leaking += 1
            given_away.update(map(int, owners[shares >= data.leakage_overlap]))
            if data.leakage == "drop":
                twin = candidates.place(held_out[owners[worst]])
                reason = Rejected("gives a held-out record away", f"has {shares[worst]:.0%} of the 8-grams of {twin}")
                rejects.add_candidate(candidates, number, reason)
                continue
        sharing.update(map(int, owners))
        train.append(number)
    if len(train) < (data.train_rows or 1):
        raise _too_few(config, len(order) - leaking, rejects)
    leakage = Leakage(
        policy=data.leakage,
        overlap=data.leakage_overlap,
        leaking_records=leaking,
        held_out_given_away=len(given_away),
        held_out_sharing_an_8_gram=len(sharing),
    )
    return Split(train, held_out, len(order) - taken - len(held_out), leakage)


def _too_few(config: Config, usable: int, rejects: _Rejects) -> MedcotError:
    explained = ", ".join(f"{reason}: {count}" for reason, count in rejects.reasons.most_common(3))
    return MedcotError(
        f"{config.data.source} gives {usable} usable records, but {config.data.train_rows or 'at least 1'} for "
        f"training and {config.data.eval_rows} held out are wanted: lower data.train_rows or data.eval_rows, raise "
        f"data.limit, or look at the rejected ones ({explained or 'none'}; {REJECTS_FILE})."
    )


def load_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a train.jsonl or eval.jsonl that ``prepare`` wrote."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def load_examples(path: Path) -> list[Example]:
    return [Example(row["question"], row["reasoning"], row["answer"]) for row in load_records(path)]


def _words(candidates: Candidates, used: Numbers) -> dict[Any, Distribution]:
    words = {name: candidates.measure(name, used) for name in ("question", "reasoning", "answer")}
    words["reasoning"] = words["reasoning"][words["reasoning"] > 0]
    return {name: distribution(values) for name, values in words.items() if len(values)}


def _tokens(candidates: Candidates, used: Numbers) -> dict[Any, Distribution]:
    prompt, thought, answer = (candidates.measure(name, used) for name in ("prompt", "thought", "reply"))
    parts = {"prompt": prompt, "thought": thought[thought > 0], "answer": answer, "whole": prompt + thought + answer}
    return {name: distribution(values) for name, values in parts.items() if len(values)}


@contextmanager
def _scratch(out_dir: Path) -> Iterator[Path]:
    """A folder for what only lives while the stage works; one that a killed attempt left is emptied."""
    folder = out_dir / SCRATCH_NAME
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
