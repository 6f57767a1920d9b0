"""A pseudo terminal with a program in it: what a user types and what is on the screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Screen:
    """The other end of a child's terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.text = ""

    def type(self, line: str, end: str = "\n") -> None:
        os.write(self._descriptor, (line + end).encode())

    def shows(self, wanted: str, seconds: float) -> bool:
        """Read until ``wanted`` has been printed; False when that takes longer."""
        deadline = time.monotonic() + seconds
        while wanted not in self.text:
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return False
            self.text += os.read(self._descriptor, 65536).decode(errors="replace")
        return True

    def interrupt_shows(self, wanted: str) -> bool:
        """Press Ctrl-C; whether ``wanted`` was printed soon after."""
        self.type("\x03", end="")
        return self.shows(wanted, seconds=2)

    def wait_for(self, wanted: str) -> str:
        """Return, and take off the screen, all up to the end of ``wanted``."""
        assert self.shows(wanted, seconds=20), f"{wanted!r} was not printed, but {self.text[-500:]!r}"
        seen, _, self.text = self.text.partition(wanted)
        return seen + wanted


@contextmanager
def in_terminal(start: Callable[..., subprocess.Popen[bytes]]) -> Iterator[tuple[subprocess.Popen[bytes], Screen]]:
    """A process in a terminal of 80 x 24; ``start`` passes its arguments on to Popen."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = start(start_new_session=True, preexec_fn=_take_terminal, **streams)
    os.close(theirs)
    try:
        yield process, Screen(ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal() -> None:
    """In the child: make its standard input the terminal whose Ctrl-C and Ctrl-\\ reach it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def plain(screen: str) -> str:
    """What was printed, without colors, the keyboard's line editing and the like."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen).replace("\r\n", "\n")
