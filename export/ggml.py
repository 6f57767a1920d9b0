"""ggml's own quantizers, from the library that llama-cpp-python installs, through ctypes.

Export calls them through ``export.quantizers.quantize``, which takes something faster where it gives the same bytes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from pipeline.errors import MedcotError

# Their bytes are the same with an importance matrix and without (tests/test_importance.py).
IGNORES_IMPORTANCE = frozenset({T.F32, T.F16, T.BF16, T.Q8_0})
_LIBRARY_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


def row_bytes(ggml_type: T, columns: int) -> int:
    """Bytes of one row; ``columns`` must be a multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[ggml_type]
    return columns // block * size


def quantize_rows(
    rows: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32] | None,
    packed: npt.NDArray[np.uint8],
    ggml_type: T,
) -> None:
    """One call of ``ggml_quantize_chunk``: rows [n, columns] into ``packed`` [n, bytes per row], all C-contiguous.

    Nothing is checked; ggml ends the process where a type needs an importance matrix and gets none.
    """
    library().ggml_quantize_chunk(
        int(ggml_type), rows.ctypes.data, packed.ctypes.data, 0, *rows.shape,
        None if importance is None else importance.ctypes.data,
    )  # fmt: skip


def is_valid(packed: npt.NDArray[np.uint8], ggml_type: T) -> bool:
    """Whether no scale is infinite or no number: ``ggml_validate_row_data``, as llama.cpp does when it loads a file."""
    return bool(library().ggml_validate_row_data(int(ggml_type), packed.ctypes.data, packed.nbytes))


def requires_importance(ggml_type: T) -> bool:
    return bool(library().ggml_quantize_requires_imatrix(int(ggml_type)))


@cache
def library_path() -> Path:
    """libggml-base of the llama-cpp-python that is installed; MedcotError where there is none."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise MedcotError("llama-cpp-python is not installed: pip install -r requirements-cpu.txt.")
    return Path(spec.origin).parent / "lib" / _LIBRARY_NAMES.get(sys.platform, "libggml-base.so")


def build() -> str:
    """llama.cpp's commit and the ggml version that llama-cpp-python was built from."""
    ggml = ctypes.CDLL(str(library_path()))
    ggml.ggml_commit.restype = ggml.ggml_version.restype = ctypes.c_char_p
    return f"{ggml.ggml_commit().decode()} (ggml {ggml.ggml_version().decode()})"


@cache
def library() -> ctypes.CDLL:
    """libggml-base; loaded without importing llama_cpp, which would load all of llama.cpp."""
    try:
        loaded = ctypes.CDLL(str(library_path()))
    except OSError as error:
        raise MedcotError(f"ggml's library cannot be loaded ({error}): reinstall llama-cpp-python.") from error
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p,
    ]  # fmt: skip
    loaded.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    loaded.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    loaded.ggml_validate_row_data.restype = ctypes.c_bool
    loaded.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return loaded
