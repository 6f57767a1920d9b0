"""A CUDA build of llama-cpp-python from its source distribution, in a folder of its own; nothing is fetched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from part import Request, last_line
from pydantic import BaseModel, ConfigDict

from pipeline.artifacts import write_text

_OUTCOME = "llama-build.json"


class BuildOutcome(BaseModel):
    """``reason`` is why there is no build; ``seconds`` what it took, None where an earlier call has built it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    reason: str | None = None
    seconds: float | None = None


def built_folder(request: Request) -> Path:
    return request.built or request.work / "llama-cuda"


def saved_outcome(request: Request) -> BuildOutcome:
    try:
        return BuildOutcome.model_validate_json((request.work / _OUTCOME).read_bytes())
    except FileNotFoundError:
        return BuildOutcome(reason="its preparation was not finished, see the log")


def save_outcome(request: Request, outcome: BuildOutcome) -> None:
    write_text(request.work / _OUTCOME, outcome.model_dump_json() + "\n")


def put_on_path(request: Request) -> None:
    """For this process's children."""
    paths = [str(built_folder(request)), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def why_not(source: Path | None) -> str | None:
    """What is missing for a build, or None."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc"
    if source is None:
        return "no source distribution of llama-cpp-python was given (--llama-source)"
    return None if source.is_file() else f"{source} is no file"


class Build:
    """Under way from the start; ``target`` is there, to be put on PYTHONPATH, when it has succeeded."""

    def __init__(self, source: Path, target: Path, capability: str | None, *, alone: bool = False) -> None:
        """``capability`` is the GPU's ("9.0"): for one architecture only it takes minutes.

        FlashAttention's kernels, half of the work, are left out: nothing here asks for them. Unless it is ``alone``,
        a third of the cores is left to what is measured meanwhile.
        """
        self._target = target
        self._partial = target.with_name(f"{target.name}.partial")
        self._log = target.with_name("llama-build.log")
        self._started = time.monotonic()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._partial, ignore_errors=True)
        arguments = ["-DGGML_CUDA=ON", "-DGGML_CUDA_FA=OFF", "-DLLAVA_BUILD=OFF", "-DLLAMA_CURL=OFF"]
        if capability is not None:
            arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={capability.replace('.', '')}")
        cores = os.cpu_count() or 1
        jobs = cores if alone else max(1, cores * 2 // 3)
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
        command += ["--no-cache-dir", "--no-compile", "--target", str(self._partial), str(source)]
        with self._log.open("wb") as stream:
            self._process = subprocess.Popen(
                ["nice", "-n", "19", *command],
                env={**os.environ, "CMAKE_ARGS": " ".join(arguments), "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)},
                stdout=stream,
                stderr=stream,
            )

    def wait(self) -> BuildOutcome:
        if self._process.wait() != 0:
            return BuildOutcome(reason=last_line(self._log))
        self._partial.rename(self._target)
        return BuildOutcome(seconds=round(time.monotonic() - self._started, 1))
