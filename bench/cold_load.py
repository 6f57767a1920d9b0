"""Loading a file that is not in memory yet: it is dropped from the page cache first."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ColdLoad:
    """``seconds`` None where the page cache cannot be asked; ``note`` says what there is to know."""

    seconds: float | None
    note: str | None


def cold_load(path: Path, load_and_close: Callable[[], object]) -> ColdLoad:
    """Time ``load_and_close`` of one file with none of it in memory, as after the computer was started."""
    if not hasattr(os, "posix_fadvise"):
        return ColdLoad(None, "this system cannot drop a file from its page cache (no posix_fadvise)")
    try:
        _drop_from_page_cache(path)
    except OSError as error:
        return ColdLoad(None, f"the file cannot be dropped from the page cache ({error.strerror})")
    read_before = _bytes_read_from_disk()
    started = time.perf_counter()
    load_and_close()
    seconds = time.perf_counter() - started
    read = _bytes_read_from_disk()
    size = path.stat().st_size
    if read_before is not None and read is not None and read - read_before < size / 2:
        share = (read - read_before) / size
        return ColdLoad(
            seconds,
            f"not quite cold: {share:.0%} of the file came from the disk, the rest was still in memory "
            "(another program has it open, or the disk's own cache)",
        )
    return ColdLoad(seconds, None)


def _drop_from_page_cache(path: Path) -> None:
    """Only pages that are on the disk can be dropped, so they are written there first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _bytes_read_from_disk() -> int | None:
    """By this process so far, read-ahead included; None where the kernel does not count."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)
