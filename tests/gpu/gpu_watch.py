"""How much of the GPU's memory is taken, and how busy it is, once a second for as long as the suite runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Self

from pipeline.platforms import nvidia_smi

NAME = "nvidia-smi.csv"
_HEADER = "unix_time,memory_used_mib,gpu_percent,sm_mhz,watts\n"
_FIELDS = "memory.used,utilization.gpu,clocks.sm,power.draw"
_SECONDS = 1.0


class GpuWatch:
    """Writes ``folder/nvidia-smi.csv`` while the block runs; without a driver nothing but its header."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._path.write_text(_HEADER)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            answer = nvidia_smi("-i", "0", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
            if answer is None:
                return
            with self._path.open("a") as stream:
                stream.write(f"{time.time():.3f},{','.join(answer.replace(' ', '').strip().split(','))}\n")
            self._over.wait(_SECONDS)


def memory_used(folder: Path, begin: float, end: float) -> int | None:
    """The most of the GPU's memory (bytes) that was taken between two times (seconds since 1970), over all processes,
    beyond what was taken when the suite began; None where it was not watched."""
    path = folder / NAME
    if not path.is_file():
        return None
    samples = [line.split(",")[:2] for line in path.read_text().splitlines()[1:]]
    seen = [(float(when), int(mebibytes) * 2**20) for when, mebibytes in samples]
    within = [used for when, used in seen if begin <= when <= end]
    return max(within) - seen[0][1] if within else None
