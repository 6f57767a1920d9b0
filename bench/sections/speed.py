"""Speed and memory of every model on this machine."""

from __future__ import annotations

from bench.page import Section, Table, byte_size, spread
from pipeline.results import Benchmark, Speed


def speed_section(benchmark: Benchmark | None) -> Section | None:
    if benchmark is None:
        return None

    def row(speed: Speed) -> tuple[str, ...]:
        return (
            speed.model,
            f"{speed.engine}, {speed.weights}",
            "" if speed.file_bytes is None else byte_size(speed.file_bytes),
            byte_size(speed.peak_memory_bytes),
            f"{speed.load_seconds:.2f}",
            spread(speed.prompt_tokens_per_second, 0),
            spread(speed.generated_tokens_per_second, 1),
            spread(speed.time_to_first_token_seconds, 2),
        )

    first = benchmark.models[0] if benchmark.models else None
    note = "Median of the repeats, in brackets the smallest and the largest. "
    if first is not None:
        note += (
            f"Prompt: {first.prompt_tokens} tokens at once. Generation: {first.generated_tokens} tokens one "
            "by one, sampling excluded. First token: a question of ordinary length, nothing cached. Loading "
            f"excludes importing the library. {len(first.prompt_tokens_per_second)} repeats after a warm-up, "
            "each model in a process of its own."
        )
    header = (
        "Model", "Engine", "File", "Peak memory", "Load, s", "Prompt, tokens/s", "Generation, tokens/s",
        "First token, s",
    )  # fmt: skip
    return Section(
        "Speed and memory",
        (f"{benchmark.machine}; {benchmark.threads} threads.",),
        (Table(header, "llrrrrrr", tuple(map(row, benchmark.models)), note),),
    )
