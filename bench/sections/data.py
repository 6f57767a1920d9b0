"""What the model was trained and measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.charts import ACCENT, SECOND, as_svg, drawing, whole_ticks
from bench.page import Chart, Section, Table, percent
from pipeline.results import Distribution, PreparedData


def data_section(data: PreparedData | None) -> Section | None:
    if data is None:
        return None
    counts = (
        ("read", f"{data.read:,}"),
        ("for training", f"{data.train_rows:,}"),
        ("held out", f"{data.eval_rows:,}"),
        ("not used", f"{data.unused_rows:,}"),
        ("rejected", f"{data.rejected:,}"),
        *((f"rejected: {reason}", f"{count:,}") for reason, count in sorted(data.reject_reasons.items())),
        *((f"repaired: {kind}", f"{count:,}") for kind, count in sorted(data.repaired.items())),
        ("reasoning cut to fit the context", f"{data.cut_rows:,}"),
        ("cut off at the longest length, end of turn included", f"{data.truncated_rows:,}"),
        ("of these held out", f"{data.truncated_eval_rows:,}"),
        ("question of an earlier record", f"{data.repeated_questions:,}"),
        ("nearly equal to an earlier record", f"{data.near_duplicates:,}"),
        ("with reasoning", f"{data.with_reasoning:,}"),
        ("with options", f"{data.with_options:,}"),
    )
    lengths = [(f"{part}, words", distribution) for part, distribution in data.words.items()]
    lengths += [(f"{part}, tokens", distribution) for part, distribution in data.tokens.items()]
    rows = tuple((name, *(f"{value:,.0f}" for value in (d.minimum, d.median, d.p95, d.maximum))) for name, d in lengths)
    return Section(
        "Data",
        (f"Source: {data.source}.", _leakage_sentence(data)),
        (
            Table(("Records", "Number"), "lr", counts, caption="Records"),
            Table(("Length", "Minimum", "Median", "95 %", "Maximum"), "lrrrr", rows, caption="Lengths", folded=True),
        ),
        charts=(Chart(lambda: _length_histograms(data.tokens), _describe_lengths(data.tokens)),),
    )


def _leakage_sentence(data: PreparedData) -> str:
    leakage = data.leakage
    found = (
        f"{leakage.leaking_records:,} training records held at least {percent(leakage.overlap)} of the 8-grams of "
        f"{leakage.held_out_given_away:,} held-out ones"
    )
    if leakage.leaking_records == 0:
        found = f"No training record held {percent(leakage.overlap)} of a held-out record's 8-grams"
    elif leakage.policy == "drop":
        found += " and were left out"
    else:
        found += " and were trained on all the same, as data.leakage=keep asks: the held-out figures flatter the model"
    return (
        f"{found}. {leakage.held_out_sharing_an_8_gram:,} of {data.eval_rows:,} held-out records have some run of "
        "eight words in common with the training records used."
    )


def _describe_lengths(lengths: Mapping[Any, Distribution]) -> str:
    """The histograms in words."""
    parts = [f"{name} {d.median:,.0f} (95 % up to {d.p95:,.0f})" for name, d in lengths.items()]
    return f"Tokens per record, median: {', '.join(parts)}."


def _length_histograms(lengths: Mapping[Any, Distribution]) -> str:
    """How long the parts of the records are, a panel for each part, as an ``<svg>`` element."""
    rows = -(-len(lengths) // 2)
    with drawing(2, (5.6, 2.3 * rows), rows=rows) as (figure, panels):
        for axes in panels[len(lengths) :]:
            axes.set_visible(False)
        for axes, (name, spread) in zip(panels, lengths.items(), strict=False):
            bins = spread.histogram
            left = [bins.start + index * bins.width for index in range(len(bins.counts))]
            axes.bar(left, bins.counts, width=bins.width, align="edge", color=ACCENT)
            axes.axvline(spread.median, color=SECOND, linewidth=1.4, linestyle="--")
            axes.set_title(f"{name}: records by tokens", fontsize=11)
            axes.xaxis.set_major_locator(whole_ticks(4))
            axes.yaxis.set_major_locator(whole_ticks(4))
        return as_svg(figure, "lengths", "Lengths of the records", _describe_lengths(lengths))
