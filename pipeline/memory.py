"""Memory of this process: how it is kept, and its peak with that of the children it has waited for."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation instead of giving it back to the system.

    Where arrays of a megabyte come and go, most of the time went into the system's zeroing of the same pages again and
    again. The peak does not grow by it. Elsewhere than on glibc nothing happens.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
            mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def peak_memory_bytes() -> int:
    """Largest resident set so far, in bytes: this process or its largest finished child, whichever is larger.

    On Linux VmHWM is read, because ``ru_maxrss`` also remembers the process image that was replaced by exec.
    """
    own = _status_value("VmHWM") or _maxrss(resource.RUSAGE_SELF)
    return max(own, _maxrss(resource.RUSAGE_CHILDREN))


def _status_value(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _maxrss(who: int) -> int:
    value = resource.getrusage(who).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024
