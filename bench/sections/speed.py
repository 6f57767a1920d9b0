"""Speed and memory of every model on this machine, and what a person waits."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from bench.charts import ACCENT, INK, SECOND, as_svg, drawing, legend_name
from bench.page import Chart, Section, Table, byte_size, percent
from bench.statistics import percentile
from pipeline.results import Benchmark, Speed

TITLE = "Speed and memory"


def speed_section(benchmark: Benchmark | None) -> Section | None:
    if benchmark is None:
        return None
    if not benchmark.models:
        return Section(TITLE, (f"{benchmark.machine}: no model was measured.",))
    tables = (_pace_table(benchmark), _waiting_table(benchmark), _memory_table(benchmark))
    notes = dict.fromkeys(f"{speed.model}: {note}" for speed in benchmark.models for note in speed.notes)
    ended_early = [] if benchmark.ended_early is None else [benchmark.ended_early.sentence]
    text = (_machine(benchmark), *_settings(benchmark.models), *notes, *ended_early)
    return Section(TITLE, text, tables, (Chart(lambda: _speed_chart(benchmark.models), _describe(benchmark.models)),))


def seconds(value: float) -> str:
    """Three digits at most, since no repeat agrees with another on more."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 10 else f"{value:,.0f} s"


def _machine(benchmark: Benchmark) -> str:
    text = f"{benchmark.machine}; {benchmark.threads} threads."
    if benchmark.gpu is not None:
        text += f" GPU: {benchmark.gpu}."
    if benchmark.bandwidth is not None:
        text += f" Memory delivers {benchmark.bandwidth.best / 1e9:,.1f} GB/s, measured."
    if benchmark.versions:
        text += f" {', '.join(f'{name} {version}' for name, version in benchmark.versions.items())}."
    return text


def _settings(models: Sequence[Speed]) -> Iterator[str]:
    found = dict.fromkeys(speed.llama_cpp for speed in models if speed.llama_cpp is not None)
    for settings in found:
        layers = "all layers" if settings.gpu_layers == -1 else f"{settings.gpu_layers} layers"
        yield (
            f"llama.cpp: context of {settings.context_tokens:,} tokens, flash attention "
            f"{'on' if settings.flash_attention else 'off'}, keys and values in {settings.kv_type}, "
            f"{layers} on the GPU."
        )


def _pace_table(benchmark: Benchmark) -> Table:
    names = list(dict.fromkeys(test.name for speed in benchmark.models for test in speed.tests))
    shares = [benchmark.roofline_share(speed) for speed in benchmark.models]
    energy = any(speed.energy is not None and speed.energy.joules_per_token is not None for speed in benchmark.models)

    def row(speed: Speed) -> tuple[str, ...]:
        tests = {test.name: test for test in speed.tests}
        cells = [speed.model, f"{speed.engine}, {speed.weights}"]
        for name in names:
            test = tests.get(name)
            cells.append("" if test is None else f"{test.mean:,.1f} ± {test.standard_deviation:,.1f}")
        if any(shares):
            share = benchmark.roofline_share(speed)
            cells.append("" if share is None else percent(share))
        if energy:
            joules = None if speed.energy is None else speed.energy.joules_per_token
            cells.append("" if joules is None else f"{joules:.2f} J")
        return tuple(cells)

    header = ["Model", "Engine", *names]
    repeats = max(len(speed.prompt_tokens_per_second) for speed in benchmark.models)
    up_to = "" if benchmark.ended_early is None else "up to "
    note = (
        "Tokens a second, mean ± standard deviation as llama-bench has it: pp reads a prompt of so many tokens at "
        "once, tg writes so many one by one; @ d: with so many in the context already. Sampling is excluded. "
        f"{up_to}{repeats} repeats after a warm-up, each model in a process of its own."
    )
    if any(shares):
        header.append("Share of bandwidth")
        note += " Share of bandwidth: bytes of weights read for generation, of what the memory delivers."
    if energy:
        header.append("Energy a token")
    return Table(tuple(header), "ll" + "r" * (len(header) - 2), tuple(map(row, benchmark.models)), note, "Speed")


def _waiting_table(benchmark: Benchmark) -> Table:
    length = benchmark.answer_length
    up_to = "" if benchmark.ended_early is None else "up to "
    between_known = any(speed.inter_token_seconds for speed in benchmark.models)

    def row(speed: Speed) -> tuple[str, ...]:
        cells = [speed.model, *_percentiles(speed.time_to_first_token_seconds, (0.5, 0.99))]
        if between_known:
            cells += _percentiles(speed.inter_token_seconds, (0.5, 0.9, 0.99))
        if length is not None:
            cells.append(seconds(speed.seconds_to_answer(length)))
        return tuple(cells)

    header = ["Model", "First token: half", "99 %"]
    note = (
        "So long or less half of the time, and in 99 of 100 cases. First token: a question of ordinary length, nothing "
        f"cached, asked {up_to}{max(len(speed.time_to_first_token_seconds) for speed in benchmark.models)} times."
    )
    if between_known:
        header += ["Between tokens: half", "90 %", "99 %"]
    if length is not None:
        header.append("Whole answer")
        note += (
            f" Whole answer: the first token, then {length.thought_tokens:,.0f} tokens of thought and "
            f"{length.answer_tokens:,.0f} of answer ({length.source})."
        )
    rows = tuple(map(row, benchmark.models))
    return Table(tuple(header), "l" + "r" * (len(header) - 1), rows, note, "What a person waits")


def _percentiles(values: Sequence[float], shares: Sequence[float]) -> list[str]:
    return [seconds(percentile(values, share)) if values else "" for share in shares]


def _memory_table(benchmark: Benchmark) -> Table:
    gpu = any(speed.peak_gpu_bytes is not None for speed in benchmark.models)
    cold = any(speed.cold_load_seconds is not None for speed in benchmark.models)

    def row(speed: Speed) -> tuple[str, ...]:
        cells = [
            speed.model,
            "" if speed.file_bytes is None else byte_size(speed.file_bytes),
            "" if speed.bits_per_weight is None else f"{speed.bits_per_weight:.2f}",
            byte_size(speed.peak_memory_bytes),
        ]
        if gpu:
            cells.append("" if speed.peak_gpu_bytes is None else byte_size(speed.peak_gpu_bytes))
        cells.append(seconds(speed.load_seconds))
        if cold:
            cells.append("" if speed.cold_load_seconds is None else seconds(speed.cold_load_seconds))
        return tuple(cells)

    header = ["Model", "File", "Bits per weight", "Peak memory", *(["Peak GPU memory"] if gpu else []), "Load"]
    header += ["Cold load"] if cold else []
    note = "Peak memory: of the whole process, mapped weights included. Loading excludes importing the library."
    notes = dict.fromkeys(speed.cold_load_note for speed in benchmark.models if speed.cold_load_note)
    return Table(
        tuple(header), "l" + "r" * (len(header) - 1), tuple(map(row, benchmark.models)), " ".join((note, *notes)),
        "Memory and loading",
    )  # fmt: skip


def _describe(models: Sequence[Speed]) -> str:
    parts = [
        f"{speed.model} ({speed.weights}) {statistics.fmean(speed.generated_tokens_per_second):,.1f} tokens a second "
        f"in {byte_size(speed.peak_memory_bytes)}"
        for speed in models
    ]
    return f"Generation, and peak memory: {'; '.join(parts)}."


def _speed_chart(models: Sequence[Speed]) -> str:
    """Generation with its repeats, and below it peak memory beside the file's size: a bar for each model."""
    places = range(len(models))
    with drawing(1, (5.6, 2 * (0.7 + 0.62 * len(models))), rows=2, grid="x") as (figure, (pace, memory)):
        for place, speed in zip(places, models, strict=True):
            repeats = speed.generated_tokens_per_second
            pace.barh(place, statistics.fmean(repeats), height=0.4, color=ACCENT)
            pace.plot(repeats, [place] * len(repeats), color=INK, linestyle="none", marker="|", markersize=10)
            memory.barh(place, speed.peak_memory_bytes / 1e6, height=0.4, color=ACCENT)
            if speed.file_bytes is not None:
                memory.plot(speed.file_bytes / 1e6, place, color=SECOND, marker="D", markersize=7)
        for axes, name in (
            (pace, "generation, tokens a second; | each repeat"),
            (memory, "peak memory, MB; ◆ size of the file"),
        ):
            for place, speed in zip(places, models, strict=True):
                # Above its bar, where a long name has room on a phone.
                name_of = legend_name(f"{speed.model}, {speed.weights}")
                axes.annotate(name_of, (0, place - 0.3), fontsize=10)
            axes.set_yticks([])
            axes.set_ylim(len(models) - 0.6, -0.9)
            axes.set_xlim(left=0)
            axes.set_xlabel(name)
            axes.locator_params(axis="x", nbins=5)
        return as_svg(figure, "speed", "Speed of generation and peak memory", _describe(models))
