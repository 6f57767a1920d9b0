"""How fast and how large: every GGUF under llama.cpp, and the trained model under transformers.

    medcot bench runs/smollm2-cpu/gguf/*.gguf

Each model is measured by ``bench/speed_probe.py`` in a process of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from bench.speed_probe import ProbeRequest
from bench.statistics import percentile
from pipeline.artifacts import Artifact, write_json
from pipeline.config import BenchConfig, Config
from pipeline.errors import MedcotError
from pipeline.hardware import cpu_name, usable_cores
from pipeline.results import Benchmark, ExportedModels, Speed

REPOSITORY = Path(__file__).resolve().parent.parent


def bench(config: Config, inputs: dict[str, Path], out_dir: Path) -> Benchmark:
    """The stage: all exported GGUFs and, if the configuration says so, base + adapter under transformers."""
    exported = Artifact.load(inputs["export"], ExportedModels)
    requests = [
        _request(exported.path / file.name, config.bench, config.seed, config.prompt.system)
        for file in exported.result.files
    ]
    if config.bench.transformers:
        requests.append(_transformers_request(config, inputs["train"]))
    return _measure_all(requests, out_dir)


def bench_files(
    paths: Sequence[Path], *, repeats: int = 5, out_dir: Path | None = None, threads: int | None = None
) -> Benchmark:
    """The command: GGUF files, model folders and adapter folders; ``out_dir`` None writes no file."""
    return bench_models(paths, BenchConfig.model_validate({"repeats": repeats}), out_dir, threads=threads)


def bench_models(
    paths: Sequence[Path], settings: BenchConfig, out_dir: Path | None, *, threads: int | None = None
) -> Benchmark:
    for path in paths:
        if not path.exists():
            raise MedcotError(f"{path} does not exist: name a GGUF or a model's folder.")
    return _measure_all([_request(path, settings, 0, None, threads) for path in paths], out_dir)


def print_benchmark(benchmark: Benchmark) -> None:
    """One row a model on standard output, medians of the repeats."""
    table = Table("model", "weights", "prompt, tokens/s", "generation, tokens/s", "first token, s", "peak memory, MB")
    for model in benchmark.models:
        table.add_row(
            model.model,
            f"{model.engine}, {model.weights}",
            f"{percentile(model.prompt_tokens_per_second, 0.5):.0f}",
            f"{percentile(model.generated_tokens_per_second, 0.5):.1f}",
            f"{percentile(model.time_to_first_token_seconds, 0.5):.2f}",
            f"{model.peak_memory_bytes / 1e6:.0f}",
        )
    Console().print(table)
    Console().print(f"{benchmark.machine}; {benchmark.threads} threads", highlight=False)


def _request(
    path: Path, settings: BenchConfig, seed: int, system: str | None, threads: int | None = None
) -> ProbeRequest:
    return ProbeRequest(
        label=path.name,
        path=path,
        threads=threads or usable_cores(),
        prompt_tokens=settings.prompt_tokens,
        generated_tokens=settings.generated_tokens,
        repeats=settings.repeats,
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


def _measure_all(requests: Sequence[ProbeRequest], out_dir: Path | None) -> Benchmark:
    console = Console(stderr=True)
    speeds = []
    for number, request in enumerate(requests, start=1):
        with console.status(f"bench {number}/{len(requests)}: {request.label}"):
            speeds.append(probe(request))
    benchmark = Benchmark(machine=machine_name(), threads=requests[0].threads, models=speeds)
    if out_dir is not None:
        write_json(out_dir / "benchmark.json", benchmark.model_dump(mode="json"))
    return benchmark


def machine_name() -> str:
    """For example ``AMD EPYC 7B13, 2 cores, 8 GB``."""
    return f"{cpu_name()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB"


def probe(request: ProbeRequest) -> Speed:
    """Measure one model in a child process; MedcotError names the model when the child fails or dies."""
    search_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-m", "bench.speed_probe"],
        input=request.model_dump_json(),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search_path},
        check=False,
    )
    last_line = (child.stdout.strip().splitlines() or [""])[-1]
    if child.returncode == 0:
        try:
            return Speed.model_validate_json(last_line)
        except ValidationError as error:
            raise MedcotError(f"Measuring {request.label} gave no result (last line: {last_line!r:.80}).") from error
    raise MedcotError(f"Measuring {request.label} failed: {_reason(child)}")


def _reason(child: subprocess.CompletedProcess[str]) -> str:
    said = (child.stderr.strip().splitlines() or ["no message"])[-1]
    if child.returncode >= 0:
        return said
    number = -child.returncode
    if number == signal.SIGKILL:
        return "the process was killed, most often for want of memory: close programs or take a smaller model."
    return f"the process died of {signal.Signals(number).name}; the file may be damaged ({said:.200})."
