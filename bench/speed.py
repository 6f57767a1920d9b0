"""How fast, how large and how exact: every GGUF under llama.cpp, and the trained model under transformers.

    medcot bench runs/smollm2-cpu/gguf/*.gguf

Each model is measured by ``bench/speed_probe.py`` in a process of its own, then the GGUFs are compared with the most
exact of them (``bench/quality.py``).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from rich.console import Console

from bench import child
from bench.bandwidth import measure_bandwidth
from bench.engines import Dtype, check_distinct_names
from bench.gguf_weights import is_model
from bench.quality import QualityRequest, candidates, measure_quality
from bench.recommendation import recommend
from bench.speed_probe import ProbeRequest
from pipeline.artifacts import MANIFEST_NAME, Artifact, write_json
from pipeline.config import BenchConfig, Config
from pipeline.errors import MedcotError
from pipeline.gpu_room import fit_together, gpu_memory_here
from pipeline.hardware import cpu_name, may_have_gpu, usable_cores
from pipeline.prompts import Example
from pipeline.results import (
    AnswerLength,
    Benchmark,
    BenchmarkEndedEarly,
    Evaluation,
    ExportedModels,
    FileQuality,
    Speed,
)
from pipeline.time_limit import TimeLimit

# Without an evaluation: about the length of medical-o1-reasoning-SFT's reasoning and answers in Llama 3's tokens.
ASSUMED_LENGTH = AnswerLength(thought_tokens=500, answer_tokens=400, source="assumed, nothing was evaluated")
_LIBRARIES = ("llama-cpp-python", "transformers", "torch", "peft", "bitsandbytes", "numpy")


def bench(config: Config, inputs: dict[str, Path], out_dir: Path) -> Benchmark:
    """The stage: all exported GGUFs and, if the configuration says so, base + adapter under transformers."""
    from pipeline.prepare import EVAL_FILE

    exported = Artifact.load(inputs["export"], ExportedModels)
    settings = config.bench
    # A copy from another machine may lack some (pipeline/kept_copy.py).
    files = [file for file in exported.result.files if (exported.path / file.name).is_file()]
    if settings.max_minutes is not None:  # what counts most first
        files = sorted(files, key=lambda file: (file.name != exported.result.ship, file.role == "base"))
    requests = [_request(exported.path / file.name, settings, config.seed, config.prompt.system) for file in files]
    if settings.transformers:
        requests.append(_transformers_request(config, inputs["train"]))
    evaluation = Artifact.load(inputs["evaluate"], Evaluation).result
    tuned = {file.name for file in files if file.role == "tuned"}
    return _measure_all(
        requests,
        settings,
        out_dir,
        comparable=tuned,
        held_out=_held_out(inputs["prepare"] / EVAL_FILE, settings.quality_records),
        context_tokens=config.model.max_seq_length,
        answer_length=answer_length(evaluation, exported.result.ship) or ASSUMED_LENGTH,
    )


def bench_models(
    paths: Sequence[Path],
    settings: BenchConfig,
    out_dir: Path | None,
    *,
    data: Path | None = None,
    dtype: Dtype = "auto",
    load_in_4bit: bool = False,
) -> Benchmark:
    """The command: GGUF files, model folders and adapter folders; ``out_dir`` None writes no file.

    ``data`` are held-out records to compare the GGUFs on; without them a run's own are taken where there are.
    ``dtype`` and ``load_in_4bit`` are for models under transformers.
    """
    for path in paths:
        if not path.exists():
            raise MedcotError(f"{path} does not exist: name a GGUF or a model's folder.")
    paths = _models(paths)
    check_distinct_names(paths)
    transformers = {"dtype": dtype, "load_in_4bit": load_in_4bit}
    return _measure_all(
        [_request(path, settings, 0, None).model_copy(update=transformers if path.is_dir() else {}) for path in paths],
        settings,
        out_dir,
        comparable={path.name for path in paths} - _bases(paths),
        held_out=_held_out(data or _data_of_run(paths[0]), settings.quality_records),
        context_tokens=settings.context_tokens or 2048,
        answer_length=ASSUMED_LENGTH,
    )


def answer_length(evaluation: Evaluation, model: str) -> AnswerLength | None:
    """What the evaluated ``model`` wrote on average; None where it was not evaluated."""
    measured = next((each for each in evaluation.models if each.model == model), None)
    if measured is None or measured.finished is None or measured.mean_new_tokens <= 0:
        return None
    thought = measured.thought_tokens.value if measured.thought_tokens else 0.0
    return AnswerLength(
        thought_tokens=min(thought, measured.mean_new_tokens),
        answer_tokens=max(0.0, measured.mean_new_tokens - thought),
        source=f"mean of {model}'s {measured.finished.n} evaluated answers",
    )


def _models(paths: Sequence[Path]) -> list[Path]:
    """Without what else lies in a run's gguf/ folder and its *.gguf means too."""
    models = [path for path in paths if path.is_dir() or is_model(path)]
    left_out = [path.name for path in paths if path not in models]
    if not models:
        raise MedcotError(f"{', '.join(left_out)}: no model, but an adapter or an importance matrix.")
    if left_out:
        Console(stderr=True).print(f"Not measured, since no models: {', '.join(left_out)}", highlight=False)
    return models


def _bases(paths: Sequence[Path]) -> set[str]:
    """Names of files that a run made of the base alone: another model, not a quantization of the tuned one."""
    folders = {path.parent for path in paths if (path.parent / MANIFEST_NAME).is_file() and not path.is_dir()}
    exported = [Artifact.load(folder, ExportedModels).result for folder in folders]
    return {file.name for result in exported for file in result.files if file.role == "base"}


def _data_of_run(gguf: Path) -> Path | None:
    """The held-out records beside a run's gguf/ folder."""
    path = gguf.resolve().parent.parent / "data" / "eval.jsonl"
    return path if path.is_file() else None


def _held_out(data: Path | None, records: int) -> list[Example]:
    from bench.held_out import read_records

    return [] if data is None or records == 0 else [record.example for record in read_records(data, records)]


def _request(path: Path, settings: BenchConfig, seed: int, system: str | None) -> ProbeRequest:
    return ProbeRequest(
        label=path.name,
        path=path,
        threads=settings.threads or usable_cores(),
        prompt_tokens=settings.prompt_tokens,
        generated_tokens=settings.generated_tokens,
        repeats=settings.repeats,
        # A model under transformers is there to compare with at depth 0: evaluating the depth takes it minutes.
        depths=() if path.is_dir() else tuple(sorted({depth for depth in settings.depths if depth > 0})),
        context_tokens=settings.context_tokens,
        flash_attention=settings.flash_attention,
        kv_type=settings.kv_type,
        gpu_layers=settings.gpu_layers,
        seed=seed,
        system=system,
    )


def _transformers_request(config: Config, adapter: Path) -> ProbeRequest:
    from pipeline.base_model import local_base

    base = local_base(config.model.base, config.model.revision)
    return _request(base, config.bench, config.seed, config.prompt.system).model_copy(
        update={
            "label": f"{config.name} (base + adapter)",
            "adapter": adapter,
            "dtype": config.model.dtype,
            "load_in_4bit": config.model.load_in_4bit,
        }
    )


def _measure_all(
    requests: Sequence[ProbeRequest],
    settings: BenchConfig,
    out_dir: Path | None,
    *,
    comparable: set[str],
    held_out: Sequence[Example],
    context_tokens: int,
    answer_length: AnswerLength,
) -> Benchmark:
    limit = TimeLimit.starting_now(settings.max_minutes)
    console = Console(stderr=True)
    speeds: list[Speed] = []
    files: list[tuple[Path, Speed]] = []
    left_out: list[str] = []
    for number, request in enumerate(requests):
        if speeds and limit.is_up():
            left_out.append(request.label)
            continue
        # An equal part of what is left for this one, those after it and the comparison of quality.
        seconds = limit.first(1 / (len(requests) - number + bool(held_out))).seconds_left
        with console.status(f"bench {number + 1}/{len(requests)}: {request.label}"):
            speed = probe(request.model_copy(update={"seconds": seconds}))
        speeds.append(speed)
        left_out += _left_out(request, speed)
        if request.is_gguf and request.label in comparable:
            files.append((request.path, speed))
    with console.status("bench: memory bandwidth"):
        bandwidth = measure_bandwidth(requests[0].threads)
    quality: list[FileQuality] = []
    note: str | None
    if held_out and limit.is_up():
        note = f"not measured: bench.max_minutes={settings.max_minutes:g} left no time"
        left_out.append("quality")
    else:
        with console.status("bench: quality"):
            quality, note, not_reached = _quality(files, held_out, context_tokens, requests[0], limit.seconds_left)
        if not_reached:
            left_out.append(f"quality: {quality[0].records} of {quality[0].records + not_reached} records")
    benchmark = Benchmark(
        machine=machine_name(),
        threads=requests[0].threads,
        models=speeds,
        gpu=_gpu_name(),
        versions=_versions(),
        bandwidth=bandwidth,
        answer_length=answer_length,
        quality=quality,
        quality_note=note,
        recommendation=recommend(speeds, quality, settings.quality_budget, settings.memory_budget_gb),
        ended_early=BenchmarkEndedEarly(minutes=limit.minutes, left_out=left_out)
        if left_out and limit.minutes is not None
        else None,
    )
    if out_dir is not None:
        write_json(out_dir / "benchmark.json", benchmark.model_dump(mode="json"))
    return benchmark


def _left_out(request: ProbeRequest, speed: Speed) -> Iterator[str]:
    """What the time limit has left out of one model's measurement."""
    repeats = min(len(speed.time_to_first_token_seconds), *(len(test.tokens_per_second) for test in speed.tests))
    if repeats < request.repeats:
        yield f"{request.label}: {repeats} of {request.repeats} repeats"
    missing = [depth for depth in request.depths if sum(test.depth == depth for test in speed.deeper) < 2]
    if missing:
        yield f"{request.label} with {', '.join(f'{depth:,}' for depth in missing)} tokens in the context"


def _quality(
    files: Sequence[tuple[Path, Speed]],
    held_out: Sequence[Example],
    context_tokens: int,
    like: ProbeRequest,
    seconds: float | None,
) -> tuple[list[FileQuality], str | None, int]:
    """The comparison, or why there is none: speeds that were measured are not lost by it.

    Last comes how many records the time, ``seconds``, did not suffice for.
    """
    if not held_out:
        return [], "not measured: no held-out records were named (--data FILE)", 0
    chosen = candidates(files)
    if chosen.reference is None:
        return [], f"not measured: {chosen.note}", 0
    sizes = [path.stat().st_size for path in (chosen.reference, *chosen.others)]
    request = QualityRequest(
        reference=chosen.reference,
        models=chosen.others,
        examples=[(example.question, example.reasoning, example.answer) for example in held_out],
        context_tokens=context_tokens,
        threads=like.threads,
        gpu_layers=like.gpu_layers if fit_together(sizes, gpu_memory_here()) else 0,
        system=like.system,
        seconds=seconds,
    )
    try:
        found = measure_quality(request)
    except MedcotError as error:
        return [], f"not measured: {error}", 0
    too_long = len(held_out) - found.fitting
    note = f"{too_long} records are longer than {context_tokens} tokens" if too_long else None
    return found.files, note, found.fitting - found.files[0].records


def machine_name() -> str:
    """For example ``AMD EPYC 7B13, 2 cores, 8 GB``."""
    return f"{cpu_name()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB"


def _gpu_name() -> str | None:
    if not may_have_gpu():
        return None
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _versions() -> dict[str, str]:
    from export.ggml import build

    installed = {
        each.metadata["Name"].lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()
    }
    return {name: installed[name] for name in _LIBRARIES if name in installed} | {"llama.cpp": build()}


def probe(request: ProbeRequest) -> Speed:
    """Measure one model in a child process; MedcotError names the model when the child fails or dies."""
    return child.ask("bench.speed_probe", request, Speed, f"Measuring {request.label}")
