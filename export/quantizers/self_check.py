"""Whether a kernel gives ggml's bytes on this machine: another CPU or another build of ggml may round differently.

Each type is held to ggml once, with and without an importance matrix, on some thousand blocks; the verdict is kept
in the cache folder for as long as CPU, compiler, ggml and the kernels' source stay the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from export import ggml
from export.quantizers.kernel import Importance, Packed, Rows
from pipeline.artifacts import package_versions, sha256_file, sha256_json, write_json
from pipeline.cache import cache_dir

Pack = Callable[[Rows, Importance | None, Packed], None]
_COLUMNS, _DRAWN_ROWS = 1024, 224


class Verdicts:
    """What the self-check found on this machine: None for "the same bytes", else a text that says what differs."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or machine_folder()

    def known(self, name: str) -> bool:
        return self._path(name).is_file()

    def of(self, name: str, check: Callable[[], str | None]) -> str | None:
        """The verdict called ``name``; ``check`` gives it where none is kept."""
        path = self._path(name)
        try:
            verdict: str | None = json.loads(path.read_text(encoding="utf-8"))["difference"]
            return verdict
        except (OSError, ValueError, KeyError):
            verdict = check()
        # A cache that cannot be written costs the check in every process, and nothing else.
        with suppress(OSError):
            write_json(path, {"difference": verdict})
        return verdict

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def machine_folder() -> Path:
    """In the cache folder, what belongs to this CPU, compiler, ggml and source: compiled kernels and verdicts.

    Raises ImportError where numba is not installed.
    """
    from numba.core.registry import cpu_target

    sources = sorted(Path(__file__).parent.glob("*.py"))
    machine = {
        # Target, CPU and its features: what numba compiles for, and keys its own cache with.
        "cpu": cpu_target.target_context.codegen().magic_tuple(),
        "versions": package_versions(("numba", "llvmlite", "numpy", "llama-cpp-python")),
        # The same version may have been compiled on the spot, with other instructions.
        "ggml": sha256_file(ggml.library_path()),
        "sources": {path.name: sha256_file(path) for path in sources},
    }
    return cache_dir() / "quantizers" / sha256_json(machine)[:16]


def load(ggml_type: T, pack: Pack, *, guided: bool) -> None:
    """Compile ``pack`` or load it from numba's cache; whatever is wrong with it is raised here and not in a thread."""
    rows = np.zeros((1, 256), dtype=np.float32)  # a whole number of blocks of any type
    packed = np.empty((1, ggml.row_bytes(ggml_type, 256)), dtype=np.uint8)
    pack(rows, np.ones(256, dtype=np.float32) if guided else None, packed)


def difference(ggml_type: T, pack: Pack, *, guided: bool) -> str | None:
    """Where ``pack`` and ggml give other bytes for the rows of the check, or None."""
    rows = _rows()
    importance = _importance() if guided else None
    shape = (len(rows), ggml.row_bytes(ggml_type, _COLUMNS))
    ours, theirs = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.uint8)
    pack(rows, importance, ours)
    ggml.quantize_rows(rows, importance, theirs, ggml_type)
    per_block = GGML_QUANT_SIZES[ggml_type][1]
    differing = np.any((ours != theirs).reshape(-1, per_block), axis=1)
    if not differing.any():
        return None
    return f"{np.count_nonzero(differing)} of {differing.size} blocks differ, first block {int(differing.argmax())}"


def _rows() -> npt.NDArray[np.float32]:
    """Weights as models have them, rows with outliers, and what quantizers have special cases for."""
    random = np.random.default_rng(0)
    gaussian = random.normal(scale=0.02, size=(_DRAWN_ROWS, _COLUMNS))
    heavy_tailed = 0.01 * random.standard_t(2, size=(_DRAWN_ROWS // 2, _COLUMNS))
    column = np.arange(_COLUMNS)
    edges = [
        np.zeros(_COLUMNS),
        np.full(_COLUMNS, -0.0),
        np.full(_COLUMNS, 0.75),
        np.full(_COLUMNS, -0.75),
        np.where(column % 32 == 5, -3.0, 0.0),
        np.where(column == 300, 1000.0, gaussian[0]),
        np.where(column % 2 == 0, 1.0, -1.0),
        column % 16 - 8.0,  # ties between levels
        (column % 31) / 2,
        -np.abs(gaussian[1]),
        np.abs(gaussian[2]),
        gaussian[3] * 1e-30,  # scales below the smallest half-precision number
        gaussian[4] * 1e-5,  # scales that are subnormal in half precision
        np.full(_COLUMNS, 1e-42),
        gaussian[5] * 1e5,
        np.where(column < 512, gaussian[6], 0.0),
    ]
    return np.concatenate([gaussian, heavy_tailed, np.stack(edges)]).astype(np.float32)


def _importance() -> npt.NDArray[np.float32]:
    """Mean squares of many sizes, and columns that no activation reached."""
    random = np.random.default_rng(1)
    drawn = np.exp(random.normal(scale=3.0, size=_COLUMNS))
    drawn[64:96] = 0
    drawn[::17] = 0
    return drawn.astype(np.float32)
