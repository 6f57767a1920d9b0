"""Readers of training records: the packaged sample, local files, hub data sets. One record at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import sha256_file
from pipeline.config import DataConfig
from pipeline.errors import MedcotError
from pipeline.prompts import Example

SAMPLE = "sample"
SAMPLE_PATH = Path(__file__).resolve().parent / "data" / "medical_cot.jsonl"
LOCAL_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class SourceRow:
    """One record as found: where it came from (file or data set, 1-based number), and its columns or its fault."""

    source: str
    number: int
    columns: dict[str, Any] | None
    fault: str | None = None


def source_identity(data: DataConfig) -> dict[str, Any]:
    """What identifies the records for a fingerprint."""
    path = _local_path(data.source)
    if path is not None:
        return {"sha256": sha256_file(path)}
    return {"hub": data.source, "config": data.config, "split": data.split, "revision": data.revision}


def read_rows(data: DataConfig) -> Iterator[SourceRow]:
    """Yield the records of the configured source in order, at most ``data.limit`` of them."""
    path = _local_path(data.source)
    if path is None:
        rows = _read_hub(data)
    elif path.suffix == ".jsonl":
        rows = _read_jsonl(path, data.source)
    else:
        rows = _read_json(path, data.source)
    for count, row in enumerate(rows):
        if data.limit is not None and count >= data.limit:
            return
        yield row


def sample_examples(count: int) -> list[Example]:
    """The first ``count`` packaged cases, for checks that need some conversation or other."""
    columns = [row.columns for _, row in zip(range(count), _read_jsonl(SAMPLE_PATH, SAMPLE), strict=False)]
    return [Example(row["Question"], row["Complex_CoT"], row["Response"]) for row in columns if row is not None]


def _local_path(source: str) -> Path | None:
    """The local file behind ``source``, None for a hub id; raises MedcotError for a path that leads nowhere."""
    if source == SAMPLE:
        return SAMPLE_PATH
    path = Path(source)
    if path.is_file():
        if path.suffix not in LOCAL_SUFFIXES:
            raise MedcotError(
                f"data.source {path} is a {path.suffix or 'nameless'} file: medcot reads .jsonl and .json."
            )
        return path
    if path.is_dir():
        raise MedcotError(f"data.source {path} is a folder: name one .jsonl or .json file in it.")
    if path.suffix in LOCAL_SUFFIXES or path.is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise MedcotError(
            f"data.source {source} does not exist: name a .jsonl or .json file, a hub data set "
            "(owner/name), or 'sample'."
        )
    return None


def _read_jsonl(path: Path, label: str) -> Iterator[SourceRow]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                yield SourceRow(label, number, None, f"not JSON: {error}")
                continue
            yield _row(label, number, value)


def _read_json(path: Path, label: str) -> Iterator[SourceRow]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise MedcotError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, list):
        raise MedcotError(f"{path} must hold a list of records, not a {type(values).__name__}.")
    for number, value in enumerate(values, start=1):
        yield _row(label, number, value)


def _row(label: str, number: int, value: Any) -> SourceRow:
    if not isinstance(value, dict):
        return SourceRow(label, number, None, f"not a record but a {type(value).__name__}")
    return SourceRow(label, number, value)


def _read_hub(data: DataConfig) -> Iterator[SourceRow]:
    from datasets import load_dataset

    try:
        stream = load_dataset(data.source, data.config, split=data.split, revision=data.revision, streaming=True)
        rows = iter(stream)
        number = 0
        while True:
            try:
                columns = next(rows)
            except StopIteration:
                return
            number += 1
            yield SourceRow(data.source, number, dict(columns))
    except (OSError, ValueError, RuntimeError) as error:
        raise MedcotError(
            f"The data set {data.source} cannot be read from the hub: {str(error).strip().splitlines()[0]} "
            "(offline? name a local .jsonl file in data.source)"
        ) from error
