"""What records have in common: repeated ones, and training records that give held-out ones away.

Texts are compared as sequences of words (letters and digits, case and punctuation set aside), each word a 64-bit
hash. Near duplicates are found by MinHash with banding (Broder 1997, "On the resemblance and containment of
documents"; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3) and confirmed by the exact share
of common word triples; leakage is the share of a held-out record's 8-grams that a training record holds, the measure
of GPT-2 and PaLM (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, section 8).

Own code instead of datasketch, whose index takes several kilobytes a record in memory: here it is 16 numbers a
record in files, sorted one band at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

_SHINGLE = 3  # words of the pieces by which near duplicates are compared
_LEAK_GRAM = 8  # words of the pieces by which leakage is found
_BANDS, _ROWS_PER_BAND = 16, 4  # two records 0.8 alike share a band with probability 0.9998, 0.4 alike with 0.34
_MOST_COMPARED = 20  # kept records of one bucket that a new one is compared with; bounds the work on stock phrases
# Chinese and Japanese write no spaces between words: each of their characters counts as one.
_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")

Hashes = npt.NDArray[np.uint64]


def word_hashes(text: str) -> Hashes:
    """One 64-bit hash for each word, in order."""
    words = _WORD.findall(text.casefold())
    return np.fromiter((xxhash.xxh3_64_intdigest(word.encode()) for word in words), dtype=np.uint64, count=len(words))


def ngrams(words: Hashes, length: int) -> Hashes:
    """The distinct hashes of all runs of ``length`` words, sorted; a shorter text is one run."""
    if len(words) == 0:
        return words
    length = min(length, len(words))
    grams = np.zeros(len(words) - length + 1, dtype=np.uint64)
    for offset in range(length):
        # A polynomial in an odd number, modulo 2^64: order matters, and every step is a vector operation.
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + len(grams)]
    return np.unique(_mixed(grams))


def text_key(text: str) -> int:
    """A hash that texts share when they differ in case, punctuation and white space only."""
    return xxhash.xxh3_64_intdigest(word_hashes(text).tobytes())


def similarity(a: Hashes, b: Hashes) -> float:
    """Jaccard similarity of two sets of n-grams: common ones over all."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(1, len(a) + len(b) - common)


def shingles(text: str) -> Hashes:
    """The text's word triples, by which near duplicates are compared."""
    return ngrams(word_hashes(text), _SHINGLE)


class NearDuplicates:
    """Finds nearly equal texts among any number of them; memory grows by 8 bytes a text, scratch files by 128.

    ``add`` every text in order, then ``find``. The files lie in ``folder``.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f"band-{band}" for band in range(_BANDS)]
        self._files = [path.open("wb") for path in self._paths]
        generator = np.random.default_rng(0)
        count = _BANDS * _ROWS_PER_BAND
        self._multipliers = generator.integers(0, 2**63, size=(count, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._count = 0

    def close(self) -> None:
        for file in self._files:
            file.close()

    def add(self, text: str) -> None:
        grams = shingles(text)
        if len(grams) == 0:
            grams = np.array([self._count], dtype=np.uint64)  # a text without words resembles no other
        signature = (grams * self._multipliers >> np.uint64(16)).min(axis=1).reshape(_BANDS, _ROWS_PER_BAND)
        for file, rows in zip(self._files, signature, strict=True):
            file.write(xxhash.xxh3_64_digest(rows.tobytes()))
        self._count += 1

    def find(self, threshold: float, skip: npt.NDArray[np.bool_], text: Callable[[int], str]) -> dict[int, int]:
        """Later text -> the earlier, kept one that it resembles by at least ``threshold``.

        ``skip`` marks texts that are out already; ``text`` gives a text again by its number.
        """
        for file in self._files:
            file.flush()
        found: dict[int, int] = {}
        for path in self._paths:
            keys = np.fromfile(path, dtype=np.uint64)
            order = np.argsort(keys, kind="stable")
            ordered = keys[order]
            starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
            ends = np.r_[starts[1:], len(ordered)]
            for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
                self._compare(order[start:end], threshold, skip, text, found)
        return found

    @staticmethod
    def _compare(
        bucket: npt.NDArray[np.intp],
        threshold: float,
        skip: npt.NDArray[np.bool_],
        text: Callable[[int], str],
        found: dict[int, int],
    ) -> None:
        kept: list[tuple[int, Hashes]] = []
        for number in map(int, bucket):
            if skip[number] or number in found:
                continue
            own = shingles(text(number))
            twin = next((earlier for earlier, other in kept if similarity(own, other) >= threshold), None)
            if twin is not None:
                found[number] = twin
            elif len(kept) < _MOST_COMPARED:
                kept.append((number, own))


class HeldOutGrams:
    """The 8-grams of all held-out texts, to find what of them a training text holds."""

    def __init__(self, texts: Sequence[str]) -> None:
        grams = [ngrams(word_hashes(text), _LEAK_GRAM) for text in texts]
        self._sizes = np.array([max(1, len(own)) for own in grams])
        owners = np.repeat(np.arange(len(texts)), [len(own) for own in grams])
        flat = np.concatenate([*grams, np.empty(0, dtype=np.uint64)])
        order = np.argsort(flat, kind="stable")
        self._grams, self._owners = flat[order], owners[order]

    def shares(self, text: str) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """Held-out texts that have an 8-gram in common with ``text``, and the share of their 8-grams it holds."""
        own = ngrams(word_hashes(text), _LEAK_GRAM)
        left = np.searchsorted(self._grams, own, side="left")
        right = np.searchsorted(self._grams, own, side="right")
        hits = [self._owners[a:b] for a, b in zip(left, right, strict=True) if b > a]
        if not hits:
            return np.empty(0, dtype=np.intp), np.empty(0)
        owners, counts = np.unique(np.concatenate(hits), return_counts=True)
        return owners, counts / self._sizes[owners]


def _mixed(values: Hashes) -> Hashes:
    """Spread the bits of 64-bit numbers (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
