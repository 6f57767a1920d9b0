"""Phrases as the rules write them, and where they occur in plain words, in linear time.

chest|breast tight*      two words: either of the first pair, then any word that begins with "tight"
(dead|without me)        either of these phrases
cant ... breathe         up to three words may stand between; none of them may negate
<pain>                   any phrase of the list "pain"
[38-43]                  a number, in digits or (up to twelve) in letters
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, TypeVar

from chat.plain_words import PlainWords, plain_word

GAP = "..."
LONGEST_GAP = 3  # words
_ALTERNATIVE = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*\*?|\d+")
_PART = re.compile(r"\([^()]*\)|\S+")
_RANGE = re.compile(r"\[(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)\]")
_NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMBERS = {plain_word(word): float(number) for number, word in enumerate(_NUMBER_WORDS, start=1)}

Value = TypeVar("Value")


@dataclass(frozen=True)
class WordPattern:
    """One word of a phrase: the word itself, how it begins, or a number between two bounds."""

    word: str = ""
    is_prefix: bool = False
    bounds: tuple[float, float] | None = None

    @classmethod
    @lru_cache(maxsize=4096)  # the packaged rules hold 8,000 words, three in four of them again
    def parse(cls, text: str) -> WordPattern:
        bounds = _RANGE.fullmatch(text)
        if bounds:
            return cls(bounds=(float(bounds[1]), float(bounds[2])))
        if not _ALTERNATIVE.fullmatch(text):
            raise ValueError(f"{text!r} is no word: write letters, a * at the end, or [38-43]")
        return cls(plain_word(text.rstrip("*")), text.endswith("*"))

    def matches(self, word: str) -> bool:
        if self.bounds is not None:
            number = _number(word)
            return number is not None and self.bounds[0] <= number <= self.bounds[1]
        return word.startswith(self.word) if self.is_prefix else word == self.word


Run = tuple[WordPattern, ...]


def parse_run(text: str) -> Run:
    """Words that follow each other; raises ValueError."""
    if not text.strip():
        raise ValueError("there is no word before or after a |")
    return tuple(WordPattern.parse(word) for word in text.split())


class FirstWords(Generic[Value]):
    """Finds, for a word, the values filed under a pattern that matches it; the work is the word's length at most."""

    def __init__(self) -> None:
        self._words: dict[str, list[Value]] = {}
        self._prefixes: dict[str, list[Value]] = {}
        self._numbers: list[tuple[WordPattern, Value]] = []
        self._lengths: set[int] = set()

    def add(self, pattern: WordPattern, value: Value) -> None:
        if pattern.bounds is not None:
            self._numbers.append((pattern, value))
        elif pattern.is_prefix:
            self._prefixes.setdefault(pattern.word, []).append(value)
            self._lengths.add(len(pattern.word))
        else:
            self._words.setdefault(pattern.word, []).append(value)

    def find(self, word: str) -> Iterator[Value]:
        yield from self._words.get(word, ())
        for length in self._lengths:
            yield from self._prefixes.get(word[:length], ())
        if self._numbers and _number(word) is not None:
            yield from (value for pattern, value in self._numbers if pattern.matches(word))


@dataclass(frozen=True, eq=False)
class _Element:
    """A place in a phrase that any of several runs of words can fill."""

    runs: tuple[Run, ...]
    after_gap: bool
    by_first_word: FirstWords[Run] = field(default_factory=FirstWords)

    def __post_init__(self) -> None:
        for run in self.runs:
            self.by_first_word.add(run[0], run)

    def ends(self, words: Sequence[str], start: int, limit: int) -> Iterator[int]:
        for run in self.by_first_word.find(words[start]):
            end = start + len(run)
            if end <= limit and all(
                pattern.matches(word) for pattern, word in zip(run[1:], words[start + 1 : end], strict=True)
            ):
                yield end


@dataclass(frozen=True, eq=False)
class Phrase:
    """A parsed phrase. It is found under itself, so two of the same text are two."""

    elements: tuple[_Element, ...]

    @classmethod
    def parse(cls, text: str, lists: Mapping[str, Sequence[str]]) -> Phrase:
        """``lists`` gives the phrases of each named list, which name no list themselves; raises ValueError."""
        elements: list[_Element] = []
        after_gap = False
        for part in _PART.findall(text):
            if part == GAP:
                if not elements or after_gap:
                    raise ValueError(f"{GAP} stands between two words: {text!r}")
                after_gap = True
                continue
            elements.append(_Element(tuple(_runs(part, lists)), after_gap))
            after_gap = False
        if not elements or after_gap:
            raise ValueError(f"a phrase needs a word at its end: {text!r}")
        return cls(tuple(elements))

    def first_words(self) -> set[str]:
        """The words it can begin with, those with a * or a number left out."""
        firsts = (run[0] for run in self.elements[0].runs)
        return {first.word for first in firsts if first.word and not first.is_prefix}

    def ends(self, text: PlainWords, start: int, no_gap: Collection[str]) -> set[int]:
        """Where the phrase can end when it begins with the word ``start``, within its sentence."""
        limit = text.sentence_ends[start]
        ends = set(self.elements[0].ends(text.words, start, limit))
        for element in self.elements[1:]:
            ends = {
                end
                for begin in ends
                for position in _positions(text.words, begin, limit, element.after_gap, no_gap)
                for end in element.ends(text.words, position, limit)
            }
        return ends


@dataclass(frozen=True, order=True)
class Hit:
    """A phrase found: the words from ``start`` to before ``end``."""

    start: int
    end: int


class PhraseFinder:
    """Finds many phrases at once. Words in ``no_gap`` are never skipped by a gap."""

    def __init__(self, phrases: Collection[Phrase], no_gap: Collection[str]) -> None:
        self._no_gap = frozenset(no_gap)
        self._phrases = list(dict.fromkeys(phrases))
        self._by_first_word: FirstWords[Phrase] = FirstWords()
        self._elements: FirstWords[_Element] = FirstWords()
        for phrase in self._phrases:
            _file(self._by_first_word, phrase.elements[0], phrase)
            for element in phrase.elements:
                _file(self._elements, element, element)

    def find(self, text: PlainWords) -> dict[Phrase, list[Hit]]:
        """The hits of every phrase that occurs, by their start; where several ends are possible, the nearest."""
        starting = self._phrases_by_word(set(text.words))
        hits: dict[Phrase, list[Hit]] = {}
        for start, word in enumerate(text.words):
            for phrase in starting[word]:
                ends = phrase.ends(text, start, self._no_gap)
                if ends:
                    hits.setdefault(phrase, []).append(Hit(start, min(ends)))
        return hits

    def _phrases_by_word(self, words: Collection[str]) -> dict[str, list[Phrase]]:
        """For each word the phrases that may begin with it: of most, some other part is nowhere in the text."""
        present = {element for word in words for element in self._elements.find(word)}
        possible = {phrase for phrase in self._phrases if present.issuperset(phrase.elements)}
        return {word: list(possible.intersection(self._by_first_word.find(word))) for word in words}


def _file(index: FirstWords[Value], element: _Element, value: Value) -> None:
    for first in dict.fromkeys(run[0] for run in element.runs):
        index.add(first, value)


def _runs(part: str, lists: Mapping[str, Sequence[str]]) -> Iterator[Run]:
    if part.startswith("<") and part.endswith(">"):
        name = part[1:-1]
        if name not in lists:
            raise ValueError(f"there is no list <{name}>: the lists are {', '.join(sorted(lists))}")
        yield from map(parse_run, lists[name])
    elif part.startswith("(") and part.endswith(")"):
        yield from map(parse_run, part[1:-1].split("|"))
    else:
        yield from map(parse_run, part.split("|"))


def _positions(words: Sequence[str], begin: int, limit: int, after_gap: bool, no_gap: Collection[str]) -> Iterator[int]:
    last = min(begin + LONGEST_GAP if after_gap else begin, limit - 1)
    for position in range(begin, last + 1):
        yield position
        if words[position] in no_gap:
            return


def _number(word: str) -> float | None:
    if word[0].isdecimal():
        return float(word.replace(",", "."))
    return _NUMBERS.get(word)
