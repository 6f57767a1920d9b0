"""Where training records come from: the packaged sample, a local file, a folder of files, or a hub data set.

``data.source`` names one of them. A local file or folder goes before a hub data set of the same name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline.artifacts import sha256_file
from pipeline.config import DataConfig
from pipeline.csv_records import read_csv, read_tsv
from pipeline.errors import MedcotError
from pipeline.json_list import read_json_list
from pipeline.prompts import Example
from pipeline.readers import (
    GZIP_SUFFIX,
    SourceRow,
    one_line,
    parquet_row_count,
    read_jsonl,
    read_parquet,
    reading,
    require_regular_file,
)

SAMPLE = "sample"
SAMPLE_PATH = Path(__file__).resolve().parent / "data" / "medical_cot.jsonl"

Reader = Callable[[Path, str], Iterator[SourceRow]]
TEXT_READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json_list,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
PARQUET_SUFFIX = ".parquet"
READERS: dict[str, Reader] = {
    **TEXT_READERS,
    **{suffix + GZIP_SUFFIX: reader for suffix, reader in TEXT_READERS.items()},
    PARQUET_SUFFIX: read_parquet,
}
FORMATS = f"{', '.join(TEXT_READERS)} (also with {GZIP_SUFFIX}) and {PARQUET_SUFFIX}"
# Descriptions that `datasets` and the hub put beside the records.
DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})


@dataclass(frozen=True)
class LocalFile:
    """A file of records: its place, its format, its name within a folder (empty for a file alone), its label."""

    path: Path
    format: str
    name: str
    label: str

    def rows(self) -> Iterator[SourceRow]:
        return READERS[self.format](self.path, self.label)


def read_rows(data: DataConfig) -> Iterator[SourceRow]:
    """Yield the records of the configured source in order, at most ``data.limit`` of them, one at a time.

    A folder's files come in the order of their paths. A record that cannot be read is a row with a fault and counts
    towards the limit. Raises MedcotError for a source that leads nowhere or is damaged.
    """
    files = _local_files(data.source)
    rows = _read_hub(data) if files is None else chain.from_iterable(file.rows() for file in files)
    return islice(rows, data.limit)


def source_identity(data: DataConfig) -> dict[str, Any]:
    """What identifies the records for a fingerprint: the content of local files, the address of a hub data set."""
    files = _local_files(data.source)
    if files is None:
        return {"hub": data.source, "config": data.config, "split": data.split, "revision": data.revision}
    hashes = {file.name: _sha256(file.path) for file in files}
    return {"sha256": hashes[""]} if "" in hashes else {"files": hashes}


def count_hint(data: DataConfig) -> int | None:
    """How many rows ``read_rows`` will yield if the files say so themselves (Parquet does), otherwise None."""
    files = _local_files(data.source)
    if files is None or any(file.format != PARQUET_SUFFIX for file in files):
        return None
    count = 0
    for file in files:
        rows = parquet_row_count(file.path)
        if rows is None:
            return None
        count += rows
    return count if data.limit is None else min(count, data.limit)


def sample_examples(count: int) -> list[Example]:
    """The first ``count`` packaged cases, for checks that need some conversation or other."""
    columns = [row.columns for row in islice(read_jsonl(SAMPLE_PATH, SAMPLE), count)]
    return [Example(row["Question"], row["Complex_CoT"], row["Response"]) for row in columns if row is not None]


def _format(path: Path) -> str | None:
    """The suffix in READERS that the file's name ends in."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((ending for ending in ("".join(suffixes[-2:]), "".join(suffixes[-1:])) if ending in READERS), None)


def _local_files(source: str) -> list[LocalFile] | None:
    """The local files behind ``source``, None for a hub id; raises MedcotError for a path that leads nowhere."""
    if source == SAMPLE:
        return [LocalFile(SAMPLE_PATH, ".jsonl", "", SAMPLE)]
    path = Path(source)
    if not source.strip() or "\0" in source:
        raise MedcotError(f"data.source is {source!r}: name a file, a folder, a hub data set or 'sample'.")
    with reading(path):
        if path.is_dir():
            return _folder_files(path, source)
        if path.exists():
            require_regular_file(path)
            if (suffix := _format(path)) is None:
                raise MedcotError(f"data.source {path} is a {path.suffix or 'nameless'} file: medcot reads {FORMATS}.")
            return [LocalFile(path, suffix, "", source)]
    if _format(path) or path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise MedcotError(
            f"data.source {source} does not exist: name a file ({FORMATS}), a folder of them, a hub data set "
            "(owner/name), or 'sample'."
        )
    return None


def _folder_files(folder: Path, source: str) -> list[LocalFile]:
    """The files of records in ``folder`` and below, sorted by path, without hidden ones and descriptions."""

    def unreadable(error: OSError) -> None:
        raise error

    files = []
    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(root, name) for name in names if not name.startswith(".") and name not in DESCRIPTIONS):
            if (suffix := _format(path)) is not None:
                # A name that is not UTF-8 could not be written into a manifest.
                name = os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")
                files.append(LocalFile(path, suffix, name, f"{source.rstrip('/')}/{name}"))
    if not files:
        raise MedcotError(f"data.source {folder} is a folder without a file of records: medcot reads {FORMATS}.")
    return sorted(files, key=lambda file: file.path.parts)


def _sha256(path: Path) -> str:
    with reading(path):
        require_regular_file(path)
        return sha256_file(path)


def _read_hub(data: DataConfig) -> Iterator[SourceRow]:
    """Rows of a hub data set as they arrive, nothing kept on disk."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MedcotError(f"Reading {data.source} from the hub needs the package datasets: install it.") from error
    number = 0
    try:
        stream = load_dataset(data.source, data.config, split=data.split, revision=data.revision, streaming=True)
        for number, columns in enumerate(stream, start=1):
            yield SourceRow(data.source, number, dict(columns))
    # The network, the hub and every file format behind `datasets` have exceptions of their own.
    except Exception as error:
        raise MedcotError(
            f"The data set {data.source} (config {data.config or 'default'}, split {data.split}) cannot be read from "
            f"the hub{f' after row {number:,}' if number else ''}: {one_line(error)} "
            "(without network, name a local file or folder in data.source)."
        ) from error
