"""The speed of this machine's memory, measured: what bounds generation, which reads all weights for every token.

A streaming read with as many threads as the model gets (the sum kernel of STREAM's family, McCalpin 1995).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import psutil

from pipeline.hardware import GIBIBYTE
from pipeline.results import MemoryBandwidth

# Many times the last-level cache of a server processor; a quarter of what is free where that is less.
_ARRAY_BYTES = GIBIBYTE
_REPEATS = 5
_BLOCK_BYTES = 1 << 20  # of one call: long against the call itself (1 microsecond)


def measure_bandwidth(threads: int) -> MemoryBandwidth:
    size = int(min(_ARRAY_BYTES, psutil.virtual_memory().available // 4)) // (threads * _BLOCK_BYTES)
    array = np.ones((threads, max(1, size), _BLOCK_BYTES // 8), dtype=np.int64)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_read, array))
        rates = []
        for _ in range(_REPEATS):
            started = time.perf_counter()
            list(pool.map(_read, array))
            rates.append(array.nbytes / (time.perf_counter() - started))
    return MemoryBandwidth(threads=threads, array_bytes=array.nbytes, bytes_per_second=rates)


def _read(blocks: npt.NDArray[np.int64]) -> None:
    for block in blocks:
        np.max(block)  # one vector instruction a load; numpy lets other threads run meanwhile
