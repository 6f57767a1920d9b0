"""Random and damaged files of every format: rows or one sentence, and no record lost on the way.

python -m pytest tests/fuzz -m fuzz
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.config import DataConfig
from pipeline.errors import MedcotError
from pipeline.readers import SourceRow
from pipeline.sources import read_rows

pytestmark = pytest.mark.fuzz

RANDOM_INPUTS = 600
MUTATED_INPUTS = 900
BLANK = " \t\r\n\v\f"
BOM = b"\xef\xbb\xbf"
RECORDS = [
    {"Question": "What is\nthis? ä", "Complex_CoT": 'He said "so", \\ and went.', "Response": "This."},
    {"Question": "Second", "Complex_CoT": "", "Response": "[1, {2}]"},
    {"Question": "Dritte 漢字 😀", "Complex_CoT": "a\r\nb,\tc", "Response": "x" * 40},
    {"Question": '"', "Complex_CoT": "null", "Response": "-1.5e3"},
]


def csv_bytes(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(RECORDS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue().encode()


def parquet_bytes(**options: object) -> bytes:
    table = pa.Table.from_pylist([record | {"n": i, "list": [i] * i, "f": i / 3} for i, record in enumerate(RECORDS)])
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=2, **options)
    return sink.getvalue()


JSONL = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
VALID = {
    ".jsonl": [JSONL, BOM + JSONL],
    ".json": [json.dumps(RECORDS, indent=1).encode(), BOM + json.dumps([*RECORDS, 1, [None], "x"]).encode()],
    ".csv": [csv_bytes(","), csv_bytes(",").replace(b"\r\n", b"\n")],
    ".tsv": [csv_bytes("\t")],
    ".parquet": [parquet_bytes(), parquet_bytes(compression="none", use_dictionary=False, write_page_checksum=True)],
    ".jsonl.gz": [gzip.compress(JSONL), gzip.compress(JSONL) * 2],
    ".csv.gz": [gzip.compress(csv_bytes(","), compresslevel=0)],
}
STRUCTURE = st.lists(
    st.sampled_from(['"', '""', "{", "}", "[", "]", ",", ":", "\\", "\n", "\r", "\r\n", "\t", " ", "a", "1", "null"])
    | st.sampled_from(
        ['"a"', '{"a": 1}', "\\ud800", "\0", "ä", "NaN", "a,b", "\v", "\x1c", "\x85", "\u2028", "-", "e"]
    ),
    max_size=40,
).map(lambda pieces: "".join(pieces).encode())
RANDOM_BYTES = st.one_of(
    st.binary(max_size=80),
    STRUCTURE,
    STRUCTURE.map(lambda content: b"[" + content + b"]"),
    st.tuples(STRUCTURE, st.binary(max_size=6), STRUCTURE).map(b"".join),
)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "insert", "repeat", "swap", "zero"]),
        st.integers(0, 2**16),
        st.integers(0, 60),
        st.binary(min_size=1, max_size=4) | STRUCTURE,
    ),
    min_size=1,
    max_size=5,
)


def mutated(content: bytes, mutations: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, place, length, payload in mutations:
        if not content:
            return payload
        at = place % len(content)
        before, chunk, after = content[:at], content[at : at + length], content[at + length :]
        changes = {
            "flip": content[:at] + bytes([content[at] ^ (1 << length % 8)]) + content[at + 1 :],
            "cut": before,
            "drop": before + after,
            "insert": before + payload + chunk + after,
            "repeat": before + chunk * 3 + after,
            "swap": after + chunk + before,
            "zero": before + bytes(len(chunk)) + after,
        }
        content = changes[kind]
    return content


def outcome(path: Path, content: bytes) -> tuple[list[SourceRow], str | None]:
    """The rows until the end or the error, and the error's sentence; anything else fails the test."""
    path.write_bytes(content)
    rows: list[SourceRow] = []
    try:
        for row in read_rows(DataConfig.model_validate({"source": str(path)})):
            rows.append(row)
    except MedcotError as error:
        message = str(error)
        assert message and message.splitlines() == [message]
        return rows, message
    finally:
        for row in rows:
            assert (row.columns is None) != (row.fault is None)
            assert row.fault is None or row.fault.splitlines() == [row.fault]
        numbers = [row.number for row in rows]
        assert numbers == sorted(set(numbers)) and (not numbers or numbers[0] >= 1)
    return rows, None


def check(path: Path, content: bytes) -> None:
    rows, error = outcome(path, content)
    if path.suffix == ".parquet" or path.suffix == ".gz":
        return
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        assert error and "UTF-16" in error
        return
    content = content.removeprefix(BOM)
    ORACLES[path.suffix](content, rows, error)


def same(found: object, expected: object) -> bool:
    return json.dumps(found) == json.dumps(expected)


def parsed(data: bytes) -> object:
    """What Python's json makes of the text, or the exception."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        return error


def check_jsonl(content: bytes, rows: list[SourceRow], error: str | None) -> None:
    assert error is None
    lines = {number: line for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()}
    assert [row.number for row in rows] == list(lines)
    for row in rows:
        value = parsed(lines[row.number])
        assert same(row.columns, value) if row.columns is not None else not isinstance(value, dict)


def check_json(content: bytes, rows: list[SourceRow], error: str | None) -> None:
    whole = parsed(content)
    if not isinstance(whole, list):
        # Damage inside one record leaves the others readable; then the record is faulty.
        assert error is not None or any(row.fault for row in rows)
        return
    assert error is None and len(rows) == len(whole)
    for row, value in zip(rows, whole, strict=True):
        assert same(row.columns, value) if isinstance(value, dict) else row.fault


def check_csv(content: bytes, rows: list[SourceRow], error: str | None, delimiter: str = ",") -> None:
    """Cut the file into lines at the rows' numbers: each piece must be one record and blank lines, nothing more."""
    if error is not None:
        assert not rows  # only the header stops a CSV file
        return
    lines = list(io.StringIO(content.decode("utf-8", "surrogateescape"), newline=""))
    starts = [row.number for row in rows]
    pieces = [lines[a - 1 : b - 1] for a, b in zip([1, *starts], [*starts, len(lines) + 1], strict=True)]
    header, *records = pieces
    names = [name.strip() for name in only_record(header, delimiter)]
    for row, piece in zip(rows, records, strict=True):
        assert piece[0].strip(BLANK.replace(delimiter, "")), "a tab alone parts two empty cells"
        if row.fault and row.fault.startswith("a broken record"):
            assert not any(line.strip(BLANK) for line in piece[1:])
            continue
        cells = only_record(piece, delimiter)
        text = "".join(piece)
        unreadable = "\0" in text or re.search("[\udc80-\udcff]", text) or len(cells) != len(names)
        assert bool(unreadable) == (row.columns is None)
        if row.columns is not None:
            assert list(row.columns) == names and list(row.columns.values()) == cells


def only_record(lines: list[str], delimiter: str) -> list[str]:
    """The cells of the one record in these lines that is not a blank line."""
    records = []
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    before = 0
    for cells in reader:
        if len(cells) > 1 or "".join(lines[before : reader.line_num]).strip(BLANK):
            records.append(cells)
        before = reader.line_num
    assert len(records) == 1
    return records[0]


ORACLES: dict[str, Callable[[bytes, list[SourceRow], str | None], None]] = {
    ".jsonl": check_jsonl,
    ".json": check_json,
    ".csv": check_csv,
    ".tsv": lambda content, rows, error: check_csv(content, rows, error, "\t"),
}
UNHURRIED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


@pytest.mark.parametrize("suffix", VALID)
def test_random_bytes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"

    @settings(max_examples=RANDOM_INPUTS, deadline=None, suppress_health_check=UNHURRIED)
    @given(content=RANDOM_BYTES)
    @example(b"")
    @example(b"[" * 5000)
    @example(b'{"a":' * 5000)
    @example(b"[" + b"9" * 5000 + b"]")
    @example(b"\v[]")
    @example(b"[,]")
    @example(b"a\n\t")
    def run(content: bytes) -> None:
        check(path, content)

    run()


@pytest.mark.parametrize("suffix", VALID)
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    for content in VALID[suffix]:
        check(path, content)
        assert [row.fault for row in outcome(path, content)[0]][:4] == [None] * 4

    @settings(max_examples=MUTATED_INPUTS, deadline=None, suppress_health_check=UNHURRIED)
    @given(content=st.sampled_from(VALID[suffix]), mutations=MUTATIONS)
    def run(content: bytes, mutations: list[tuple[str, int, int, bytes]]) -> None:
        check(path, mutated(content, mutations))

    run()
