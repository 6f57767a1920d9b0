"""A sweep's charts: differences from the primary experiment with their intervals, and what the training losses are."""

from __future__ import annotations

from bench.charts import ACCENT, INK, as_svg, drawing
from bench.sweep_comparison import MEASURES
from bench.sweep_result import ExperimentRow, SweepResult
from pipeline.results import LossPoint


def compared(result: SweepResult) -> list[ExperimentRow]:
    return [row for row in result.experiments if row.differences]


def describe_differences(result: SweepResult) -> str:
    """The chart of differences in words."""
    apart = [
        f"{row.name} in {measure.name}"
        for row in compared(result)
        for measure in MEASURES
        if row.differences[measure.key].verdict in ("better", "worse")
    ]
    found = f"a difference is shown for {', '.join(apart)}" if apart else "none shows a difference"
    return f"Difference from {result.primary}, with {result.joint_confidence:.0%} intervals for all together; {found}."


def differences_chart(result: SweepResult) -> str:
    """A panel for each measure, a line for each experiment, as an ``<svg>`` element."""
    rows = compared(result)
    with drawing(len(MEASURES), (2.6 * len(MEASURES), 1.1 + 0.38 * len(rows))) as (figure, panels):
        for axes, measure in zip(panels, MEASURES, strict=True):
            axes.axvline(0, color=INK, linewidth=1.0)
            for place, row in enumerate(rows):
                difference = row.differences[measure.key]
                colour = ACCENT if difference.verdict in ("better", "worse") else INK
                axes.plot([difference.low, difference.high], [place, place], color=colour, linewidth=1.8)
                axes.plot(difference.value, place, color=colour, marker="o", markersize=5)
            axes.set_title(
                f"{measure.name} ({'higher' if measure.higher_is_better else 'lower'} is better)", fontsize=9
            )
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_yticks(range(len(rows)), [row.name for row in rows] if axes is panels[0] else [""] * len(rows))
            axes.margins(x=0.08)
            axes.locator_params(axis="x", nbins=4)
        return as_svg(figure, "differences", f"Difference from {result.primary}", describe_differences(result))


def loss_points(result: SweepResult) -> dict[str, list[LossPoint]]:
    """The losses of every experiment that logged some: the primary's, then the others' in order."""
    rows = sorted(result.experiments, key=lambda row: row.name != result.primary)
    return {row.name: row.figures.loss_curve for row in rows if row.figures is not None and row.figures.loss_curve}
