"""The base with its adapters: any rows of any tensor as float32, nothing of it held in memory.

With several adapters a tensor is W + sum of weight_i * (W_i - W), W_i being what adapter i alone makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.architecture import EMBEDDING, OUTPUT, Architecture
from export.lora import LoraAdapter
from export.tensor_change import RowReader, Rows, TensorChange
from export.weights import BaseWeights, FloatRows
from pipeline.errors import MedcotError

_RESIZABLE = frozenset((EMBEDDING, OUTPUT))


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter's folder, and how much of its change is taken."""

    folder: Path
    weight: float = 1.0


@dataclass(frozen=True)
class _Applied:
    change: TensorChange
    weight: float


class MergedWeights:
    """``base`` changed by ``adapters``; ``architecture`` is the base's. Raises MedcotError where they do not fit."""

    def __init__(self, base: BaseWeights, adapters: Sequence[WeightedAdapter], architecture: Architecture) -> None:
        self._base = base
        self._base_is_tied = architecture.tied
        self.adapters = [(LoraAdapter(adapter.folder), adapter.weight) for adapter in adapters]
        self._shapes = {tensor.source: tensor.shape for tensor in architecture.tensors() if tensor.source}
        self._shapes.setdefault(OUTPUT, self._shapes[EMBEDDING])
        for adapter, _ in self.adapters:
            adapter.check_fits(self._shapes, _RESIZABLE)
        tied = architecture.tied and all(_is_same_for_both(adapter) for adapter, _ in self.adapters)
        self._changes = self._collect(without=OUTPUT if tied else None)
        self.architecture = architecture.resized(self._row_count(EMBEDDING), tied)
        if not tied and self._row_count(OUTPUT) != self.architecture.vocabulary:
            raise MedcotError(
                f"The adapter has {self.architecture.vocabulary} rows for the tokens' embeddings and "
                f"{self._row_count(OUTPUT)} for the output: save it with save_embedding_layers=True, or train it "
                "with both embed_tokens and lm_head in modules_to_save."
            )

    @property
    def changed(self) -> int:
        """How many tensors the adapters change."""
        return len(self._changes)

    def base_source(self, name: str) -> str:
        """The tensor of the base that a merged tensor is made from."""
        return EMBEDDING if name == OUTPUT and self._base_is_tied else name

    def rows(self, name: str, rows: Rows, plain: FloatRows | None = None) -> FloatRows:
        """The chosen rows of the merged tensor, float32 [n, columns]; ``plain`` are the base's where already read."""

        def base(chosen: Rows) -> FloatRows:
            return plain if plain is not None and chosen is rows else self._base_rows(name, chosen)

        applied = self._changes.get(name, [])
        count = self._row_count(name)
        if len(applied) == 1 and applied[0].weight == 1.0 and not applied[0].change.is_plain:
            return applied[0].change.rows(rows, base, count)
        values = start = base(rows)
        for one in applied:
            difference = _weighted_difference(one, rows, start, base, count)
            values = np.add(values, difference, out=difference)
        return values

    def _base_rows(self, name: str, rows: Rows) -> FloatRows:
        if name == OUTPUT and self._base_is_tied:
            for one in self._changes.get(EMBEDDING, []):
                if one.change.underlying is not None:
                    return one.change.underlying.rows(rows)
        return self._base.rows(self.base_source(name), rows)

    def _collect(self, without: str | None) -> dict[str, list[_Applied]]:
        changes: dict[str, list[_Applied]] = {}
        for adapter, weight in self.adapters:
            for name, change in adapter.changes.items():
                if name != without:
                    changes.setdefault(name, []).append(_Applied(change, weight))
        for name, applied in changes.items():
            count = self._shapes[name][0]
            resized = any(one.change.start is not None and one.change.start.shape[0] != count for one in applied)
            if resized and (len(applied) > 1 or applied[0].weight != 1.0):
                raise MedcotError(
                    f"An adapter gives {name} another number of rows than the base's {count}: it must be the only "
                    "one that changes this tensor, with weight 1."
                )
        return changes

    def _row_count(self, name: str) -> int:
        starts = [one.change.start for one in self._changes.get(name, [])]
        if name == OUTPUT and self._base_is_tied:
            starts += [one.change.underlying for one in self._changes.get(EMBEDDING, [])]
        return next((start.shape[0] for start in starts if start is not None), self._shapes[name][0])


def _weighted_difference(one: _Applied, rows: Rows, start: FloatRows, base: RowReader, count: int) -> FloatRows:
    if one.change.is_plain and one.change.low_rank is not None:
        difference = one.change.low_rank.rows(rows)
    else:
        difference = one.change.rows(rows, base, count) - start
    if one.weight != 1.0:
        difference *= one.weight
    return difference


def _is_same_for_both(adapter: LoraAdapter) -> bool:
    """Whether tied embeddings stay tied: the adapter makes the same of the input's and the output's matrix.

    Rows of single tokens that are trained in the input are the output's too in peft.
    """
    embedding, output = adapter.changes.get(EMBEDDING), adapter.changes.get(OUTPUT)
    if embedding is None or output is None:
        return output is None and (embedding is None or not (embedding.replacement or embedding.low_rank))
    return embedding.equals(output)


def parse_adapter(text: str) -> WeightedAdapter:
    """``DIR`` or ``DIR=WEIGHT``; a folder whose name ends in such a weight is taken as a folder."""
    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return WeightedAdapter(Path(text))
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise MedcotError(f"--adapter {text}: the weight {weight!r} is no number; write DIR=WEIGHT, for example a=0.5.")
    return WeightedAdapter(Path(folder), value)
