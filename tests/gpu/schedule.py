"""Runs parts, each in a process of its own and within its time.

Those whose figures need a quiet GPU run alone; the others together, as many as its memory holds, next to what has to be
prepared for the former. When the time does not suffice for all, the least important are left out, and it is said.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from part import Request, last_line
from part_list import Part, least_seconds, missing_for, most_important

from bench.gpu_results import PartResult, outcome

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_TO_END = 5.0  # seconds, to write the document
_POLL = 0.1
_PREPARATION_SECONDS = 330.0
_REHEARSED_AT_ONCE = 2
_REHEARSAL_PATIENCE = 5.0  # times the seconds: a CPU that others use too


@dataclass(frozen=True)
class Setting:
    """Where and how the parts run; ``gpu_bytes`` is the GPU's memory, None where there is no GPU or it is not known.

    ``source`` and ``built`` are llama-cpp-python's source distribution and the folder of its CUDA build.
    """

    work: Path
    out: Path
    seconds: float
    rehearse: bool = False
    source: Path | None = None
    built: Path | None = None
    gpu_bytes: int | None = None


@dataclass
class Running:
    """A part's process, or what it prepares."""

    process: subprocess.Popen[str]
    deadline: float
    log: Path
    result: Path | None = None
    timed_out: bool = False

    def over(self) -> bool:
        if self.process.poll() is not None:
            self.end()  # what it has started and left
            return True
        if time.monotonic() < self.deadline:
            return False
        self.timed_out = True
        self.end()
        return True

    def end(self) -> None:
        """With all that it has started, in whatever process group: a build has one of its own."""
        while members := [pid for pid in psutil.pids() if _session_of(pid) == self.process.pid]:
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(_POLL)
        self.process.wait()


def _session_of(pid: int) -> int | None:
    """None for a process that is gone or waits for its parent to ask for its status."""
    try:
        return None if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE else os.getsid(pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


class Suite:
    """Runs ``parts`` for at most ``setting.seconds``; ``told`` gets all results whenever one more is there."""

    def __init__(self, parts: Sequence[Part], setting: Setting, told: Callable[[list[PartResult]], None]) -> None:
        self._parts, self._setting, self._told = parts, setting, told
        self._patience = _REHEARSAL_PATIENCE if setting.rehearse else 1.0
        self._deadline = time.monotonic() + setting.seconds * self._patience - _TO_END
        self._results: dict[str, PartResult] = {}
        self._preparing: dict[str, Running] = {}

    def run(self) -> list[PartResult]:
        try:
            return self._run()
        finally:
            for running in self._preparing.values():
                if running.process.returncode is None:
                    running.end()

    def _run(self) -> list[PartResult]:
        runnable = []
        for part in self._parts:
            missing = missing_for(part, self._setting.rehearse)
            if missing:
                self._add(skipped(part, f"not installed: {', '.join(missing)}"))
            else:
                runnable.append(part)
        runnable = self._without_the_least_important(runnable)
        for part in runnable:
            if part.prepares:
                seconds = min(_PREPARATION_SECONDS * self._patience, self._left())
                self._preparing[part.name] = self._start(part, seconds, prepare=True)
        together = [part for part in runnable if not part.alone]
        alone = [part for part in runnable if part.alone]
        # What comes later must get its turn.
        self._run_together(together, reserve=sum(part.least for part in alone))
        while alone:
            alone = self._without_the_least_important(alone)
            if not alone:
                break
            part, *alone = alone
            reserve = sum(later.least for later in alone)
            self._wait_for_preparation(part, reserve)
            self._run_together([part], reserve)
        return self._sorted()

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _without_the_least_important(self, parts: Sequence[Part]) -> list[Part]:
        left, gpu_bytes = self._left(), self._setting.gpu_bytes
        chosen = most_important(parts, left, gpu_bytes)
        for part in parts:
            if part not in chosen:
                others = least_seconds(chosen, gpu_bytes)
                beside = f" next to the {others:.0f} s of other parts" if chosen else ""
                self._add(skipped(part, f"{too_little(part, left)}{beside}; --only {part.name} runs it by itself"))
        return [part for part in parts if part in chosen]

    def _run_together(self, parts: Sequence[Part], reserve: float) -> None:
        waiting, running = list(parts), dict[Part, Running]()
        while waiting or running:
            while waiting and self._has_room(waiting[0], running):
                part = waiting.pop(0)
                seconds = min(part.seconds * self._patience, self._left() - reserve)
                if seconds < part.least:
                    self._add(skipped(part, too_little(part, seconds)))
                else:
                    running[part] = self._start(part, seconds)
            for part, its in list(running.items()):
                if its.over():
                    self._add(found(part, its))
                    del running[part]
            time.sleep(_POLL)

    def _has_room(self, part: Part, running: Iterable[Part]) -> bool:
        others = list(running)
        if not others:
            return True
        if self._setting.rehearse:
            return len(others) < _REHEARSED_AT_ONCE
        taken = sum(each.gpu_gb for each in [*others, part]) * 1e9
        return self._setting.gpu_bytes is None or taken <= self._setting.gpu_bytes

    def _wait_for_preparation(self, part: Part, reserve: float) -> None:
        preparation = self._preparing.get(part.name)
        if preparation is None:
            return
        preparation.deadline = min(preparation.deadline, self._deadline - reserve - part.least)
        while not preparation.over():
            time.sleep(_POLL)

    def _start(self, part: Part, seconds: float, prepare: bool = False) -> Running:
        name = f"{part.name}-prepare" if prepare else part.name
        folder = self._setting.work / "parts" / name
        folder.mkdir(parents=True)
        result, log = folder / "result.json", folder / "log.txt"
        request = Request(
            part=part.name,
            title=part.title,
            work=self._setting.work,
            out=self._setting.out,
            result=result,
            seconds=seconds,
            rehearse=self._setting.rehearse,
            prepare=prepare,
            source=self._setting.source,
            built=self._setting.built,
        )
        paths = [str(ROOT), str(HERE), str(ROOT / "tests" / "perf"), os.environ.get("PYTHONPATH", "")]
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", part.module or f"parts.{part.name}"],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                text=True,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # so that all it starts can be ended together
            )
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(request.model_dump_json())
            process.stdin.close()
        print(f"{name}: started, {seconds:.0f} s at most", file=sys.stderr, flush=True)
        return Running(process, time.monotonic() + seconds, log, None if prepare else result)

    def _add(self, result: PartResult) -> None:
        self._results[result.part] = result
        print(f"{result.part}: {outcome(result)}", file=sys.stderr, flush=True)
        self._told(self._sorted())

    def _sorted(self) -> list[PartResult]:
        return [self._results[part.name] for part in self._parts if part.name in self._results]


def found(part: Part, running: Running) -> PartResult:
    """The result that the part has left; where it could not end it itself, with the reason."""
    assert running.result is not None
    try:
        result = PartResult.model_validate_json(running.result.read_bytes())
    except (OSError, ValueError):
        result = PartResult(part=part.name, title=part.title, status="unfinished")
    if result.status != "unfinished":
        return result
    if running.timed_out:
        failed = next((check for check in result.checks if not check.passed), None)
        if failed is not None:
            return result.model_copy(update={"status": "failed", "reason": f"{failed.name}: {failed.detail}"})
        return result.model_copy(update={"reason": "its time was up"})
    status = running.process.returncode
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return result.model_copy(update={"status": "failed", "reason": f"its process {how}: {last_line(running.log)}"})


def too_little(part: Part, seconds: float) -> str:
    return f"{max(0, seconds):.0f} s were left, and it needs {part.least:.0f}"


def skipped(part: Part, reason: str) -> PartResult:
    return PartResult(part=part.name, title=part.title, status="skipped", reason=reason)
