"""A benchmark as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.statistics import percentile
from pipeline.results import Benchmark, Estimate, FileQuality, Speed


def print_benchmark(benchmark: Benchmark) -> None:
    """Speeds, sizes, what a person waits for, quality and the recommendation, on standard output."""
    console = Console()
    for table in (_speed_table(benchmark.models), _size_table(benchmark.models), _waiting_table(benchmark)):
        console.print(table)
    for speed in benchmark.models:
        for note in filter(None, [*speed.notes, speed.cold_load_note]):
            console.print(f"{speed.model}: {note}", highlight=False)
    if benchmark.quality:
        console.print(_quality_table(benchmark.quality))
    if benchmark.quality_note:
        console.print(f"Quality: {benchmark.quality_note}", highlight=False)
    if benchmark.ended_early is not None:
        console.print(benchmark.ended_early.sentence, highlight=False)
    if benchmark.recommendation is not None:
        console.print(f"Recommendation: {benchmark.recommendation.reason}", highlight=False)
    console.print(_conditions(benchmark), highlight=False)


def _table(*columns: str) -> Table:
    """Of models, whose names are shown whole; in a narrow terminal the other columns are broken."""
    table = Table("model")
    table.columns[0].no_wrap = True
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _speed_table(models: Sequence[Speed]) -> Table:
    table = _table("weights", "test", "tokens/s")
    for model in models:
        first = (model.model, model.weights if model.engine == "llama.cpp" else f"{model.engine}, {model.weights}")
        for number, test in enumerate(model.tests):
            figure = f"{test.mean:.2f} ± {test.standard_deviation:.2f}"
            table.add_row(*(first if number == 0 else ("", "")), test.name, figure)
    return table


def _size_table(models: Sequence[Speed]) -> Table:
    table = _table("file, MB", "bits/weight", "peak memory, MB", "load cold, s", "warm, s")
    for model in models:
        gpu = "" if model.peak_gpu_bytes is None else f" + GPU {model.peak_gpu_bytes / 1e6:.0f}"
        table.add_row(
            model.model,
            _figure(None if model.file_bytes is None else model.file_bytes / 1e6, 0),
            _figure(model.bits_per_weight, 2),
            f"{model.peak_memory_bytes / 1e6:.0f}{gpu}",
            _figure(model.cold_load_seconds, 2),
            _figure(model.load_seconds, 2),
        )
    return table


def _waiting_table(benchmark: Benchmark) -> Table:
    length = benchmark.answer_length
    table = _table(
        "first token p50 / p99, s", "next token p50 / p90 / p99, ms", "answer, s", "of memory speed", "J/token"
    )
    if length is not None:
        table.caption = (
            f"Answer: {length.thought_tokens:.0f} tokens of thought and {length.answer_tokens:.0f} of answer "
            f"({length.source})."
        )
    for model in benchmark.models:
        table.add_row(
            model.model,
            _percentiles(model.time_to_first_token_seconds, (0.5, 0.99), 1, 2),
            _percentiles(model.inter_token_seconds, (0.5, 0.9, 0.99), 1000, 1),
            _figure(None if length is None else model.seconds_to_answer(length), 1),
            _figure(benchmark.roofline_share(model), 2),
            _figure(model.energy.joules_per_token if model.energy else None, 2),
        )
    return table


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percentiles(values: Sequence[float], shares: Sequence[float], factor: float, digits: int) -> str:
    return " / ".join(f"{factor * percentile(values, share):.{digits}f}" for share in shares) if values else "-"


def _quality_table(quality: Sequence[FileQuality]) -> Table:
    table = _table("tokens of", "perplexity", "mean KL, nats", "p99 KL", "same likeliest token")
    for file in quality:
        for name, part in (("all", file.whole), ("reasoning", file.reasoning), ("answer", file.answer)):
            if part is not None:
                table.add_row(
                    file.model if name == "all" else "",
                    name,
                    _interval(part.perplexity, 2),
                    _interval(part.mean_kl, 4),
                    f"{part.p99_kl:.3f}",
                    _interval(part.top1_agreement, 3),
                )
    first = quality[0]
    table.caption = f"Against {first.reference}, {first.records} held-out records, {first.whole.tokens} tokens; 95 %."
    return table


def _interval(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def _conditions(benchmark: Benchmark) -> str:
    parts = [
        benchmark.machine,
        *filter(None, [benchmark.gpu]),
        f"{benchmark.threads} thread{'s' if benchmark.threads > 1 else ''}",
    ]
    settings = next((model.llama_cpp for model in benchmark.models if model.llama_cpp), None)
    if settings is not None:
        attention = "on" if settings.flash_attention else "off"
        parts.append(
            f"context {settings.context_tokens}, flash attention {attention}, KV {settings.kv_type}, "
            f"layers on GPU {settings.gpu_layers}"
        )
    if benchmark.bandwidth is not None:
        parts.append(f"memory {benchmark.bandwidth.best / 1e9:.1f} GB/s (streaming read)")
    energy = next((model.energy for model in benchmark.models if model.energy), None)
    if energy is not None:
        parts.append(f"energy {energy.source}")
    return "; ".join([*parts, *(f"{name} {version}" for name, version in benchmark.versions.items())])
