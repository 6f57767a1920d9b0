"""Stage 1: read records, reject what cannot be learned from, hold some out, and say what was done.

medcot run --only prepare
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import write_text
from pipeline.base_model import load_chat_format, local_base
from pipeline.config import Columns, Config
from pipeline.errors import MedcotError
from pipeline.prompts import THINK_CLOSE, THINK_OPEN, ChatFormat, Example
from pipeline.results import Distribution, PreparedData
from pipeline.sources import SourceRow, read_rows

TRAIN_FILE = "train.jsonl"
EVAL_FILE = "eval.jsonl"
REJECTS_FILE = "rejects.jsonl"


@dataclass(frozen=True)
class Record:
    """A usable record; ``options`` maps letters to texts and ``answer_idx`` is the right letter."""

    example: Example
    options: dict[str, str] | None
    answer_idx: str | None
    source: str
    number: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "question": self.example.question,
            "reasoning": self.example.reasoning,
            "answer": self.example.answer,
            "source": self.source,
            "number": self.number,
        }
        if self.options is not None:
            fields |= {"options": self.options, "answer_idx": self.answer_idx}
        return fields


class Rejected(Exception):
    """Why a record is left out, in a few words that are counted over all records."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def prepare(config: Config, inputs: dict[str, Path], out_dir: Path) -> PreparedData:
    """Write train.jsonl, eval.jsonl and rejects.jsonl; every record read ends in exactly one place or is unused."""
    base = local_base(config.model.base, config.model.revision, weights=False)
    chat_format = load_chat_format(base, config.prompt.system)
    records, rejects = select(config, chat_format)
    reasons = Counter(reject["reason"] for reject in rejects)
    train, held_out, unused = split(config, records, reasons)
    _write_jsonl(out_dir / TRAIN_FILE, [record.to_json() for record in train])
    _write_jsonl(out_dir / EVAL_FILE, [record.to_json() for record in held_out])
    _write_jsonl(out_dir / REJECTS_FILE, rejects)
    used = train + held_out
    words: dict[Any, Distribution] = {
        "question": distribution([_words(record.example.question) for record in used]),
        "answer": distribution([_words(record.example.answer) for record in used]),
    }
    thoughts = [record.example.reasoning for record in used if record.example.reasoning is not None]
    if thoughts:
        words["reasoning"] = distribution([_words(thought) for thought in thoughts])
    return PreparedData(
        source=config.data.source,
        read=len(records) + len(rejects),
        train_rows=len(train),
        eval_rows=len(held_out),
        unused_rows=unused,
        rejected=len(rejects),
        reject_reasons=dict(reasons.most_common()),
        with_reasoning=len(thoughts),
        with_options=sum(record.options is not None for record in used),
        words=words,
        tokens=distribution([record.tokens for record in used]),
        template_sha256=chat_format.template_sha256,
    )


def select(config: Config, chat_format: ChatFormat) -> tuple[list[Record], list[dict[str, Any]]]:
    """Usable records and rejects, in the order they were read."""
    records: list[Record] = []
    rejects: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for row in read_rows(config.data):
        try:
            record = _usable(row, config, chat_format)
            where = f"{row.source}:{row.number}"
            first = seen.setdefault(" ".join(record.example.question.lower().split()), where)
            if first != where:
                raise Rejected("duplicate question", f"same as {first}")
        except Rejected as rejection:
            rejects.append(
                {
                    "source": row.source,
                    "number": row.number,
                    "reason": rejection.reason,
                    "detail": str(rejection),
                    "columns": row.columns,
                }
            )
        else:
            records.append(record)
    return records, rejects


def split(config: Config, records: Sequence[Record], reasons: Counter[str]) -> tuple[list[Record], list[Record], int]:
    """Training records, held-out records, and how many are left over when ``train_rows`` limits the first."""
    order = list(records)
    if config.data.shuffle:
        random.Random(config.seed).shuffle(order)
    wanted = config.data.train_rows
    available = len(order) - config.data.eval_rows
    if available < (wanted or 1):
        explained = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
        raise MedcotError(
            f"{config.data.source} gives {len(order)} usable records, but {wanted or 'at least 1'} for training and "
            f"{config.data.eval_rows} held out are wanted: lower data.train_rows or data.eval_rows, or look at the "
            f"rejected ones ({explained or 'none'})."
        )
    n_train = available if wanted is None else wanted
    # Held-out records are the last ones, so that raising data.limit keeps the training order.
    return order[:n_train], order[len(order) - config.data.eval_rows :], available - n_train


def load_records(path: Path) -> list[dict[str, Any]]:
    """The records of a train.jsonl or eval.jsonl that ``prepare`` wrote."""
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def load_examples(path: Path) -> list[Example]:
    return [Example(row["question"], row["reasoning"], row["answer"]) for row in load_records(path)]


def distribution(values: Sequence[float]) -> Distribution:
    array = np.asarray(values, dtype=float)
    return Distribution(
        n=len(array),
        minimum=float(array.min()),
        median=float(np.median(array)),
        p95=float(np.percentile(array, 95)),
        maximum=float(array.max()),
    )


def _usable(row: SourceRow, config: Config, chat_format: ChatFormat) -> Record:
    if row.columns is None:
        raise Rejected("unreadable", row.fault or "")
    names = config.data.columns
    question = _text(row.columns, names.question)
    answer = _text(row.columns, names.answer)
    reasoning = None if names.reasoning is None else _text(row.columns, names.reasoning)
    for name, text in ((names.question, question), (names.answer, answer)):
        if len(text) < config.data.min_characters:
            raise Rejected("too short", f"{name} has {len(text)} characters")
    if reasoning is not None and not reasoning:
        raise Rejected("empty", f"{names.reasoning}")
    if any(tag in text for tag in (THINK_OPEN, THINK_CLOSE) for text in (reasoning or "", answer)):
        raise Rejected("think tag in the text", "it would open or close the thought in the wrong place")
    options, answer_idx = _options(row.columns, names)
    example = Example(question, reasoning, answer)
    tokens = len(chat_format.encode(example).input_ids)
    if tokens > config.model.max_seq_length:
        raise Rejected("too long", f"{tokens} tokens, model.max_seq_length is {config.model.max_seq_length}")
    return Record(example, options, answer_idx, row.source, row.number, tokens)


def _text(columns: dict[str, Any], name: str) -> str:
    if name not in columns:
        raise Rejected("missing column", f"{name} (found {', '.join(sorted(map(str, columns)))})")
    value = columns[name]
    if not isinstance(value, str):
        raise Rejected("not text", f"{name} is {type(value).__name__}")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise Rejected("not text", f"{name} holds half a surrogate pair")
    return value.strip()


def _options(columns: dict[str, Any], names: Columns) -> tuple[dict[str, str] | None, str | None]:
    options = columns.get(names.options) if names.options else None
    if not options:
        return None, None
    answer_idx = columns.get(names.answer_idx) if names.answer_idx else None
    if not isinstance(options, dict) or not all(isinstance(text, str) for text in options.values()):
        raise Rejected("options are not a mapping of letters to texts")
    if answer_idx not in options:
        raise Rejected("answer_idx is none of the options", repr(answer_idx))
    return options, answer_idx


def _words(text: str) -> int:
    return len(text.split())


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(_json_line(row) for row in rows))


def _json_line(row: dict[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # a rejected row may hold half a surrogate pair, which UTF-8 cannot
        return json.dumps(row) + "\n"
    return line
