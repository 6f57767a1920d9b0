"""Peak memory of this process and of the children it has waited for."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


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
