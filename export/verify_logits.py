"""How far one model's next-token logits are from another's, position by position, in bounded memory.

Kullback-Leibler divergence is ``sum over tokens w of p(w) (log p(w) - log q(w))`` in nats, p from the reference: what
``llama-perplexity --kl-divergence`` reports. The normalized mean square error is ``|a - b|^2 / |a|^2`` over all logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating[Any]]

_BLOCK_LOGITS = 1 << 21  # widened to float64 at a time: 16 positions of a vocabulary of 128k


@dataclass(frozen=True)
class Disagreement:
    """Another most likely token than the reference's, at ``position`` of sequence number ``sequence``."""

    sequence: int
    position: int
    expected: int
    found: int


class LogitComparison:
    """Sums over positions that are added in blocks; ``kl`` has one value a position (nats)."""

    def __init__(self) -> None:
        self.agreeing = 0
        self.first_disagreement: Disagreement | None = None
        self._difference = self._power = 0.0
        self._kl: list[npt.NDArray[np.float64]] = []

    def add(self, expected: Logits, found: Logits, sequence: int = 0) -> None:
        """Compare one sequence's logits [positions, vocabulary], the reference's first."""
        with np.errstate(invalid="ignore", over="ignore"):  # ``finite`` tells
            self._add(expected, found, sequence)

    def _add(self, expected: Logits, found: Logits, sequence: int) -> None:
        for block in _blocks(*expected.shape):
            a, b = expected[block].astype(np.float64), found[block].astype(np.float64)
            self._difference += float(np.square(a - b).sum())
            self._power += float(np.square(a).sum())
            self._compare_top(a.argmax(axis=1), b.argmax(axis=1), sequence, block.start)
            log_p, log_q = log_softmax(a), log_softmax(b)
            self._kl.append(kl_divergence(log_p, log_q))

    @property
    def kl(self) -> npt.NDArray[np.float64]:
        return np.concatenate(self._kl) if self._kl else np.empty(0)

    @property
    def positions(self) -> int:
        return sum(map(len, self._kl))

    @property
    def nmse(self) -> float:
        return self._difference / self._power if self._power else float("nan")

    @property
    def top1_agreement(self) -> float:
        return self.agreeing / self.positions

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def p99_kl(self) -> float:
        return float(np.percentile(self.kl, 99))

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.nmse) and np.isfinite(self.kl).all())

    def _compare_top(
        self, expected: npt.NDArray[np.int64], found: npt.NDArray[np.int64], sequence: int, start: int
    ) -> None:
        differing = np.flatnonzero(expected != found)
        self.agreeing += len(expected) - len(differing)
        if len(differing) and self.first_disagreement is None:
            at = int(differing[0])
            self.first_disagreement = Disagreement(sequence, start + at, int(expected[at]), int(found[at]))


def mean_kl(expected: Logits, found: Logits) -> float:
    comparison = LogitComparison()
    comparison.add(expected, found)
    return comparison.mean_kl


def probability(logits: Logits, token: int) -> float:
    """Of one token, from the logits [vocabulary] of one position."""
    return float(np.exp(log_softmax(logits[None].astype(np.float64))[0, token]))


def load_logits(path: Path) -> Logits:
    """Logits [positions, vocabulary] that the child wrote, mapped."""
    logits: Logits = np.load(path, mmap_mode="r")
    return logits


def _blocks(positions: int, vocabulary: int) -> Iterable[slice]:
    step = max(1, _BLOCK_LOGITS // vocabulary)
    return (slice(start, start + step) for start in range(0, positions, step))


def kl_divergence(log_p: Floats, log_q: Floats) -> npt.NDArray[np.float64]:
    """Of every position (nats), from log-probabilities [positions, vocabulary], the reference's first."""
    kl: npt.NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1, dtype=np.float64)
    return kl


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities [positions, vocabulary] in the logits' own precision."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    normalized: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalized
