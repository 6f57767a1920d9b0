"""One part of tests/gpu/run.sh, in a process of its own: a JSON request comes in, the result's file grows with it.

What was measured stays when the part breaks, or is killed because its time is up.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from bench.gpu_results import Figure, PartResult, Status
from pipeline.artifacts import write_text
from pipeline.errors import MedcotError
from pipeline.processes import end_with_parent, quiet_libraries, with_our_packages
from pipeline.results import Check


class Request(BaseModel):
    """``work`` is a folder that all parts share, ``out`` what is taken home from the machine, ``result`` the file to
    write, ``seconds`` the time there is.

    With ``prepare`` only what takes long and needs no quiet machine is done, and kept in ``work``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    part: str
    title: str
    work: Path
    out: Path
    result: Path
    seconds: float
    rehearse: bool
    prepare: bool = False
    source: Path | None = None  # llama-cpp-python's source distribution, for a CUDA build
    built: Path | None = None  # folder of a CUDA build: an earlier call's, or where this one puts it


class Skipped(Exception):
    """What the part needs is not here; the message says what."""


class Recorder:
    """Collects a part's checks and figures; each one is in its file at once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._started = time.monotonic()
        self._checks: list[Check] = []
        self._figures: list[Figure] = []
        self._save("unfinished", None)

    def check(self, name: str, passed: bool, detail: str) -> None:
        self._checks.append(Check(name=name, passed=passed, detail=detail))
        self._save("unfinished", None)

    def figure(self, name: str, value: float, unit: str = "") -> None:
        """A later value of the same name takes the place of an earlier one."""
        self._figures = [each for each in self._figures if each.name != name]
        self._figures.append(Figure(name=name, value=value, unit=unit))
        self._save("unfinished", None)

    def seconds_left(self) -> float:
        return self.request.seconds - (time.monotonic() - self._started)

    def end(self, status: Status | None = None, reason: str | None = None) -> None:
        """Without a status it follows from the checks."""
        failed = next((check for check in self._checks if not check.passed), None)
        if failed is not None:
            self._save("failed", reason or f"{failed.name}: {failed.detail}")
        elif status is None and not self._checks:
            self._save("failed", "nothing was checked")
        else:
            self._save(status or "passed", reason)

    def _save(self, status: Status, reason: str | None) -> None:
        result = PartResult(
            part=self.request.part,
            title=self.request.title,
            status=status,
            reason=reason,
            seconds=round(time.monotonic() - self._started, 1),
            checks=tuple(self._checks),
            figures=tuple(self._figures),
        )
        write_text(self.request.result, result.model_dump_json(indent=2) + "\n")


def perform(measure: Callable[[Recorder], None], prepare: Callable[[Request], None] | None = None) -> None:
    """A part's main program: exit status 0 unless the part itself broke."""
    end_with_parent()
    quiet_libraries()
    os.environ["MEDCOT_DEBUG"] = "1"  # what goes wrong here is for whoever develops it
    request = Request.model_validate_json(sys.stdin.read())
    if request.prepare:
        if prepare is not None:
            prepare(request)
        return
    recorder = Recorder(request)
    try:
        measure(recorder)
    except Skipped as why:
        recorder.end("skipped", str(why))
    except Exception as error:
        traceback.print_exc()
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        recorder.end("failed", told if isinstance(error, MedcotError) else f"{type(error).__name__}: {told}")
        sys.exit(1)
    else:
        recorder.end()


def medcot(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *arguments]


def settings(overrides: Mapping[str, object]) -> list[str]:
    """``--set`` for each."""
    return [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]


def run(command: Sequence[str]) -> int:
    """Run a command of ours in the open; its messages go to the part's log. The exit status."""
    return subprocess.run(command, env=with_our_packages(), stdin=subprocess.DEVNULL, check=False).returncode


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(
            command, env=with_our_packages(), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )


def last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return " ".join(lines[-1].split())[:300]
    return "no message"
