"""Encoded records on disk: training reads them through a memory map, so their number costs no memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.prepare import load_records
from pipeline.prompts import ChatFormat, EncodedExample, Example

_WRITTEN_AT_ONCE = 100  # rows that are lists in memory until then


@dataclass(frozen=True)
class TokenCounts:
    """Of the records of one file: their number and their tokens, prompt and completion."""

    rows: int
    mean: float
    longest: int


def encode_all(
    chat_format: ChatFormat, examples: Iterable[Example], max_tokens: int | None
) -> Iterator[EncodedExample]:
    """Ids and labels of every example, in order, cut off after ``max_tokens``."""
    return (chat_format.encode(example, max_tokens) for example in examples)


def encoded_rows(
    chat_format: ChatFormat, records: Path, arrow_file: Path, max_tokens: int | None
) -> tuple[Any, TokenCounts]:
    """A ``datasets.Dataset`` of the records of a JSONL file, in order, mapped from ``arrow_file``.

    A row has ``input_ids``, ``labels`` and ``line``, its line in the JSONL file (from 1). Arrow's streaming format:
    https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format
    """
    from datasets import Dataset, Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    ids = Sequence(Value("int32"))
    features = Features({"input_ids": ids, "labels": ids, "line": Value("int32")})
    arrow_file.parent.mkdir(parents=True, exist_ok=True)
    examples = (Example(row["question"], row["reasoning"], row["answer"]) for row in load_records(records))
    count = tokens = longest = 0
    with ArrowWriter(path=str(arrow_file), features=features, writer_batch_size=_WRITTEN_AT_ONCE) as writer:
        for count, encoded in enumerate(encode_all(chat_format, examples, max_tokens), start=1):
            writer.write({"input_ids": encoded.input_ids, "labels": encoded.labels, "line": count})
            tokens += len(encoded.input_ids)
            longest = max(longest, len(encoded.input_ids))
        writer.finalize()
    return Dataset.from_file(str(arrow_file)), TokenCounts(count, tokens / max(1, count), longest)


def lengths_of(rows: Any) -> list[int]:
    """Tokens of each row of encoded_rows()."""
    import pyarrow.compute

    lengths: list[int] = pyarrow.compute.list_value_length(rows.data.column("input_ids")).to_pylist()
    return lengths


class Collator:
    """Rows to one batch of tensors, padded on the right to its longest row; ``line`` stays a column of numbers."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import DataCollatorForSeq2Seq

        self._pad = DataCollatorForSeq2Seq(tokenizer, padding=True)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        sequences = [
            {
                "input_ids": row["input_ids"],
                "labels": row["labels"],
                "attention_mask": [1] * len(row["input_ids"]),
            }
            for row in rows
        ]
        import torch

        return {**self._pad(sequences), "line": torch.tensor([row["line"] for row in rows])}
