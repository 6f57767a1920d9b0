"""The loss curve of a training, with published runs beside it, and those of several trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from bench.charts import ACCENT, SECOND, SOFT, as_svg, drawing, legend_name, whole_ticks
from pipeline.config import ReferenceRun
from pipeline.results import LossPoint, TrainedAdapter

# Published runs share a colour; these tell them apart, without colour too.
_REFERENCE_STYLES = ({"linestyle": "--", "marker": "s"}, {"linestyle": ":", "marker": "^"}, {"linestyle": "-."})
MOST_CURVES = 8  # more cannot be told apart
_DASHES = ("solid", "dashed", "dotted", "dashdot")
_LEGEND_COLUMN = 34  # characters that fit when two entries stand side by side


def describe_loss(trained: TrainedAdapter, references: Sequence[ReferenceRun] = ()) -> str:
    """The loss curve in words, for whoever does not see it, with the sources of what is not ours."""
    before, after = trained.eval_loss_before, trained.eval_loss_after
    held_out = f"held-out loss {before:.3f} before training and {after:.3f} after"
    if trained.kept_step not in (None, trained.steps):
        during = sum(point.step > 0 for point in trained.eval_loss)
        held_out += f", with the adapter of step {trained.kept_step}, the best of {during} evaluations"
    training = "No training loss was logged"
    if trained.train_loss:
        training = f"Training loss {_ends({point.step: point.loss for point in trained.train_loss})}"
    published = [f" For comparison, {run.name}: {_ends(run.loss)} (source: {run.source})." for run in references]
    return f"{training}; {held_out}.{''.join(published)}"


def _ends(losses: Mapping[int, float]) -> str:
    first, last = min(losses), max(losses)
    return f"{losses[first]:.3f} at step {first} and {losses[last]:.3f} at step {last}"


def loss_curve(trained: TrainedAdapter, references: Sequence[ReferenceRun] = ()) -> str:
    """Training and held-out loss by step, with the published training losses, as an ``<svg>`` element."""
    with drawing(1, (5.6, 3.6)) as (figure, (axes,)):
        steps = [point.step for point in trained.train_loss]
        losses = [point.loss for point in trained.train_loss]
        axes.plot(steps, losses, color=ACCENT, linewidth=1.8, marker="o", markersize=3, zorder=3, label="training")
        held_out = trained.eval_loss or [
            LossPoint(step=0, loss=trained.eval_loss_before),
            LossPoint(step=trained.steps, loss=trained.eval_loss_after),
        ]
        during_training = len(held_out) > 2
        axes.plot(
            [point.step for point in held_out],
            [point.loss for point in held_out],
            color=SECOND,
            linewidth=1.2,
            linestyle="-" if during_training else "none",
            marker="D",
            markersize=4 if during_training else 6,
            zorder=4,
            label="held out" if during_training else "held out, before and after",
        )
        if trained.kept_step not in (None, trained.steps):
            axes.plot(
                [trained.kept_step],
                [trained.eval_loss_after],
                color=SECOND,
                linestyle="none",
                marker="o",
                markersize=12,
                fillstyle="none",
                label="the adapter that is kept",
            )
        for run, style in zip(references, cycle(_REFERENCE_STYLES)):
            published = dict(sorted(run.loss.items()))
            axes.plot(
                list(published),
                list(published.values()),
                color=SOFT,
                linewidth=1.4,
                markersize=4,
                label=run.name,
                **style,
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        names = [str(label) for label in axes.get_legend_handles_labels()[1]]
        side_by_side = all(len(name) <= _LEGEND_COLUMN for name in names)
        # Below the axes, where it can lie over no curve.
        figure.legend(loc="outside lower center", ncols=2 if side_by_side else 1, frameon=False, fontsize=10)
        return as_svg(figure, "loss", "Loss by optimizer step", describe_loss(trained, references))


def describe_losses(curves: Mapping[str, Sequence[LossPoint]]) -> str:
    """Several runs' training losses in words."""
    ends = [f"{name} {points[0].loss:.2f} to {points[-1].loss:.2f}" for name, points in _drawn(curves)]
    left_out = len([points for points in curves.values() if points]) - len(ends)
    more = f"; {left_out} more are not drawn" if left_out else ""
    return f"Training loss as logged, first to last: {', '.join(ends)}{more}."


def loss_curves(curves: Mapping[str, Sequence[LossPoint]], main: str) -> str:
    """Training loss by step, a line for each run and the ``main`` one thicker, as an ``<svg>`` element."""
    with drawing(1, (6.4, 3.6)) as (figure, (axes,)):
        for index, (name, points) in enumerate(_drawn(curves)):
            axes.plot(
                [point.step for point in points],
                [point.loss for point in points],
                color=ACCENT if index < len(_DASHES) else SECOND,
                linestyle=_DASHES[index % len(_DASHES)],
                linewidth=2.2 if name == main else 1.4,
                label=legend_name(name),
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.xaxis.set_major_locator(whole_ticks(8))
        figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=10)
        return as_svg(figure, "losses", "Training loss by optimizer step", describe_losses(curves))


def _drawn(curves: Mapping[str, Sequence[LossPoint]]) -> list[tuple[str, Sequence[LossPoint]]]:
    return [(name, points) for name, points in curves.items() if points][:MOST_CURVES]
