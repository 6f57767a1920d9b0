"""What the hub is told and what it remembers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

WriteStep = Literal["whoami", "create", "validate", "preupload", "batch", "part", "complete", "verify", "commit"]


@dataclass
class Fault:
    """How requests for the content of files whose name ends with ``file`` go wrong, ``times`` times (None: always).

    ``drop_after``: the connection breaks after so many bytes, by a reset where ``reset``, else by a plain end.
    ``status``: the answer is that error. ``api``: a request for the repository's description fails instead.
    ``ignore_ranges``: the whole file comes, whatever part is asked for. ``keep``: the server has only the first so
    many bytes. ``flip``: the byte at this place of the file is wrong. ``from_byte``: only requests from there on fail.
    """

    file: str = ""
    times: int | None = None
    drop_after: int | None = None
    reset: bool = False
    status: int | None = None
    api: bool = False
    ignore_ranges: bool = False
    keep: int | None = None
    flip: int | None = None
    from_byte: int = 0


@dataclass
class WriteFault:
    """How a step of an upload goes wrong, ``times`` times (None: always).

    ``before`` is called first. ``status`` with ``message`` and ``retry_after`` (seconds) is the answer instead of the
    step. ``drop_after``: the connection is reset after so many bytes of the content, when ``then`` has returned.
    ``lost``: the step is done, and the connection breaks instead of the answer.
    """

    step: WriteStep
    times: int | None = 1
    before: Callable[[], None] | None = None
    status: int | None = None
    message: str = ""
    retry_after: int | None = None
    drop_after: int | None = None
    then: Callable[[], None] | None = None
    lost: bool = False


@dataclass(frozen=True)
class Account:
    """Whose token it is, and what it allows; a fine-grained one is told to write by ``writes`` alone."""

    name: str
    organizations: tuple[str, ...] = ()
    role: Literal["read", "write", "fineGrained"] = "write"
    writes: bool = True

    def owns(self, repository: str) -> bool:
        return repository.partition("/")[0] in (self.name, *self.organizations)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    host: str
    byte_range: str | None
    token: str | None


@dataclass(frozen=True)
class Commit:
    repository: str
    summary: str
    files: frozenset[str]  # all paths after it


@dataclass(frozen=True)
class Repository:
    folder: Path
    commit: str
    private: bool
    gated: bool

    def files(self) -> dict[str, Path]:
        return {
            path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*")) if path.is_file()
        }
