"""llama-cpp-python with CUDA in a folder of its own, compiled by set-up's recipe (pipeline/llama_build.py); nothing is
fetched."""

from __future__ import annotations

import os
import time
import zipfile
from pathlib import Path

from machine import ROOT
from part import Request
from pydantic import BaseModel, ConfigDict

from pipeline.artifacts import write_text
from pipeline.errors import MedcotError
from pipeline.llama_build import Build, Recipe, wanted

_OUTCOME = "llama-build.json"
_OFFLINE = ("--no-index", "--no-build-isolation")


class BuildOutcome(BaseModel):
    """``reason`` is why there is no build; ``seconds`` what it took, None where an earlier call has built it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    reason: str | None = None
    seconds: float | None = None


def built_folder(request: Request) -> Path:
    return request.built or request.work / "llama-cuda"


def put_on_path(request: Request) -> None:
    """For this process's children."""
    paths = [str(built_folder(request)), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def saved_outcome(request: Request) -> BuildOutcome:
    try:
        return BuildOutcome.model_validate_json((request.work / _OUTCOME).read_bytes())
    except FileNotFoundError:
        return BuildOutcome(reason="its preparation was not finished, see the log")


def save_outcome(request: Request, outcome: BuildOutcome) -> None:
    write_text(request.work / _OUTCOME, outcome.model_dump_json() + "\n")


def recipe_for(source: Path | None) -> Recipe:
    """Set-up's recipe for this machine's cards; raises MedcotError where there can be no build with CUDA."""
    found = wanted(ROOT / "requirements-gpu.txt")
    if found.recipe.cuda is None:
        raise MedcotError(found.why_no_cuda or "there is no NVIDIA GPU")
    if source is None:
        raise MedcotError("no source distribution of llama-cpp-python was given (--llama-source)")
    if not source.is_file():
        raise MedcotError(f"{source} is no file")
    return found.recipe


class CudaBuild:
    """Under way from the start, in ``request.work``."""

    def __init__(self, request: Request, recipe: Recipe, *, alone: bool = False) -> None:
        """Unless it is ``alone``, a third of the cores is left to what is measured meanwhile."""
        assert request.source is not None
        self._target = built_folder(request)
        self._started = time.monotonic()
        parallel = None if alone else max(1, (os.cpu_count() or 1) * 2 // 3)
        self._build = Build(
            recipe,
            request.source,
            request.work / "llama-build",
            parallel=parallel,
            nice=not alone,
            pip_options=_OFFLINE,
        )

    def wait(self) -> tuple[Path, float]:
        """The wheel, unpacked in ``built_folder``, and the seconds that it took. Raises MedcotError when it failed."""
        wheel = self._build.wait()
        unpack(wheel, self._target)
        return wheel, round(time.monotonic() - self._started, 1)

    def end(self) -> None:
        self._build.end()


def unpack(wheel: Path, target: Path) -> None:
    """Whole or absent."""
    partial = target.with_name(f"{target.name}.partial")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(partial)
    partial.rename(target)
