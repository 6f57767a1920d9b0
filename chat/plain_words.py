"""Text as plain words: what a hurried person types and what a rule says become the same sequence.

Case, accents, curly or missing apostrophes, look-alikes such as full-width letters, invisible characters and
doubled letters make no difference: "CAN’T  breeathe" and "cant breathe" are the same two words.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from enum import IntEnum

# Before NFKD, which would turn some of these into a space and an accent.
_APOSTROPHES = str.maketrans(dict.fromkeys("‘’ʼ`´′＇", "'"))
_WORD = re.compile(r"\d+(?:[.,]\d+)?|[^\W\d_]+(?:'[^\W\d_]+)*")
_REPEATED_LETTER = re.compile(r"([^\W\d_])\1+")
_INVISIBLE = {"Mn", "Cf"}  # accents after NFKD; zero-width characters, soft hyphens


class Break(IntEnum):
    """What stands before a word: nothing, a comma or the like, the end of a sentence."""

    NONE = 0
    PAUSE = 1
    END = 2


@dataclass(frozen=True)
class PlainWords:
    """``words[i]`` stands at ``text[spans[i][0]:spans[i][1]]``, after ``breaks[i]``, in a sentence that the word
    ``sentence_starts[i]`` begins and that is over before the word ``sentence_ends[i]``.
    """

    text: str
    words: list[str]
    spans: list[tuple[int, int]]
    breaks: list[Break]
    sentence_starts: list[int]
    sentence_ends: list[int]

    def quote(self, start: int, end: int) -> str:
        """The words from ``start`` to before ``end`` as they stand in the text, on one line."""
        return " ".join(self.text[self.spans[start][0] : self.spans[end - 1][1]].split())


def plain_word(word: str) -> str:
    """One word as it is compared."""
    return _REPEATED_LETTER.sub(r"\1", word.casefold().replace("'", ""))


def split_words(text: str) -> PlainWords:
    """Linear in the length of ``text``."""
    readable = _readable(text)
    words: list[str] = []
    spans: list[tuple[int, int]] = []
    breaks: list[Break] = []
    for match in _WORD.finditer(readable):
        start, end = match.span()
        breaks.append(_break_in(readable[spans[-1][1] : start]) if spans else Break.END)
        words.append(plain_word(match.group()))
        spans.append((start, end))
    starts, ends = _sentences(breaks)
    return PlainWords(readable, words, spans, breaks, starts, ends)


def _readable(text: str) -> str:
    text = text.translate(_APOSTROPHES)
    if text.isascii():
        return text
    return "".join(
        character
        for character in unicodedata.normalize("NFKD", text)
        if unicodedata.category(character) not in _INVISIBLE
    )


def _break_in(between: str) -> Break:
    if between == " ":
        return Break.NONE
    if any(mark in between for mark in ".!?;") or between.count("\n") > 1:
        return Break.END
    # A single line end may be a wrapped line; a hyphen between spaces is a dash.
    return Break.PAUSE if any(mark in between for mark in (",", ":", "\n", "(", ")", "–", "—", " - ")) else Break.NONE


def _sentences(breaks: list[Break]) -> tuple[list[int], list[int]]:
    first_words = [index for index, before in enumerate(breaks) if before is Break.END]
    starts: list[int] = []
    ends: list[int] = []
    for first, end in zip(first_words, [*first_words[1:], len(breaks)], strict=False):
        starts += [first] * (end - first)
        ends += [end] * (end - first)
    return starts, ends
