"""Reader of comma- and tab-separated files with a header row (RFC 4180, through Python's csv module)."""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.errors import MedcotError
from pipeline.readers import MAX_RECORD_BYTES, SourceRow, opened

# Lines of a broken quoted record are looked at again as records of their own, up to this much in a file.
MAX_REREAD_CHARACTERS = 4 * MAX_RECORD_BYTES
BLANK = " \t\r\n\v\f"
# What errors="surrogateescape" makes of bytes that are not UTF-8.
UNDECODED = re.compile("[\udc80-\udcff]")


def read_csv(path: Path, label: str, delimiter: str = ",") -> Iterator[SourceRow]:
    """Records of a CSV file; a row's number is the line on which it starts (the header is on line 1, as a rule).

    A row with another number of cells than the header, with undecodable bytes or NUL, with a misplaced quote or over
    MAX_RECORD_BYTES characters is faulty. After a misplaced quote reading goes on with the record's second line, so one
    stray quote does not take the rest of the file with it. Raises MedcotError when the header cannot be used.
    """
    header: list[str] | None = None
    with opened(path) as binary:
        text = io.TextIOWrapper(binary, encoding="utf-8", errors="surrogateescape", newline="")
        for number, cells, fault in _records(text, delimiter):
            if header is None:
                header = _header(cells, fault, f"{path}:{number}", delimiter)
            elif fault is None and len(cells) != len(header):
                yield SourceRow(label, number, None, f"{len(cells)} cells; the header has {len(header)}")
            elif fault is None:
                yield SourceRow(label, number, dict(zip(header, cells, strict=True)))
            else:
                yield SourceRow(label, number, None, fault)
    if header is None:
        raise MedcotError(f"{path} is empty: it must start with a row of column names.")


read_tsv = partial(read_csv, delimiter="\t")


def _records(text: io.TextIOWrapper, delimiter: str) -> Iterator[tuple[int, list[str], str | None]]:
    """Every record that is not blank, the header too: its first line, its cells, and what is wrong with it."""
    # Process-wide in Python's csv; only ever raised, because other readers may be under way.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    lines = _RecordLines(text)
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.start_record()
        first = lines.first
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, [], f"a broken record: {error}{lines.read_again_after_first()}"
            continue
        if not lines.is_blank(cells):
            yield first, cells, lines.undecodable()


def _header(cells: list[str], fault: str | None, where: str, delimiter: str) -> list[str]:
    """Column names without surrounding spaces; one may be empty (pandas leaves its index unnamed)."""
    where = f"{where}: the row of column names"
    if fault is not None:
        raise MedcotError(f"{where} holds {fault}.")
    names = [name.strip() for name in cells]
    if not any(names):
        raise MedcotError(f"{where} names nothing.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise MedcotError(f"{where} has {repeated[0]!r} more than once: rename or remove one.")
    if len(names) == 1:
        other = next((mark for mark in ",;\t|" if mark != delimiter and mark in names[0]), None)
        if other is not None:
            raise MedcotError(
                f"{where} is one cell with {other!r} in it: save the file with commas as .csv or with tabs as .tsv."
            )
    return names


class _RecordLines:
    """Hands lines to the csv module, and remembers those of the record under way.

    The limit on a record's length is raised from here as csv.Error, after which the csv module starts a new record.
    """

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text = text
        self.number = 0  # of the line handed out last
        self.first = 0
        self.record: list[str] = []
        self.again: deque[str] = deque()
        self.reread = 0
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else self._next_from_file()
        if not line:
            raise StopIteration
        self.number += 1
        self.record.append(line)
        self.size += len(line)
        if self.size > MAX_RECORD_BYTES:
            raise csv.Error(f"longer than {MAX_RECORD_BYTES:,} characters")
        return line

    def start_record(self) -> None:
        self.record = []
        self.size = 0
        self.first = self.number + 1

    def read_again_after_first(self) -> str:
        """Hand the record's lines out once more, all but the first, or say which lines are not: the limit is spent."""
        rest = self.record[1:]
        if self.reread + sum(map(len, rest)) > MAX_REREAD_CHARACTERS:
            return f" (with all of lines {self.first}-{self.number})"
        self.reread += sum(map(len, rest))
        self.again.extendleft(reversed(rest))
        self.number -= len(rest)
        return ""

    def is_blank(self, cells: list[str]) -> bool:
        return len(cells) < 2 and not "".join(self.record).strip(BLANK)

    def undecodable(self) -> str | None:
        for number, line in enumerate(self.record, start=self.first):
            if "\0" in line:
                return f"a NUL byte on line {number}"
            if not line.isascii() and (match := UNDECODED.search(line)):
                return f"bytes that are not UTF-8: 0x{ord(match.group()) - 0xDC00:02x} on line {number}"
        return None

    def _next_from_file(self) -> str:
        line = rest = self.text.readline(MAX_RECORD_BYTES + 1)
        # What is over the limit is dropped unseen; the cut line is recognized by its length when it comes again.
        while len(rest) > MAX_RECORD_BYTES and not rest.endswith(("\n", "\r")):
            rest = self.text.readline(MAX_RECORD_BYTES + 1)
        return line
