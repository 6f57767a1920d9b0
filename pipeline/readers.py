"""What a reader of a record file is, and the readers of JSON lines and Parquet.

A reader is a generator of ``SourceRow``: it holds one record (Parquet: one batch) in memory at a time, turns a record
that cannot be read into a faulty row with its number and reason, and raises MedcotError where the file itself gives out
and the records after that point are lost.
"""

from __future__ import annotations

import gzip
import io
import json
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import MedcotError

# The longest example that can be configured, 131,072 tokens, is about half a MiB of text.
MAX_RECORD_BYTES = 16 * 2**20
# json.loads stops at Python's recursion limit, which depends on who calls; this limit does not, and whoever writes
# the record again stays clear of it.
MAX_DEPTH = 50
PARQUET_BATCH_ROWS = 128
PARQUET_BUFFER_BYTES = 2**20
GZIP_SUFFIX = ".gz"
UTF8_BOM = b"\xef\xbb\xbf"
# UTF-32 little endian starts with the same two bytes.
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class SourceRow:
    """One record as found: where it came from (file or data set, 1-based number), and its columns or its fault.

    The number is the line on which the record starts (JSON lines, CSV, TSV) or the record's place in the list, the
    table or the hub's split (JSON, Parquet, hub).
    """

    source: str
    number: int
    columns: dict[str, Any] | None
    fault: str | None = None


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """The bytes of a UTF-8 text file after its byte order mark, decompressed if its name ends in .gz.

    Raises MedcotError for what is no readable file, for UTF-16, and where reading fails later on.
    """
    with reading(path):
        require_regular_file(path)
        compressed = path.suffix.lower() == GZIP_SUFFIX
        with gzip.open(path, "rb") if compressed else path.open("rb") as stream:
            start = stream.peek(len(UTF8_BOM))
            if start.startswith(UTF16_BOMS):
                raise MedcotError(f"{path} is UTF-16 text: save it as UTF-8.")
            if start.startswith(UTF8_BOM):
                stream.read(len(UTF8_BOM))
            yield stream


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's and gzip's errors into one sentence about ``path``."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise MedcotError(f"{path} cannot be read: {reason or type(error).__name__}.") from error


def require_regular_file(path: Path) -> None:
    """A pipe or a device would be waited on for ever, or never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise MedcotError(f"{path} is not a regular file: name a file or a folder of files.")


def read_jsonl(path: Path, label: str) -> Iterator[SourceRow]:
    """JSON lines: one object a line; blank lines are skipped and a line over MAX_RECORD_BYTES is a faulty row."""
    with opened(path) as stream:
        number = 0
        while line := stream.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if len(line) > MAX_RECORD_BYTES:
                length = len(line) + _skip_rest_of_line(stream, line)
                yield SourceRow(label, number, None, f"{length:,} bytes long; the limit is {MAX_RECORD_BYTES:,}")
            elif line.strip():
                yield parse_record(label, number, line)


def parse_record(label: str, number: int, data: bytes) -> SourceRow:
    """The row of one JSON object. NaN and Infinity are accepted, because Python's own json writes them."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return SourceRow(label, number, None, f"not UTF-8: byte 0x{data[error.start]:02x} at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return SourceRow(label, number, None, f"not JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return SourceRow(label, number, None, f"nested deeper than {MAX_DEPTH} levels")
    except ValueError:  # Python refuses to convert integers of more than 4,300 digits
        return SourceRow(label, number, None, "holds an integer of thousands of digits")
    if not isinstance(value, dict):
        return SourceRow(label, number, None, f"not a record but a {type(value).__name__}")
    return record_row(label, number, value)


def record_row(label: str, number: int, columns: dict[str, Any]) -> SourceRow:
    """The row of a record whose values are Python's; what they are is for the next stage to judge, but for depth."""
    if _deeper_than(columns, MAX_DEPTH):
        return SourceRow(label, number, None, f"nested deeper than {MAX_DEPTH} levels")
    return SourceRow(label, number, columns)


def read_parquet(path: Path, label: str) -> Iterator[SourceRow]:
    """Rows of a Parquet file, in small batches: memory follows the largest page of the file, not its row groups."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    number = 0
    with reading(path):
        require_regular_file(path)
    try:
        with (
            pa.OSFile(str(path)) as source,
            # Without these two the compressed column chunks of a whole row group are read at once.
            ParquetFile(
                source, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES, page_checksum_verification=True
            ) as table,
        ):
            _require_distinct(table.schema_arrow.names, path)
            for batch in table.iter_batches(PARQUET_BATCH_ROWS, use_threads=False):
                for row in _batch_rows(batch, label, number):
                    number += 1
                    yield row
    except (pa.ArrowException, OSError, ValueError) as error:
        where = f"is damaged after row {number:,}" if number else "is not a readable Parquet file"
        raise MedcotError(f"{path} {where}: {one_line(error)}.") from error


def parquet_row_count(path: Path) -> int | None:
    """The number of rows in the file's own words; None when it cannot be read, which reading it will explain."""
    import pyarrow as pa
    from pyarrow.parquet import read_metadata

    try:
        with pa.OSFile(str(path)) as source:
            return int(read_metadata(source).num_rows)
    except (pa.ArrowException, OSError, ValueError):
        return None


def one_line(error: BaseException, limit: int = 300) -> str:
    """A library's message as one short line without a full stop; its type's name when it says nothing."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


def _skip_rest_of_line(stream: io.BufferedReader | gzip.GzipFile, line: bytes) -> int:
    """Read on to the end of the line that ``line`` begins; returns the bytes skipped."""
    skipped = 0
    while line and not line.endswith(b"\n"):
        line = stream.readline(MAX_RECORD_BYTES)
        skipped += len(line)
    return skipped


def _deeper_than(value: Any, limit: int) -> bool:
    """Whether dicts and lists are nested in more than ``limit`` levels, found without recursion."""
    level = [value]
    for _ in range(limit + 1):
        children: list[Any] = []
        for container in level:
            values = container.values() if isinstance(container, dict) else container
            children += [child for child in values if isinstance(child, dict | list)]
        if not children:
            return False
        level = children
    return True


def _require_distinct(names: list[str], path: Path) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise MedcotError(f"{path} has more than one column called {repeated[0]!r}: rename or remove one.")


def _batch_rows(batch: Any, label: str, before: int) -> Iterator[SourceRow]:
    """The rows of a record batch; where a value has no Python form (bad UTF-8, a date out of range), row by row."""
    try:
        for index, columns in enumerate(batch.to_pylist(), start=1):
            yield record_row(label, before + index, columns)
        return
    except (ValueError, OverflowError):
        pass
    for index in range(batch.num_rows):
        number = before + index + 1
        try:
            columns = batch.slice(index, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield SourceRow(label, number, None, f"a value cannot be converted: {one_line(error)}")
        else:
            yield record_row(label, number, columns)
