"""How medcot's processes behave: children end with their parent, libraries keep quiet."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent() -> None:
    """Called in a child: when its parent is killed, so is it. An orphan would go on writing into a run's folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def quiet_libraries() -> None:
    """Called first in a process: keep what libraries say about themselves out of a user's log."""
    # bitsandbytes regrets at import that an optional kernel package is absent; nothing is lost without it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars would fill a log file with half lines
