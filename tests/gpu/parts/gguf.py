"""An 8B GGUF under a CUDA build of llama.cpp: build time, speed and logits against the CPU, and ``medcot evaluate``."""

from __future__ import annotations

import time
from pathlib import Path

from cuda_llama import BuildOutcome, CudaBuild, built_folder, put_on_path, recipe_for, save_outcome, saved_outcome
from gguf_logits import LogitsRequest, LogitsResult
from part import Recorder, Request, Skipped, medcot, perform, run
from random_gguf import random_gguf
from synthetic import random_base, write_rows

from bench import child
from bench.kept_records import records_path
from bench.record_outcome import RecordOutcome
from bench.speed import probe
from bench.speed_probe import ProbeRequest
from bench.statistics import percentile
from export.verify_logits import LogitComparison, load_logits
from pipeline.config import load_config
from pipeline.errors import MedcotError
from pipeline.hardware import hide_gpu, usable_cores
from pipeline.results import Speed

_PLACES = {"all layers on the GPU": True, "on the CPU": False}
_LOGIT_TOKENS, _REHEARSED_LOGIT_TOKENS = 96, 16
# Both round activations to 8 bit, in other blocks; a wrong kernel is off by 1 and more.
_MAX_NMSE = 0.02
_ROWS, _NEW_TOKENS, _ROW_TOKENS = 8, 128, 400
_REHEARSED_ROWS, _REHEARSED_NEW_TOKENS = 2, 4


def prepare(request: Request) -> None:
    """The build, and meanwhile the GGUF; why there is no build is kept for the measurement."""
    if built_folder(request).is_dir():
        save_outcome(request, BuildOutcome())
        random_gguf(request)
        return
    try:
        build = CudaBuild(request, recipe_for(request.source))
        try:
            random_gguf(request)
            _, seconds = build.wait()
        finally:
            build.end()
        save_outcome(request, BuildOutcome(seconds=seconds))
    except MedcotError as error:
        save_outcome(request, BuildOutcome(reason=str(error)))
        if request.rehearse:
            random_gguf(request)


def measure(recorder: Recorder) -> None:
    request = recorder.request
    outcome = saved_outcome(request)
    if outcome.reason is None:
        put_on_path(request)
    elif not request.rehearse:
        raise Skipped(f"not built: {outcome.reason}")
    if outcome.seconds is not None:
        recorder.figure("CUDA build, next to other work", outcome.seconds, "s")
    gguf = random_gguf(request)
    _evaluate(recorder, gguf)
    speeds: dict[str, Speed] = {}
    for name, on_gpu in _PLACES.items():
        if not on_gpu:
            hide_gpu()
        speeds[name] = probe(_probe_request(gguf, on_gpu, request.rehearse))
        recorder.figure(f"prompt, {name}", percentile(speeds[name].prompt_tokens_per_second, 0.5), "tokens/s")
        recorder.figure(f"generation, {name}", percentile(speeds[name].generated_tokens_per_second, 0.5), "tokens/s")
        recorder.check(f"measured {name}", min(speeds[name].generated_tokens_per_second) > 0, gguf.name)
        asked = LogitsRequest(
            gguf=gguf,
            tokens=_REHEARSED_LOGIT_TOKENS if request.rehearse else _LOGIT_TOKENS,
            threads=_threads(request.rehearse),
            on_gpu=on_gpu and not request.rehearse,
            out=_logits_path(request, on_gpu),
        )
        child.ask("gguf_logits", asked, LogitsResult, f"Logits {name}")
    _compare_logits(recorder)
    if not request.rehearse:
        offloaded = speeds["all layers on the GPU"]
        recorder.check("layers are on the GPU", not offloaded.notes, "; ".join(offloaded.notes) or "no note against it")
        recorder.figure("GPU memory", (offloaded.peak_gpu_bytes or 0) / 1e9, "GB")


def _evaluate(recorder: Recorder, gguf: Path) -> None:
    """The command as a person gives it, with loading and likelihoods in its time."""
    request = recorder.request
    count, new_tokens = (_REHEARSED_ROWS, _REHEARSED_NEW_TOKENS) if request.rehearse else (_ROWS, _NEW_TOKENS)
    base = random_base(request.work, request.rehearse)
    config = load_config("deepseek-r1-8b")
    rows = write_rows(request.work / "evaluate-rows.jsonl", config, base, [_ROW_TOKENS] * count)
    out_dir = request.work / "evaluated"
    command = medcot("evaluate", str(gguf), "--data", str(rows), "--rows", str(count), "--choice-rows", "0")
    begun = time.monotonic()
    status = run([*command, "--max-new-tokens", str(new_tokens), "--out", str(out_dir)])
    seconds = time.monotonic() - begun
    recorder.check("medcot evaluate", status == 0, f"exit status {status}")
    if status == 0:
        lines = records_path(out_dir, gguf).read_text().splitlines()
        written = sum(RecordOutcome.model_validate_json(line).new_tokens for line in lines)
        recorder.figure("medcot evaluate", written / seconds, "tokens/s")
        recorder.figure(f"medcot evaluate, {len(lines)} records", seconds, "s")


def _compare_logits(recorder: Recorder) -> None:
    gpu, cpu = (load_logits(_logits_path(recorder.request, on_gpu)) for on_gpu in (True, False))
    comparison = LogitComparison()
    comparison.add(cpu, gpu)
    recorder.figure("logits against the CPU's (NMSE)", comparison.nmse)
    recorder.figure("the CPU's top token", comparison.top1_agreement)
    recorder.figure("mean divergence from the CPU", comparison.mean_kl, "nats")
    recorder.check(
        "the CPU's logits",
        comparison.finite and comparison.nmse <= _MAX_NMSE,
        f"NMSE {comparison.nmse:.2e} over {comparison.positions} positions ({_MAX_NMSE:.0e})",
    )


def _logits_path(request: Request, on_gpu: bool) -> Path:
    return request.work / f"logits-{'gpu' if on_gpu else 'cpu'}.npy"


def _threads(rehearse: bool) -> int:
    return 1 if rehearse else usable_cores()  # next to others two wait for each other in busy loops


def _probe_request(gguf: Path, on_gpu: bool, rehearse: bool) -> ProbeRequest:
    return ProbeRequest(
        label=gguf.name,
        path=gguf,
        threads=_threads(rehearse),
        prompt_tokens=16 if rehearse else 512,
        generated_tokens=4 if rehearse else 64,
        repeats=1 if rehearse else 3,
        gpu_layers=-1 if on_gpu else 0,
    )


if __name__ == "__main__":
    perform(measure, prepare)
