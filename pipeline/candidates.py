"""Usable records on disk, with the little that is needed of each in memory: about 50 bytes a record."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.overlap import NearDuplicates, text_key
from pipeline.records import Record

_MEASURES = ("question", "reasoning", "answer", "prompt", "thought", "reply", "options", "cut", "truncated")


class Candidates:
    """Records in the order in which they were read; written once, then looked up by number.

    ``measures`` holds, for each record, the words of its texts, the tokens of its parts (``reply`` is the answer's),
    and whether it has options, was cut, and is truncated in training.
    """

    def __init__(self, folder: Path) -> None:
        self._stream: BinaryIO = (folder / "candidates.jsonl").open("w+b")
        self._offsets = array("q")
        self._keys = array("Q")
        self._measures = {name: array("i") for name in _MEASURES}
        self.near = NearDuplicates(folder)

    def __enter__(self) -> Candidates:
        return self

    def __exit__(self, *_: object) -> None:
        self.near.close()
        self._stream.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def append(self, record: Record) -> None:
        example = record.example
        self._offsets.append(self._stream.tell())
        self._stream.write(json_line(record.to_json()))
        self._keys.append(text_key(example.question))
        self.near.add(_compared(example.question, example.answer))
        values = {
            "question": len(example.question.split()),
            "reasoning": len((example.reasoning or "").split()),
            "answer": len(example.answer.split()),
            "prompt": record.tokens.prompt,
            "thought": record.tokens.thought,
            "reply": record.tokens.answer,
            "options": record.options is not None,
            "cut": record.cut,
            "truncated": record.truncated,
        }
        for name, value in values.items():
            self._measures[name].append(value)

    def measure(self, name: str, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        return np.frombuffer(self._measures[name], dtype=np.int32)[numbers]

    def line(self, number: int) -> bytes:
        """The record as a line of train.jsonl or eval.jsonl."""
        self._stream.seek(self._offsets[number])
        return self._stream.readline()

    def fields(self, number: int) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.line(number))
        return fields

    def place(self, number: int) -> str:
        fields = self.fields(number)
        return f"{fields['source']}:{fields['number']}"

    def text(self, number: int) -> str:
        """What two records are compared by: question and answer. Reasoning is often sampled anew for the same case."""
        fields = self.fields(number)
        return _compared(fields["question"], fields["answer"])

    def repeats(self) -> dict[int, int]:
        """Record -> the first one with the same question, case, punctuation and white space set aside."""
        keys = np.frombuffer(self._keys, dtype=np.uint64)
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        firsts = first[group]
        return {int(number): int(firsts[number]) for number in np.flatnonzero(firsts != np.arange(len(keys)))}


def json_line(value: dict[str, Any]) -> bytes:
    """One line of JSON; characters that UTF-8 cannot hold (half a surrogate pair, in rejects) are escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:
        return (json.dumps(value, default=str) + "\n").encode()


def _compared(question: str, answer: str) -> str:
    return f"{question}\n{answer}"
