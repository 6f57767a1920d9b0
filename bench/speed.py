"""How fast, how large and how exact: every GGUF under llama.cpp, and the trained model under transformers.

    medcot bench runs/smollm2-cpu/gguf/*.gguf

Each model is measured by ``bench/speed_probe.py`` in a process of its own, then the GGUFs are compared with the most
exact of them (``bench/quality.py``).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
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
from pipeline.hardware import cpu_name, may_have_gpu, usable_cores
from pipeline.prompts import Example
from pipeline.results import AnswerLength, Benchmark, Evaluation, ExportedModels, FileQuality, Speed

# Without an evaluation: about the length of medical-o1-reasoning-SFT's reasoning and answers in Llama 3's tokens.
ASSUMED_LENGTH = AnswerLength(thought_tokens=500, answer_tokens=400, source="assumed, nothing was evaluated")
_LIBRARIES = ("llama-cpp-python", "transformers", "torch", "peft", "bitsandbytes", "numpy")


def bench(config: Config, inputs: dict[str, Path], out_dir: Path) -> Benchmark:
    """The stage: all exported GGUFs and, if the configuration says so, base + adapter under transformers."""
    from pipeline.prepare import EVAL_FILE

    exported = Artifact.load(inputs["export"], ExportedModels)
    settings = config.bench
    requests = [
        _request(exported.path / file.name, settings, config.seed, config.prompt.system)
        for file in exported.result.files
        if (exported.path / file.name).is_file()  # a copy from another machine may lack some (pipeline/kept_copy.py)
    ]
    if settings.transformers:
        requests.append(_transformers_request(config, inputs["train"]))
    evaluation = Artifact.load(inputs["evaluate"], Evaluation).result
    tuned = {file.name for file in exported.result.files if file.role == "tuned"}
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
    if measured is None or measured.mean_new_tokens <= 0:
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
    console = Console(stderr=True)
    speeds = []
    for number, request in enumerate(requests, start=1):
        with console.status(f"bench {number}/{len(requests)}: {request.label}"):
            speeds.append(probe(request))
    with console.status("bench: memory bandwidth"):
        bandwidth = measure_bandwidth(requests[0].threads)
    files = [
        (request.path, speed)
        for request, speed in zip(requests, speeds, strict=True)
        if request.is_gguf and request.label in comparable
    ]
    with console.status("bench: quality"):
        quality, note = _quality(files, held_out, context_tokens, requests[0])
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
    )
    if out_dir is not None:
        write_json(out_dir / "benchmark.json", benchmark.model_dump(mode="json"))
    return benchmark


def _quality(
    files: Sequence[tuple[Path, Speed]], held_out: Sequence[Example], context_tokens: int, like: ProbeRequest
) -> tuple[list[FileQuality], str | None]:
    """The comparison, or why there is none: speeds that were measured are not lost by it."""
    if not held_out:
        return [], "not measured: no held-out records were named (--data FILE)"
    chosen = candidates(files)
    if chosen.reference is None:
        return [], f"not measured: {chosen.note}"
    request = QualityRequest(
        reference=chosen.reference,
        models=chosen.others,
        examples=[(example.question, example.reasoning, example.answer) for example in held_out],
        context_tokens=context_tokens,
        threads=like.threads,
        gpu_layers=like.gpu_layers,
        system=like.system,
    )
    try:
        quality = measure_quality(request)
    except MedcotError as error:
        return [], f"not measured: {error}"
    left_out = len(held_out) - quality[0].records
    return quality, f"{left_out} records are longer than {context_tokens} tokens" if left_out else None


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
