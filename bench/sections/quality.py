"""What each quantization costs in quality, against the most exact file, and the size it saves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from bench.charts import ACCENT, SECOND, as_svg, drawing, legend_name
from bench.page import Chart, Section, Table, byte_size, percent
from pipeline.results import Benchmark, Estimate, ExportedModels, FileQuality, TokenDivergence

TITLE = "Quality per quantization"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def quality_section(benchmark: Benchmark | None, exported: ExportedModels | None) -> Section | None:
    if benchmark is None or not (benchmark.quality or benchmark.quality_note):
        return None
    text = [] if benchmark.quality_note is None else [benchmark.quality_note]
    recommendation = benchmark.recommendation
    if recommendation is not None:
        text.insert(0, recommendation.reason)
    if not benchmark.quality:
        return Section(TITLE, tuple(text))
    sizes = {speed.model: speed.file_bytes for speed in benchmark.models if speed.file_bytes is not None}
    sizes |= {file.name: file.size_bytes for file in exported.files} if exported is not None else {}
    sized = [(quality, sizes[quality.model]) for quality in benchmark.quality if quality.model in sizes]
    charts = (Chart(lambda: _quality_chart(sized), _describe(sized)),) if len(sized) > 1 else ()
    return Section(TITLE, tuple(text), (_quality_table(benchmark.quality, sizes),), charts)


def _quality_table(qualities: Sequence[FileQuality], sizes: dict[str, int]) -> Table:
    def row(quality: FileQuality, kind: str, found: TokenDivergence) -> tuple[str, ...]:
        is_reference = quality.model == quality.reference
        return (
            quality.model,
            byte_size(sizes[quality.model]) if quality.model in sizes else "",
            kind,
            f"{found.tokens:,}",
            _interval(found.perplexity, ".2f"),
            "reference" if is_reference else _interval(found.mean_kl, ".4f"),
            "" if is_reference else f"{found.p99_kl:.3f}",
            "" if is_reference else _percents(found.top1_agreement),
        )

    rows = tuple(
        row(quality, kind, found)
        for quality in qualities
        for kind, found in (("whole", quality.whole), ("reasoning", quality.reasoning), ("answer", quality.answer))
        if found is not None
    )
    header = ("File", "Size", "Of", "Tokens", "Perplexity", "KL, mean", "KL, 99 %", "Same likeliest token")
    note = (
        f"On {qualities[0].records:,} held-out records, against {qualities[0].reference}; in brackets the 95 % "
        "interval over records. KL is the Kullback-Leibler divergence of the next-token probabilities (nats a token); "
        "0 is no loss."
    )
    return Table(header, "lrlrrrrr", rows, note)


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def _percents(estimate: Estimate) -> str:
    return f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)})"


def _describe(sized: Sequence[tuple[FileQuality, int]]) -> str:
    parts = [f"{quality.model} {byte_size(size)}, {quality.whole.mean_kl.value:.4f}" for quality, size in sized]
    return f"Size of each file and its mean divergence from the most exact one (nats a token): {'; '.join(parts)}."


def _quality_chart(sized: Sequence[tuple[FileQuality, int]]) -> str:
    """Mean divergence with its interval against the file's size; lower left is better."""
    with drawing(1, (5.6, 3.2 + 0.2 * len(sized))) as (figure, (axes,)):
        colours = [ACCENT] * len(_MARKERS) + [SECOND] * len(_MARKERS)
        for (quality, size), marker, colour in zip(sized, cycle(_MARKERS), cycle(colours)):
            divergence = quality.whole.mean_kl
            off = [[max(0.0, divergence.value - divergence.low)], [max(0.0, divergence.high - divergence.value)]]
            axes.errorbar(
                [size / 1e6], [divergence.value], yerr=off, color=colour, marker=marker, markersize=7, linestyle="none",
                label=legend_name(quality.model),
            )  # fmt: skip
        axes.set_xlabel("size of the file (MB)")
        axes.set_ylabel("mean divergence (nats a token)")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.1)
        figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=10)
        return as_svg(figure, "quality", "Quality against size", _describe(sized))
