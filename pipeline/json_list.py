"""Reader of a JSON file that holds one list of records, however large the list.

The list is cut at its top-level commas and each piece goes to ``json.loads``, so a record obeys the same rules as a
JSON line and a bad one costs only itself. ijson 3.6 was tried for this and left: its C parser ends the process
with a segmentation fault on an integer of 5,000 digits and on deep nesting, and gives up the file on NaN.
Grammar: RFC 8259.
"""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import MedcotError
from pipeline.readers import MAX_RECORD_BYTES, SourceRow, opened, parse_record

CHUNK_BYTES = 2**16
# No byte of a multi-byte UTF-8 character is one of JSON's marks. Possessive repeats: a failed match is not retried.
STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
FLAT_OBJECT = rb'\{[^][{}"]*+(?:' + STRING + rb'[^][{}"]*+)*+\}'
# Whole objects and strings are passed over in one step; a lone quote begins a string that the window does not end.
TOKEN = re.compile(FLAT_OBJECT + b"|" + STRING + rb'|[][{},"]', re.DOTALL)
QUOTE, COMMA, CLOSE_LIST, CLOSE_OBJECT = b'",]}'
OPENING = b"[{"
SPACE = b" \t\n\r"


def read_json_list(path: Path, label: str) -> Iterator[SourceRow]:
    """Records of a list, numbered from 1. A bad record between two commas is a faulty row.

    Where the list itself breaks (cut short, a bracket too few or too many, more text after it), the records before that
    point are yielded and MedcotError names the byte.
    """
    with opened(path) as stream:
        for number, item in enumerate(_ListItems(stream, path), start=1):
            if len(item) > MAX_RECORD_BYTES:
                fault = f"{len(item):,} bytes long; the limit is {MAX_RECORD_BYTES:,}"
                yield SourceRow(label, number, None, fault)
            else:
                yield parse_record(label, number, item)


class _ListItems:
    """The undecoded text of each item of the list in ``stream``, through a window that slides over the file."""

    def __init__(self, stream: io.BufferedReader | gzip.GzipFile, path: Path) -> None:
        self.stream = stream
        self.path = path
        self.window = b""
        self.start = 0  # where the current item begins in the window
        self.offset = stream.tell()  # the window's place in the file

    def __iter__(self) -> Iterator[bytes]:
        self._enter_list()
        count = depth = 0
        position = self.start
        while True:
            match = TOKEN.search(self.window, position)
            if match is None or match.group() == b'"':
                position = match.start() if match else len(self.window)
                position -= self._read_on(count)
                continue
            position = match.end()
            kind = self.window[match.start()]
            if kind in OPENING:
                depth += match.end() == match.start() + 1
            elif depth and kind in (CLOSE_LIST, CLOSE_OBJECT):
                depth -= 1
            elif depth == 0 and kind != QUOTE:
                item = self.window[self.start : match.start()].strip(SPACE)
                if kind == CLOSE_OBJECT:
                    raise self._broken(match.start(), count, "a closing brace that nothing opened")
                if kind == COMMA or item or count:
                    count += 1
                    yield item
                self.start = position
                if kind == CLOSE_LIST:
                    return self._leave_list(count)

    def _enter_list(self) -> None:
        while not (text := self.window.lstrip(SPACE)):
            self.offset += len(self.window)
            self.window = self.stream.read(CHUNK_BYTES)
            if not self.window:
                raise MedcotError(f"{self.path} is empty: it must hold a list of records.")
        if not text.startswith(b"["):
            raise MedcotError(
                f"{self.path} must hold a list of records, but starts with {chr(text[0])!r}: "
                "if every line is a record, name the file .jsonl."
            )
        self.start = len(self.window) - len(text) + 1

    def _read_on(self, count: int) -> int:
        """Drop what is before the current item and append more; returns how far the window has moved."""
        held = len(self.window) - self.start
        if held > MAX_RECORD_BYTES:
            raise self._broken(
                self.start, count, f"a record of more than {MAX_RECORD_BYTES:,} bytes, or a bracket or quote not closed"
            )
        # A string that is cut by the window's end is looked at again from its quote: doubling keeps that linear.
        chunk = self.stream.read(max(CHUNK_BYTES, held))
        if not chunk:
            raise self._broken(len(self.window), count, "the end of the file in the middle of the list")
        moved = self.start
        self.window = self.window[moved:] + chunk
        self.offset += moved
        self.start = 0
        return moved

    def _leave_list(self, count: int) -> None:
        rest = self.window[self.start :]
        while not (text := rest.lstrip(SPACE)):
            self.offset += len(self.window)
            self.start, self.window = 0, self.stream.read(CHUNK_BYTES)
            rest = self.window
            if not rest:
                return
        raise self._broken(len(self.window) - len(text), count, "more text after the end of the list")

    def _broken(self, position: int, count: int, what: str) -> MedcotError:
        return MedcotError(
            f"{self.path} is damaged after record {count:,}, at byte {self.offset + position + 1:,}: {what}; "
            "what follows cannot be told apart into records, so repair the file."
        )
