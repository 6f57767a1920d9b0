"""The quantizers' bytes are ggml's: on every kind of row, with every importance, at every length, on any threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings, strategies
from quantizer_rows import Rows, awkward_rows, drawn_rows, edge_rows, importances, model_rows, overflowing_rows

from export import ggml
from export.quantizers.choice import chooser, families
from export.quantizers.quantize import quantize

# All matrices of the model and three times the examples: ten minutes that CI has not (LOG.md has their result).
EXHAUSTIVE = "MEDCOT_EXHAUSTIVE" in os.environ
KERNELS = families()
PLAIN = [ggml_type for ggml_type, kernel in KERNELS.items() if kernel.plain]
GUIDED = [ggml_type for ggml_type, kernel in KERNELS.items() if kernel.guided]
EVERY = [(each, False) for each in PLAIN] + [(each, True) for each in GUIDED]
every_type = pytest.mark.parametrize(
    ("ggml_type", "guided"), EVERY, ids=[f"{each.name}{'-guided' if guided else ''}" for each, guided in EVERY]
)


def columns_of(ggml_type: T) -> list[int]:
    """Row lengths: one block, an odd number of blocks, and more than sixteen lanes hold at a time."""
    block = GGML_QUANT_SIZES[ggml_type][0]
    return [block, 3 * block, 19 * block]


def importances_for(columns: int, guided: bool) -> list[tuple[str, np.ndarray | None]]:
    return list(importances(columns).items()) if guided else [("none", None)]


def by_ggml(rows: Rows, ggml_type: T, importance: np.ndarray | None) -> np.ndarray:
    packed = np.empty((len(rows), ggml.row_bytes(ggml_type, rows.shape[1])), dtype=np.uint8)
    ggml.quantize_rows(rows, importance, packed, ggml_type)
    return packed


def by_kernel(rows: Rows, ggml_type: T, importance: np.ndarray | None) -> np.ndarray:
    """The kernel itself, whatever the self-check thinks of it; the bytes lie between others that it must not touch."""
    size = ggml.row_bytes(ggml_type, rows.shape[1])
    around = np.full((len(rows) + 2, size), 0xA5, dtype=np.uint8)
    kernel, packed = KERNELS[ggml_type], around[1:-1]
    if importance is None:
        assert kernel.plain
        kernel.plain(rows, packed)
    else:
        assert kernel.guided
        kernel.guided(rows, importance, packed)
    assert (around[[0, -1]] == 0xA5).all(), "written outside of the rows"
    return packed


def assert_same(rows: Rows, ggml_type: T, importance: np.ndarray | None, of: str) -> None:
    """Equal bytes; for rows that ggml refuses, they are refused as well."""
    before = rows.copy()
    ours, theirs = by_kernel(rows, ggml_type, importance), by_ggml(rows, ggml_type, importance)
    assert np.array_equal(rows, before), "the rows were changed"
    for row in np.flatnonzero((ours != theirs).any(axis=1)):
        if not ggml.is_valid(theirs[row], ggml_type):
            assert not ggml.is_valid(ours[row], ggml_type), f"{of}: row {row} is refused by ggml only"
            continue
        block, size = GGML_QUANT_SIZES[ggml_type]
        first = int(np.argmax(ours[row] != theirs[row]))
        start = first // size * block
        pytest.fail(
            f"{ggml_type.name} of {of}: row {row}, byte {first % size} of block {first // size} is {ours[row, first]}, "
            f"ggml's {theirs[row, first]}; the block is {rows[row, start : start + block].tolist()}"
        )


@every_type
def test_drawn_rows(ggml_type: T, guided: bool) -> None:
    for columns in columns_of(ggml_type):
        kinds = drawn_rows(columns, count=18).items()
        for (of, rows), (name, importance) in zip(kinds, cycle(importances_for(columns, guided)), strict=False):
            assert_same(rows, ggml_type, importance, f"{of} rows, {columns} columns, importance {name}")


@every_type
def test_edge_rows(ggml_type: T, guided: bool) -> None:
    columns = 2 * GGML_QUANT_SIZES[ggml_type][0]
    kinds = edge_rows(columns)
    every_kind = np.concatenate(list(kinds.values()))
    for name, importance in importances_for(columns, guided):
        assert_same(every_kind, ggml_type, importance, f"edge rows, importance {name}")
        for of, rows in kinds.items():
            assert_same(rows[:1], ggml_type, importance, f"{of}, alone, importance {name}")


@every_type
def test_rows_that_overflow(ggml_type: T, guided: bool) -> None:
    for columns in columns_of(ggml_type)[:2]:
        for name, importance in importances_for(columns, guided):
            assert_same(overflowing_rows(columns), ggml_type, importance, f"overflowing rows, importance {name}")


@every_type
@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 33])
def test_every_number_of_rows(ggml_type: T, guided: bool, count: int) -> None:
    for columns in columns_of(ggml_type)[:2]:
        rows = drawn_rows(columns, count=33)["gaussian"][:count]
        importance = importances(columns)["measured"] if guided else None
        assert_same(rows, ggml_type, importance, f"{count} rows")


@pytest.fixture(scope="module")
def some_model_rows() -> dict[str, Rows]:
    return {name: rows for name, rows in model_rows(most=33) if "embed" in name or ".0." in name}


@every_type
def test_rows_of_a_model(ggml_type: T, guided: bool, some_model_rows: dict[str, Rows]) -> None:
    block = GGML_QUANT_SIZES[ggml_type][0]
    for name, rows in some_model_rows.items():
        some = np.ascontiguousarray(rows[:, : rows.shape[1] // block * block])
        assert_same(some, ggml_type, importances(some.shape[1])["measured"] if guided else None, name)


@every_type
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(ggml_type: T, guided: bool, threads: int) -> None:
    """Blocks of rows that several threads quantize at a time, as export does, through its own interface."""
    columns = columns_of(ggml_type)[1]
    rows = drawn_rows(columns, count=200)["heavy-tailed"]
    importance = importances(columns)["measured"] if guided else None
    blocks = [rows[start : start + 23] for start in range(0, len(rows), 23)]
    with ThreadPoolExecutor(threads) as pool:
        packed = np.concatenate(list(pool.map(lambda block: quantize(block, ggml_type, importance), blocks)))
    assert np.array_equal(packed, by_ggml(rows, ggml_type, importance))
    assert chooser().notes == []


@pytest.mark.broad
@every_type
def test_all_of_a_model(ggml_type: T, guided: bool) -> None:
    """Widths that a type does not allow are cut into rows that it does."""
    block = GGML_QUANT_SIZES[ggml_type][0]
    for name, rows in islice(model_rows(), 0, None, 1 if EXHAUSTIVE else 4):
        columns = rows.shape[1] if rows.shape[1] % block == 0 else block
        whole = rows.reshape(-1)[: rows.size // columns * columns].reshape(-1, columns)
        assert_same(whole, ggml_type, importances(columns)["measured"] if guided else None, name)


@every_type
@settings(max_examples=25, deadline=None)
@given(data=strategies.data())
def test_awkward_rows(ggml_type: T, guided: bool, data: strategies.DataObject) -> None:
    check_awkward_rows(ggml_type, guided, data)


@pytest.mark.broad
@every_type
@settings(max_examples=3000 if EXHAUSTIVE else 1000, deadline=None)
@given(data=strategies.data())
def test_many_awkward_rows(ggml_type: T, guided: bool, data: strategies.DataObject) -> None:
    check_awkward_rows(ggml_type, guided, data)


@pytest.mark.broad
@every_type
@pytest.mark.parametrize("seed", range(8 if EXHAUSTIVE else 3))
def test_many_drawn_rows(ggml_type: T, guided: bool, seed: int) -> None:
    columns = 512
    for of, rows in drawn_rows(columns, count=1024, seed=seed).items():
        for name, importance in importances_for(columns, guided):
            assert_same(rows, ggml_type, importance, f"{of} rows, seed {seed}, importance {name}")


def check_awkward_rows(ggml_type: T, guided: bool, data: strategies.DataObject) -> None:
    columns = GGML_QUANT_SIZES[ggml_type][0]
    row = data.draw(awkward_rows(columns))
    importance = data.draw(strategies.sampled_from(list(importances(columns).values()))) if guided else None
    assert_same(row, ggml_type, importance, "an awkward row")
