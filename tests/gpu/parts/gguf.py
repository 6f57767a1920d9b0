"""Speed of a GGUF with all layers on the GPU and with none, where llama-cpp-python can be built for CUDA here."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from machine import ROOT
from part import Recorder, Request, Skipped, medcot, perform, run
from synthetic import random_base

from bench.speed import probe
from bench.speed_probe import ProbeRequest
from bench.statistics import percentile
from pipeline.errors import MedcotError
from pipeline.hardware import hide_gpu, usable_cores
from pipeline.llama_build import Build, Recipe, wanted
from pipeline.results import Speed

_BUILT, _REASON = "llama-cuda", "llama-cuda-reason.txt"
_LAYERS = {"all layers on the GPU": -1, "on the CPU": 0}


def prepare(request: Request) -> None:
    """The build, and meanwhile the GGUF; why there is no build is kept for the measurement."""
    recipe, reason = recipe_or_reason(request.source)
    if recipe is None or request.source is None:
        if request.rehearse:
            _gguf(request)
        (request.work / _REASON).write_text(reason)
        return
    # A third of the cores is left to what is measured meanwhile; nothing can be fetched.
    parallel = max(1, (os.cpu_count() or 1) * 2 // 3)
    offline = ("--no-index", "--no-build-isolation")
    folder = request.work / "llama-build"
    build = Build(recipe, request.source, folder, parallel=parallel, nice=True, pip_options=offline)
    try:
        _gguf(request)
        wheel = build.wait()
    except MedcotError as error:
        (request.work / _REASON).write_text(str(error))
        return
    finally:
        build.end()
    partial = request.work / f"{_BUILT}.partial"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(partial)
    partial.rename(request.work / _BUILT)


def recipe_or_reason(source: Path | None) -> tuple[Recipe | None, str]:
    """Set-up's recipe for this machine's cards, or why there can be no build with CUDA."""
    found = wanted(ROOT / "requirements-gpu.txt")
    if found.recipe.cuda is None:
        return None, found.why_no_cuda or "there is no NVIDIA GPU"
    if source is None:
        return None, "no source distribution of llama-cpp-python was given (--llama-source)"
    return (found.recipe, "") if source.is_file() else (None, f"{source} is no file")


def _gguf(request: Request) -> Path:
    """The random model in Q4_K_M, exported on the CPU."""
    folder = request.work / "random-gguf"
    if not list(folder.glob("*-Q4_K_M.gguf")):
        base = random_base(request.work, request.rehearse)
        command = medcot("export", "--base", str(base), "--out", str(folder), "--quant", "Q4_K_M")
        if run([*command, "--imatrix", "none", "--no-verify"]) != 0:
            raise MedcotError("The random model could not be exported; the log says why.")
    return next(folder.glob("*-Q4_K_M.gguf"))


def measure(recorder: Recorder) -> None:
    request = recorder.request
    built = request.work / _BUILT
    if not built.is_dir():
        reason_file = request.work / _REASON
        reason = reason_file.read_text() if reason_file.is_file() else "its preparation was not finished, see the log"
        if not request.rehearse:
            raise Skipped(f"not built: {reason}")
    else:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(built), os.environ.get("PYTHONPATH")]))
    gguf = _gguf(request)
    speeds: dict[str, Speed] = {}
    for name, layers in _LAYERS.items():
        if layers == 0:
            hide_gpu()  # a CUDA build would read prompts there all the same
        speeds[name] = probe(_request(gguf, layers, request.rehearse))
        recorder.figure(f"prompt, {name}", percentile(speeds[name].prompt_tokens_per_second, 0.5), "tokens/s")
        recorder.figure(f"generation, {name}", percentile(speeds[name].generated_tokens_per_second, 0.5), "tokens/s")
        recorder.check(f"measured {name}", min(speeds[name].generated_tokens_per_second) > 0, gguf.name)
    if not request.rehearse:
        offloaded = speeds["all layers on the GPU"]
        recorder.check("layers are on the GPU", not offloaded.notes, "; ".join(offloaded.notes) or "no note against it")
        recorder.figure("GPU memory", (offloaded.peak_gpu_bytes or 0) / 1e9, "GB")


def _request(gguf: Path, layers: int, rehearse: bool) -> ProbeRequest:
    return ProbeRequest(
        label=gguf.name,
        path=gguf,
        threads=1 if rehearse else usable_cores(),  # beside others two wait for each other in busy loops
        prompt_tokens=16 if rehearse else 512,
        generated_tokens=4 if rehearse else 64,
        repeats=1 if rehearse else 3,
        gpu_layers=layers,
    )


if __name__ == "__main__":
    perform(measure, prepare)
