"""One process at a time, or one that writes or several that read; the lock goes with the process, however it ends."""

from __future__ import annotations

import errno
import fcntl
from contextlib import suppress
from typing import IO, Any


def try_lock(file: IO[Any] | int) -> bool:
    """Lock an open file or folder until it is closed; False where another process has it locked.

    True also on a file system without locks (some network folders): two processes at once are then the user's to avoid.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def lock(file: IO[Any] | int, *, shared: bool = False) -> None:
    """Wait for the lock and hold it until the file is closed; several may share it, while nobody has it alone."""
    # On a file system without locks nobody waits.
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
