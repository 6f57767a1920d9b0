"""ggml's own quantizers, from the library that llama-cpp-python installs, through ctypes.

The one interface that export knows is ``quantize``; whatever is faster must give the same bytes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from pipeline.errors import MedcotError

# Their bytes are the same with an importance matrix and without (tests/test_importance.py).
IGNORES_IMPORTANCE = frozenset({T.F32, T.F16, T.BF16, T.Q8_0})
_BLOCK_WEIGHTS = 1 << 17  # weights a thread takes at a time: large enough to hide the call, small enough to share out
_LIBRARY_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


def row_bytes(ggml_type: T, columns: int) -> int:
    """Bytes of one row; ``columns`` must be a multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[ggml_type]
    return columns // block * size


def quantize(
    rows: npt.NDArray[np.float32],
    ggml_type: T,
    importance: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.uint8]:
    """Rows [n, columns] in the bytes of a ggml type, [n, bytes per row]; F32, F16 and BF16 included.

    ``importance`` [columns] is the mean square of the activation that each column is multiplied with: the
    quantizers make the error small where it is large (export/importance.py).

    Every row is quantized by itself, so any split into blocks of rows gives the same bytes. Raises
    OverflowError where a value does not fit the type (a weight above 65504 in F16).
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    count, columns = rows.shape
    if columns % GGML_QUANT_SIZES[ggml_type][0]:
        raise ValueError(f"{columns} columns are no whole number of {ggml_type.name} blocks")
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != (columns,):
            raise ValueError(f"importance of shape {importance.shape} for {columns} columns")
    elif library().ggml_quantize_requires_imatrix(int(ggml_type)):
        raise ValueError(f"{ggml_type.name} needs an importance matrix")  # ggml would abort the process
    weights = None if importance is None else importance.ctypes.data
    result = np.empty((count, row_bytes(ggml_type, columns)), dtype=np.uint8)
    step = max(1, _BLOCK_WEIGHTS // columns)

    def block(start: int) -> bool:
        part, out = rows[start : start + step], result[start : start + step]
        library().ggml_quantize_chunk(
            int(ggml_type), part.ctypes.data, out.ctypes.data, 0, part.shape[0], columns, weights
        )
        return bool(library().ggml_validate_row_data(int(ggml_type), out.ctypes.data, out.nbytes))

    starts = range(0, count, step)
    valid = list(_threads().map(block, starts)) if len(starts) > 1 else [block(start) for start in starts]
    if not all(valid):
        raise OverflowError(f"a weight of magnitude {np.abs(rows).max():.3g} does not fit {ggml_type.name}")
    return result


@cache
def _threads() -> ThreadPoolExecutor:
    # ctypes releases the interpreter's lock during a call, so threads are enough.
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(available or 1, thread_name_prefix="quantize")


@cache
def library() -> ctypes.CDLL:
    """libggml-base; loaded without importing llama_cpp, which would load all of llama.cpp."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise MedcotError("llama-cpp-python is not installed: pip install -r requirements-cpu.txt.")
    path = Path(spec.origin).parent / "lib" / _LIBRARY_NAMES.get(sys.platform, "libggml-base.so")
    try:
        loaded = ctypes.CDLL(str(path))
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
