"""Readers of records: what each format gives, what each fault says, and that nothing is read ahead."""

import csv
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import csv_records, json_list, readers
from pipeline.config import DataConfig
from pipeline.errors import MedcotError
from pipeline.readers import SourceRow
from pipeline.sources import _read_hub, count_hint, read_rows, sample_examples, source_identity

RECORDS = [{"Question": f"What is {i}? ä\n{{[", "Response": f'It is "{i}", yes.'} for i in range(5)]


def data(source: Path | str, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"source": str(source), **settings})


def rows_of(source: Path | str, **settings: object) -> list[SourceRow]:
    return list(read_rows(data(source, **settings)))


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def faults_of(source: Path | str) -> dict[int, str]:
    return {row.number: row.fault for row in rows_of(source) if row.fault is not None}


def read_until_error(source: Path) -> tuple[list[SourceRow], str]:
    """The rows that come before the error that ends the reading, and what it says."""
    rows = []
    with pytest.raises(MedcotError) as caught:
        for row in read_rows(data(source)):
            rows.append(row)
    assert "\n" not in str(caught.value)
    return rows, str(caught.value)


def as_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS), encoding="utf-8")


def as_json(path: Path) -> None:
    path.write_text(json.dumps(RECORDS, indent=1, ensure_ascii=False), encoding="utf-8")


def as_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(RECORDS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(RECORDS)


def as_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    ".jsonl": as_jsonl,
    ".ndjson": as_jsonl,
    ".json": as_json,
    ".csv": as_csv,
    ".tsv": lambda path: as_csv(path, "\t"),
    ".parquet": as_parquet,
}
TEXT_SUFFIXES = [suffix for suffix in WRITERS if suffix != ".parquet"]


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.v1{suffix.upper()}"
    WRITERS[suffix](path)
    rows = rows_of(path)
    assert [row.columns for row in rows] == RECORDS
    assert {row.source for row in rows} == {str(path)} and not any(row.fault for row in rows)
    # A quoted line break makes every CSV record two lines long, after a header of one line.
    expected = [2, 4, 6, 8, 10] if suffix in (".csv", ".tsv") else [1, 2, 3, 4, 5]
    assert [row.number for row in rows] == expected
    assert [row.columns for row in rows_of(path, limit=2)] == RECORDS[:2]


@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
def test_text_may_be_compressed_and_may_start_with_a_byte_order_mark(tmp_path: Path, suffix: str) -> None:
    plain = tmp_path / f"rows{suffix}"
    WRITERS[suffix](plain)
    marked = plain.read_bytes().join((b"\xef\xbb\xbf", b""))
    for path, content in (
        (tmp_path / f"marked{suffix}", marked),
        (tmp_path / f"rows{suffix}.gz", gzip.compress(plain.read_bytes())),
        (tmp_path / f"marked{suffix}.gz", gzip.compress(marked)),
    ):
        assert [row.columns for row in rows_of(written(path, content))] == RECORDS


@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
def test_utf16_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    written(path, path.read_text(encoding="utf-8").encode("utf-16"))
    with pytest.raises(MedcotError, match="is UTF-16 text: save it as UTF-8"):
        rows_of(path)


def test_a_cut_gzip_file_gives_what_is_whole_and_then_stops(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"Question": os.urandom(40).hex()}) + "\n" for _ in range(2000)).encode()
    rows, message = read_until_error(written(tmp_path / "rows.jsonl.gz", gzip.compress(lines)[:-20000]))
    assert 500 < len(rows) < 2000 and "rows.jsonl.gz cannot be read" in message
    _, message = read_until_error(written(tmp_path / "plain.jsonl.gz", lines))
    assert "Not a gzipped file" in message


def test_faulty_json_lines(tmp_path: Path) -> None:
    lines = [
        b'{"a": 1}',
        b"",
        b'{"a": ',
        b"[1]",
        b'{"a": "\xff"}',
        b"  \t",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}",
        b"null",
        b"\0\0",
        b'{"a": "\\ud800"}',
    ]
    path = written(tmp_path / "rows.jsonl", b"\r\n".join(lines))
    assert faults_of(path) == {
        3: "not JSON: Expecting value at character 9",
        4: "not a record but a list",
        5: "not UTF-8: byte 0xff at byte 8",
        7: "nested deeper than 50 levels",
        8: "holds an integer of thousands of digits",
        9: "nested deeper than 50 levels",
        10: "not a record but a NoneType",
        11: "not JSON: Expecting value at character 1",
    }
    assert [(row.number, row.columns) for row in rows_of(path) if row.columns] == [(1, {"a": 1}), (12, {"a": "\ud800"})]


def test_values_come_as_found(tmp_path: Path) -> None:
    record = {"a": 1, "b": None, "c": [1.5, {"d": True}], "e": "x", "f": 10**30}
    for name, content in (("rows.jsonl", json.dumps(record)), ("rows.json", json.dumps([record]))):
        assert rows_of(written(tmp_path / name, content))[0].columns == record
    pq.write_table(
        pa.table({"a": [1], "when": [datetime(2026, 1, 2)], "n": [{"x": [None, 2]}]}), tmp_path / "r.parquet"
    )
    assert rows_of(tmp_path / "r.parquet")[0].columns == {"a": 1, "when": datetime(2026, 1, 2), "n": {"x": [None, 2]}}


def test_a_line_over_the_limit_is_one_faulty_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 50)
    path = written(tmp_path / "rows.jsonl", '{"a": "%s"}\n' % ("x" * 500) + '{"a": 1}\n' + " " * 300)
    rows = rows_of(path)
    assert [(row.number, row.fault) for row in rows] == [
        (1, "510 bytes long; the limit is 50"),
        (2, None),
        (3, "300 bytes long; the limit is 50"),
    ]


def test_a_line_of_hundreds_of_megabytes_is_not_held(tmp_path: Path) -> None:
    """A small gzip file that opens into one line of 300 MB, read in a process of its own."""
    ten_megabytes = gzip.compress(b"x" * 10**7, compresslevel=1)
    path = written(tmp_path / "rows.jsonl.gz", ten_megabytes * 30 + gzip.compress(b'\n{"a": 1}\n'))
    code = (
        "import sys; from pathlib import Path; from pipeline.memory import peak_memory_bytes\n"
        "from pipeline.readers import read_jsonl\n"
        "before = peak_memory_bytes()\n"
        "print([(row.number, row.fault, row.columns) for row in read_jsonl(Path(sys.argv[1]), 'x')])\n"
        "print(peak_memory_bytes() - before)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    rows, growth = result.stdout.splitlines()
    assert rows == str([(1, "300,000,001 bytes long; the limit is 16,777,216", None), (2, None, {"a": 1})])
    assert int(growth) < 6 * readers.MAX_RECORD_BYTES


def test_faulty_items_of_a_json_list_cost_only_themselves(tmp_path: Path) -> None:
    items = [b'{"a": "]},"}', b"tru", b'{"a": "\xff"}', b"", b'{"a"; [1]}', b'{"a": NaN}', b'{"a": "\\""}', b"{]"]
    path = written(tmp_path / "rows.json", b" \n[" + b",".join(items) + b"]\n")
    assert faults_of(path) == {
        2: "not JSON: Expecting value at character 1",
        3: "not UTF-8: byte 0xff at byte 8",
        4: "not JSON: Expecting value at character 1",
        5: "not JSON: Expecting ':' delimiter at character 5",
        8: "not JSON: Expecting property name enclosed in double quotes at character 2",
    }
    assert [row.number for row in rows_of(path) if row.columns] == [1, 6, 7]


@pytest.mark.parametrize(
    ("content", "whole", "message"),
    [
        (b'[{"a": 1}, {"a": 2}, {"a": ', 2, "damaged after record 2, at byte 28: the end of the file in the middle"),
        (b'[{"a": 1}, {"a": "open]', 1, "at byte 24: the end of the file"),
        (b"[" * 300_000, 0, "at byte 300,001: the end of the file"),
        (b'[{"a": 1}] {"a": 2}', 1, "damaged after record 1, at byte 12: more text after the end of the list"),
        (b'[{"a": 1}}, {"a": 2}]', 0, "at byte 10: a closing brace that nothing opened"),
        (b'{"a": 1}', 0, "must hold a list of records, but starts with '{'"),
        (b"\xef\xbb\xbf  \n", 0, "is empty: it must hold a list of records"),
        (b"", 0, "is empty"),
    ],
)
def test_a_json_list_that_breaks_stops_after_the_whole_records(
    tmp_path: Path, content: bytes, whole: int, message: str
) -> None:
    rows, said = read_until_error(written(tmp_path / "rows.json", content))
    assert [row.columns for row in rows] == [{"a": number} for number in range(1, whole + 1)]
    assert message in said


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_a_json_list_is_the_same_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(json_list, "CHUNK_BYTES", chunk)
    as_json(tmp_path / "rows.json")
    assert [row.columns for row in rows_of(tmp_path / "rows.json")] == RECORDS
    for empty in ("[]", " [ \n ] \n\n"):
        assert rows_of(written(tmp_path / "empty.json", empty)) == []
    _, message = read_until_error(written(tmp_path / "bad.json", b"\xef\xbb\xbf   [1,   2]   \n  x"))
    assert "after record 2, at byte 21" in message


def test_a_json_record_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "MAX_RECORD_BYTES", 1000)
    path = written(tmp_path / "rows.json", json.dumps([{"a": 1}, {"a": "x" * 2000}, {"a": 2}]))
    assert [(row.number, row.fault) for row in rows_of(path)][1] == (2, "2,009 bytes long; the limit is 1,000")
    monkeypatch.setattr(json_list, "CHUNK_BYTES", 100)
    rows, message = read_until_error(path)
    assert len(rows) == 1 and "after record 1, at byte 11: a record of more than 1,000 bytes, or" in message


def test_faulty_csv_records(tmp_path: Path) -> None:
    lines = [
        b"Question, Response ,n",
        b"one,1,2",
        b"",
        b"too,few",
        b"one,too,many,cells",
        b"bad\xff,1,2",
        b'"two',
        b'lines",1,2',
        b"nul\0,1,2",
        b'"closed"then more,1,2',
        b'in"ches,1,2',
        b'"never closed,1,2',
        b"  ",
        "last ä,1,2".encode(),
    ]
    path = written(tmp_path / "rows.csv", b"\n".join(lines))
    assert faults_of(path) == {
        4: "2 cells; the header has 3",
        5: "4 cells; the header has 3",
        6: "bytes that are not UTF-8: 0xff on line 6",
        9: "a NUL byte on line 9",
        10: "a broken record: ',' expected after '\"'",
        12: "a broken record: unexpected end of data",
    }
    good = {row.number: row.columns["Question"] for row in rows_of(path) if row.columns}
    assert good == {2: "one", 7: "two\nlines", 11: 'in"ches', 14: "last ä"}
    assert rows_of(path)[0].columns == {"Question": "one", "Response": "1", "n": "2"}


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_csv_with_any_line_ends(tmp_path: Path, newline: str) -> None:
    path = written(tmp_path / "rows.csv", newline.join(["a,b", "1,2", "", '"x', 'y",4', ""]))
    assert [(row.number, row.columns) for row in rows_of(path)] == [
        (2, {"a": "1", "b": "2"}),
        (4, {"a": f"x{newline}y", "b": "4"}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: it must start with a row of column names"),
        ("\n \n", "is empty"),
        ("a,b,a\n1,2,3", r"rows.csv:1: the row of column names has 'a' more than once"),
        ("\na,,\n1,2,3", r"rows.csv:2: .* has '' more than once"),
        ('"",""\n', "names nothing"),
        ("Question;Response\nx;y", "one cell with ';' in it"),
        ('"a"b,c\n1,2', "holds a broken record"),
        (b"\xff,b\n1,2", "holds bytes that are not UTF-8"),
        ("a\0,b\n1,2", "holds a NUL byte"),
    ],
)
def test_csv_headers_that_cannot_be_used(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(MedcotError, match=message):
        rows_of(written(tmp_path / "rows.csv", content))


def test_an_unnamed_index_column_is_kept(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path / "rows.csv", ",Question\n0,x\n"))[0].columns == {"": "0", "Question": "x"}


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    long = "x" * 1_000_000  # Python's csv stops at 131,072 characters unless told
    assert rows_of(written(tmp_path / "rows.csv", f"a,b\n{long},1\n"))[0].columns == {"a": long, "b": "1"}


def test_csv_records_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_records, "MAX_RECORD_BYTES", 100)
    lines = ["a,b", "x" * 1050 + ",1", '"open,1', *(f"line {n},2" for n in range(20)), "y" * 400 + ",1", "end,1"]
    path = written(tmp_path / "rows.csv", "\n".join(lines))
    limit = "a broken record: longer than 100 characters"
    assert faults_of(path) == {2: limit, 3: limit, 24: limit}
    assert [row.number for row in rows_of(path) if row.columns] == [*range(4, 24), 25]


def test_what_is_not_read_again_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_records, "MAX_REREAD_CHARACTERS", 30)
    # Each line's last quote opens a cell that the next line's first does not close.
    path = written(tmp_path / "rows.csv", "a,b\n" + 'x","\n' * 10)
    faults = faults_of(path)
    assert len(faults) == 1 or all(number > 1 for number in faults)
    assert faults[max(faults)].endswith(f"(with all of lines {max(faults)}-11)")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"a": [os.urandom(50).hex() for _ in range(20_000)]})
    pq.write_table(table, path, row_group_size=5000, compression="zstd", write_page_checksum=True, use_dictionary=False)
    whole = path.read_bytes()
    _, message = read_until_error(written(path, whole[:-100]))
    assert "rows.parquet is not a readable Parquet file: Parquet magic bytes not found" in message
    middle = len(whole) // 2
    rows, message = read_until_error(written(path, whole[:middle] + bytes(100) + whole[middle + 100 :]))
    # The batch that reaches into the damaged row group goes with it.
    assert 5000 - readers.PARQUET_BATCH_ROWS < len(rows) < 20_000 and f"damaged after row {len(rows):,}: " in message
    assert [row.columns["a"] for row in rows if row.columns] == table["a"].to_pylist()[: len(rows)]
    assert "not a readable Parquet file" in read_until_error(written(path, b""))[1]


def test_parquet_values_without_a_python_form_are_faulty_rows(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    days = pa.array([0, 10**9, 2], pa.int32()).view(pa.date32())
    for name, column in (("text", texts), ("day", days)):
        pq.write_table(pa.table({name: column}), tmp_path / "rows.parquet")
        rows = rows_of(tmp_path / "rows.parquet")
        assert [row.number for row in rows] == [1, 2, 3] and [row.fault is None for row in rows] == [True, False, True]
        assert (rows[1].fault or "").startswith("a value cannot be converted: ")


def test_parquet_columns_of_one_name(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "rows.parquet")
    with pytest.raises(MedcotError, match="more than one column called 'a'"):
        rows_of(tmp_path / "rows.parquet")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.csv", "a/b/part.parquet", "c.json", ".hidden.jsonl", ".git/x.jsonl", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS.get(path.suffix, as_jsonl)(path)
    written(tmp_path / "dataset_infos.json", "{}")
    rows = rows_of(f"{tmp_path}/")
    names = ["a/b/part.parquet", "a/z.csv", "b.jsonl", "c.json"]
    assert [row.source for row in rows] == [f"{tmp_path}/{name}" for name in names for _ in RECORDS]
    assert [row.columns for row in rows] == RECORDS * 4
    assert [row.source for row in rows_of(tmp_path, limit=7)] == [row.source for row in rows[:7]]
    identity = source_identity(data(tmp_path))
    assert list(identity["files"]) == names
    with (tmp_path / "c.json").open("a") as stream:
        stream.write("\n")
    changed = source_identity(data(tmp_path))["files"]
    assert {name for name in names if changed[name] != identity["files"][name]} == {"c.json"}


def test_a_broken_file_in_a_folder_is_named(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "a.jsonl")
    rows, message = read_until_error(written(tmp_path / "b.json", "[1, ").parent)
    assert [row.number for row in rows] == [1, 2, 3, 4, 5, 1] and "b.json is damaged" in message


def test_identity_of_a_file_follows_its_content_and_not_its_name(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "a.jsonl")
    first = source_identity(data(tmp_path / "a.jsonl"))
    as_jsonl(tmp_path / "b.jsonl")
    assert source_identity(data(tmp_path / "b.jsonl")) == first
    written(tmp_path / "b.jsonl", "{}")
    assert source_identity(data(tmp_path / "b.jsonl")) != first
    assert source_identity(data("owner/name", revision="abc")) == {
        "hub": "owner/name", "config": None, "split": "train", "revision": "abc",
    }  # fmt: skip


def test_count_hint_is_what_the_files_say_themselves(tmp_path: Path) -> None:
    as_parquet(tmp_path / "a.parquet")
    (tmp_path / "sub").mkdir()
    as_parquet(tmp_path / "sub" / "b.parquet")
    assert count_hint(data(tmp_path)) == 10 == len(rows_of(tmp_path))
    assert count_hint(data(tmp_path, limit=3)) == 3
    as_jsonl(tmp_path / "c.jsonl")
    assert [count_hint(data(source)) for source in (tmp_path, tmp_path / "c.jsonl", "owner/name")] == [None] * 3
    assert count_hint(data(written(tmp_path / "bad.parquet", b"PAR1"))) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.jsonl", "does not exist: name a file"),
        ("absent.csv.gz", "does not exist"),
        ("a/b/c", "does not exist"),
        ("~/data", "does not exist"),
        ("", "data.source is ''"),
        ("a\0b", r"data.source is 'a\\x00b'"),
        ("README.md", r"README.md is a .md file: medcot reads .jsonl, .ndjson, .json, .csv, .tsv .* and .parquet"),
        ("x" * 300 + "/y", "File name too long"),
        ("/dev/null", "/dev/null is not a regular file"),
        ("tests/e2e/absent/", "does not exist"),
    ],
)
def test_sources_that_lead_nowhere(source: str, message: str) -> None:
    for use in (rows_of, lambda source: source_identity(data(source)), lambda source: count_hint(data(source))):
        with pytest.raises(MedcotError, match=message):
            use(source)


def test_a_folder_without_records_and_a_pipe(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match="is a folder without a file of records: medcot reads"):
        rows_of(tmp_path)
    os.mkfifo(tmp_path / "rows.jsonl")
    for source in (tmp_path, tmp_path / "rows.jsonl"):
        with pytest.raises(MedcotError, match=r"rows.jsonl is not a regular file"):
            rows_of(source)
        with pytest.raises(MedcotError, match=r"rows.jsonl is not a regular file"):
            source_identity(data(source))


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_that_vanishes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    rows = read_rows(data(path))
    path.unlink()
    with pytest.raises(MedcotError, match="cannot be read: No such file or directory"):
        next(rows)


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    for suffix, write in WRITERS.items():
        write(tmp_path / f"rows{suffix}")
        (tmp_path / f"rows{suffix}").chmod(0)
        with pytest.raises(MedcotError, match="Permission denied"):
            rows_of(tmp_path / f"rows{suffix}")


ENDLESS: dict[str, tuple[bytes, Callable[[int], bytes]]] = {
    ".jsonl": (b"", lambda n: b'{"a": %d}\n' % n),
    ".json": (b"[", lambda n: b'{"a": %d},\n' % n),
    ".csv": (b"a,b\n", lambda n: b"%d,x\n" % n),
}


class Endless(io.RawIOBase):
    """A file that never ends and counts what was taken from it."""

    def __init__(self, start: bytes, record: Callable[[int], bytes]) -> None:
        self.pieces: Iterator[bytes] = itertools.chain([start], map(record, itertools.count()))
        self.left = b""
        self.taken = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.taken

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while len(self.left) < len(buffer):
            self.left += next(self.pieces)
        buffer[:] = self.left[: len(buffer)]
        self.left = self.left[len(buffer) :]
        self.taken += len(buffer)
        return len(buffer)


@pytest.mark.parametrize("suffix", ENDLESS)
def test_records_come_before_the_file_has_been_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """An endless file gives its first records after a bounded number of bytes."""
    endless = Endless(*ENDLESS[suffix])
    path = written(tmp_path / f"rows{suffix}", b"")
    original = Path.open

    def opened(self: Path, *arguments: object, **named: object) -> object:
        return io.BufferedReader(endless) if self == path else original(self, *arguments, **named)  # type: ignore

    monkeypatch.setattr(Path, "open", opened)
    rows = list(read_rows(data(path, limit=1000)))
    assert [int(row.columns["a"]) for row in rows if row.columns] == list(range(1000))
    assert endless.taken < 200_000


def test_parquet_batches_are_bounded(tmp_path: Path) -> None:
    """One row group of 60 MB decoded: reading all of it holds a small part at a time."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": [os.urandom(100).hex() for _ in range(300_000)]}), path, use_dictionary=False)
    before = pa.total_allocated_bytes()
    highest = 0
    count = 0
    for row in read_rows(data(path)):
        count += 1
        if row.number % 5000 == 0:
            highest = max(highest, pa.total_allocated_bytes() - before)
    assert count == 300_000 and highest < 12e6


@pytest.fixture(scope="module")
def hub_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set as it lies on the hub; `datasets` reads a folder through the same builders."""
    folder = tmp_path_factory.mktemp("hub")
    as_jsonl(folder / "train.jsonl")
    written(folder / "test.jsonl", '{"Question": "held out", "Response": "yes"}\n')
    return folder


def test_hub_rows_by_split(hub_copy: Path) -> None:
    rows = list(_read_hub(data(hub_copy)))
    assert [(row.number, row.columns) for row in rows] == list(enumerate(RECORDS, start=1))
    assert [row.columns for row in _read_hub(data(hub_copy, split="test"))] == [
        {"Question": "held out", "Response": "yes"}
    ]


def test_hub_errors_name_what_there_is(hub_copy: Path) -> None:
    with pytest.raises(MedcotError, match=r"split nope\) cannot be read .*: Bad split: nope. Available splits: .*test"):
        list(_read_hub(data(hub_copy, split="nope")))
    with pytest.raises(MedcotError, match=r"config nope.*'nope' not found. Available: \['default'\]"):
        list(_read_hub(data(hub_copy, config="nope")))


def test_an_unreachable_hub_is_one_sentence() -> None:
    with pytest.raises(
        MedcotError, match=r"owner/no-such-set .*Couldn't reach .*name a local file or folder"
    ) as caught:
        rows_of("owner/no-such-set")
    assert "\n" not in str(caught.value)


def test_readers_can_run_side_by_side(tmp_path: Path) -> None:
    for suffix, write in WRITERS.items():
        write(tmp_path / f"rows{suffix}")
    for together in zip(*(read_rows(data(tmp_path / f"rows{suffix}")) for suffix in WRITERS), strict=True):
        assert all(row.columns == together[0].columns for row in together)


def test_the_sample() -> None:
    rows = rows_of("sample", limit=3)
    assert [row.number for row in rows] == [1, 2, 3] and {row.source for row in rows} == {"sample"}
    assert [example.question for example in sample_examples(3)] == [
        row.columns["Question"] for row in rows if row.columns
    ]
    assert set(source_identity(data("sample"))) == {"sha256"}
