"""A sweep's charts: differences from the primary experiment with their intervals, and the training losses."""

from __future__ import annotations

from bench.charts import ACCENT, INK, SECOND, as_svg, drawing, whole_ticks
from bench.sweep_comparison import MEASURES
from bench.sweep_result import ExperimentRow, SweepResult

MOST_CURVES = 8  # more cannot be told apart
_DASHES = ("solid", "dashed", "dotted", "dashdot")


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


def with_curves(result: SweepResult) -> list[ExperimentRow]:
    """The experiments in the chart of losses: the primary, then the others in order, up to MOST_CURVES."""
    rows = [row for row in result.experiments if row.figures is not None and row.figures.loss_curve]
    return sorted(rows, key=lambda row: row.name != result.primary)[:MOST_CURVES]


def describe_losses(result: SweepResult) -> str:
    """The chart of losses in words."""
    ends = [
        f"{row.name} {row.figures.loss_curve[0].loss:.2f} to {row.figures.loss_curve[-1].loss:.2f}"
        for row in with_curves(result)
        if row.figures is not None
    ]
    return f"Training loss as logged, first to last: {', '.join(ends)}."


def loss_chart(result: SweepResult) -> str:
    """Training loss by step, a line for each experiment, as an ``<svg>`` element."""
    with drawing(1, (7.2, 3.4)) as (figure, (axes,)):
        for index, row in enumerate(with_curves(result)):
            if row.figures is None:
                continue
            first_half = index < len(_DASHES)
            axes.plot(
                [point.step for point in row.figures.loss_curve],
                [point.loss for point in row.figures.loss_curve],
                color=ACCENT if first_half else SECOND,
                linestyle=_DASHES[index % len(_DASHES)],
                linewidth=2.2 if row.name == result.primary else 1.4,
                label=row.name,
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.xaxis.set_major_locator(whole_ticks(8))
        axes.legend(frameon=False, fontsize=9)
        return as_svg(figure, "losses", "Training loss by optimizer step", describe_losses(result))
