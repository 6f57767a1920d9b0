"""One process at a time; the lock goes with the process, however it ends."""

from __future__ import annotations

import errno
import fcntl
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
