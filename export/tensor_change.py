"""What one adapter makes of one base tensor: replaced, added to, rescaled; any rows of it, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from export.weights import FloatRows, RowIndices, SafetensorsFile
from pipeline.errors import MedcotError

Rows = RowIndices | slice
Part = TypeVar("Part", "LowRankChange", "Replacement", "TokenRows")
# Reads rows of the unchanged tensor, float32 [n, columns].
RowReader = Callable[[Rows], FloatRows]
_BLOCK_WEIGHTS = 1 << 22  # weights of the tensor read at a time where a whole one must be looked at


@dataclass(frozen=True)
class LowRankChange:
    """``scale * B A`` for one base tensor: A is [r, columns], B is [rows, r]."""

    a: FloatRows
    b: FloatRows
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def rows(self, rows: Rows) -> FloatRows:
        """The chosen rows of the change, float32 [n, columns]."""
        change = self.b[rows] @ self.a
        if self.scale != 1.0:
            change *= np.float32(self.scale)
        return change

    def equals(self, other: LowRankChange | None) -> bool:
        return (
            other is not None
            and self.scale == other.scale
            and np.array_equal(self.a, other.a)
            and np.array_equal(self.b, other.b)
        )


@dataclass(frozen=True)
class Replacement:
    """A whole tensor that the adapter's file holds in place of the base's."""

    file: SafetensorsFile
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        return as_matrix(self.file.tensors[self.name].shape)

    def rows(self, rows: Rows) -> FloatRows:
        values = self.file.rows(self.name, rows)
        if not np.isfinite(values).all():
            raise MedcotError(
                f"{self.file.path}: {self.name} holds NaN or infinite values; the training that made it diverged."
            )
        return values

    def equals(self, other: Replacement | None) -> bool:
        if other is None or self.shape != other.shape:
            return False
        return all(np.array_equal(self.rows(part), other.rows(part)) for part in _blocks(self.shape))


@dataclass(frozen=True)
class Magnitude:
    """DoRA's lengths: of every row, or of every column in an embedding."""

    values: FloatRows
    of_columns: bool


@dataclass(frozen=True)
class TokenRows:
    """Rows trained by themselves: ``values`` [n, columns] replace the rows ``indices``."""

    indices: RowIndices
    values: FloatRows

    def put_into(self, target: FloatRows, rows: RowIndices) -> FloatRows:
        """A copy of ``target``, which are the tensor's ``rows``, with these rows in their places."""
        order = np.argsort(self.indices)
        places = np.minimum(np.searchsorted(self.indices, rows, sorter=order), len(order) - 1)
        trained = self.indices[order[places]] == rows
        result = target.copy()
        result[trained] = self.values[order[places[trained]]]
        return result

    def equals(self, other: TokenRows | None) -> bool:
        return (
            other is not None
            and np.array_equal(self.indices, other.indices)
            and np.array_equal(self.values, other.values)
        )


@dataclass(frozen=True, eq=False)
class TensorChange:
    """The parts apply in this order; every part may be absent.

    ``underlying`` is the unchanged tensor as the adapter's file repeats it: with another number of rows where the
    vocabulary was resized. It stands in for the base's where there is no replacement.
    """

    underlying: Replacement | None = None
    replacement: Replacement | None = None
    low_rank: LowRankChange | None = None
    magnitude: Magnitude | None = None
    tokens: TokenRows | None = None

    @property
    def empty(self) -> bool:
        return not (self.underlying or self.replacement or self.low_rank or self.magnitude or self.tokens)

    @property
    def start(self) -> Replacement | None:
        """What the adapter's file holds to start from instead of the base's tensor."""
        return self.replacement or self.underlying

    @property
    def is_plain(self) -> bool:
        """Whether the change is a sum that does not depend on the base tensor."""
        return self.low_rank is not None and not (self.start or self.magnitude or self.tokens)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes of the tensor that the parts are for; those of a right adapter agree."""
        parts = (self.underlying, self.replacement, self.low_rank)
        return [part.shape for part in parts if part is not None]

    def rows(self, rows: Rows, base: RowReader, count: int) -> FloatRows:
        """The chosen rows of the changed tensor, float32 [n, columns].

        ``base`` reads the unchanged tensor; ``count`` is the number of rows of the changed one.
        """
        values = self._sum(rows, base)
        if self.magnitude is not None:
            if self.magnitude.of_columns:
                values = values * (self.magnitude.values / self._column_norms(base, count))
            else:
                lengths = np.linalg.norm(values, axis=1)
                values = values * (self.magnitude.values[rows] / lengths)[:, None]
        if self.tokens is not None:
            values = self.tokens.put_into(values, np.arange(count)[rows])
        return values

    def equals(self, other: TensorChange | None) -> bool:
        """Whether both make the same of the same tensor. DoRA's are taken as different."""
        if other is None or self.magnitude is not None or other.magnitude is not None:
            return False
        return (
            _same(self.start, other.start) and _same(self.low_rank, other.low_rank) and _same(self.tokens, other.tokens)
        )

    def _sum(self, rows: Rows, base: RowReader) -> FloatRows:
        values = base(rows) if self.start is None else self.start.rows(rows)
        if self.low_rank is None:
            return values
        change = self.low_rank.rows(rows)
        # Into the change, which is nobody else's; the base's rows may go into another file as they are.
        return np.add(values, change, out=change)

    def _column_norms(self, base: RowReader, count: int) -> FloatRows:
        """Length of every column of the sum; it needs one pass over the whole tensor, which is made once."""
        if count not in self._column_norms_of:
            columns = self.shapes[0][1]
            squares = np.zeros(columns, dtype=np.float64)
            for part in _blocks((count, columns)):
                squares += np.square(self._sum(part, base), dtype=np.float64).sum(axis=0)
            self._column_norms_of[count] = np.sqrt(squares).astype(np.float32)
        return self._column_norms_of[count]

    @cached_property
    def _column_norms_of(self) -> dict[int, FloatRows]:
        return {}


def _same(mine: Part | None, theirs: Part | None) -> bool:
    return mine is theirs or (mine is not None and mine.equals(theirs))


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's shape as rows and columns; a vector has one column."""
    return shape[0], math.prod(shape[1:])


def _blocks(shape: tuple[int, int]) -> list[slice]:
    step = max(1, _BLOCK_WEIGHTS // shape[1])
    return [slice(start, start + step) for start in range(0, shape[0], step)]
