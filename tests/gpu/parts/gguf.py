"""Speed of a GGUF with all layers on the GPU and with none, where llama-cpp-python can be built for CUDA here."""

from __future__ import annotations

import os
from pathlib import Path

from llama_build import Build, why_not
from machine import compute_capability
from part import Recorder, Request, Skipped, medcot, perform, run
from synthetic import random_base

from bench.speed import probe
from bench.speed_probe import ProbeRequest
from bench.statistics import percentile
from pipeline.errors import MedcotError
from pipeline.hardware import hide_gpu, usable_cores
from pipeline.results import Speed

_BUILT, _REASON = "llama-cuda", "llama-cuda-reason.txt"
_LAYERS = {"all layers on the GPU": -1, "on the CPU": 0}


def prepare(request: Request) -> None:
    """The build, and meanwhile the GGUF; why there is no build is kept for the measurement."""
    reason = why_not(request.source)
    build = None
    if reason is None and request.source is not None:
        build = Build(request.source, request.work / _BUILT, compute_capability())
    if build is not None or request.rehearse:
        _gguf(request)
    if build is not None:
        reason = build.wait()
    if reason is not None:
        (request.work / _REASON).write_text(reason)


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
