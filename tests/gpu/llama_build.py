"""A CUDA build of llama-cpp-python from its source distribution, in a folder of its own; nothing is fetched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from part import last_line


def why_not(source: Path | None) -> str | None:
    """What is missing for a build, or None."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc"
    if source is None:
        return "no source distribution of llama-cpp-python was given (--llama-source)"
    return None if source.is_file() else f"{source} is no file"


class Build:
    """Under way from the start; ``target`` is there, to be put on PYTHONPATH, when it has come to a good end."""

    def __init__(self, source: Path, target: Path, capability: str | None) -> None:
        """``capability`` is the GPU's ("9.0"): for one architecture alone it takes minutes.

        FlashAttention's kernels, half of the work, are left out: nothing here asks for them. The build has low priority
        and a third of the cores is left to what is measured meanwhile.
        """
        self._target = target
        self._partial = target.with_name(f"{target.name}.partial")
        self._log = target.with_name("llama-build.log")
        shutil.rmtree(self._partial, ignore_errors=True)
        arguments = ["-DGGML_CUDA=ON", "-DGGML_CUDA_FA=OFF", "-DLLAVA_BUILD=OFF", "-DLLAMA_CURL=OFF"]
        if capability is not None:
            arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={capability.replace('.', '')}")
        jobs = max(1, (os.cpu_count() or 1) * 2 // 3)
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
        command += ["--no-cache-dir", "--no-compile", "--target", str(self._partial), str(source)]
        with self._log.open("wb") as stream:
            self._process = subprocess.Popen(
                ["nice", "-n", "19", *command],
                env={**os.environ, "CMAKE_ARGS": " ".join(arguments), "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)},
                stdout=stream,
                stderr=stream,
            )

    def wait(self) -> str | None:
        """None when it is done, else why there is none."""
        if self._process.wait() != 0:
            return last_line(self._log)
        self._partial.rename(self._target)
        return None
