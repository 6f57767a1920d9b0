"""Charts as inline SVG: no network, colours from the page's style sheet, a text alternative inside."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from pipeline.config import ReferenceRun
from pipeline.results import Distribution, LossPoint, TrainedAdapter

# Stand-ins that become CSS colours, so that one drawing serves the light and the dark page.
INK, ACCENT, SECOND, _SOFT = "#010101", "#020202", "#030303", "#040404"
_CSS_COLOURS = {INK: "currentColor", ACCENT: "var(--accent)", SECOND: "var(--second)", _SOFT: "var(--soft)"}
# Published runs share a colour; these tell them apart, without colour too.
_REFERENCE_STYLES = ({"linestyle": "--", "marker": "s"}, {"linestyle": ":", "marker": "^"}, {"linestyle": "-."})
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
                color=_SOFT,
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


def describe_lengths(lengths: Mapping[Any, Distribution]) -> str:
    """The histograms in words."""
    parts = [f"{name} {d.median:,.0f} (95 % up to {d.p95:,.0f})" for name, d in lengths.items()]
    return f"Tokens per record, median: {', '.join(parts)}."


def length_histograms(lengths: Mapping[Any, Distribution]) -> str:
    """How long the parts of the records are, a panel for each part, as an ``<svg>`` element."""
    with drawing(len(lengths), (2.6 * len(lengths), 2.4)) as (figure, panels):
        for axes, (name, spread) in zip(panels, lengths.items(), strict=True):
            bins = spread.histogram
            left = [bins.start + index * bins.width for index in range(len(bins.counts))]
            axes.bar(left, bins.counts, width=bins.width, align="edge", color=ACCENT)
            axes.axvline(spread.median, color=SECOND, linewidth=1.4, linestyle="--")
            axes.set_title(name, fontsize=11)
            axes.set_xlabel("tokens")
            axes.xaxis.set_major_locator(whole_ticks(4))
            axes.yaxis.set_major_locator(whole_ticks(4))
        panels[0].set_ylabel("records")
        return as_svg(figure, "lengths", "Lengths of the records", describe_lengths(lengths))


@contextmanager
def drawing(columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, list[Any]]]:
    """A figure of ``columns`` panels in the page's style, closed afterwards; ``size`` in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "medcot",  # the same numbers give the same file
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
        panels = list(axes[0])
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
            panel.set_axisbelow(True)
        try:
            yield figure, panels
        finally:
            plt.close(figure)


def whole_ticks(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, integer=True)


def as_svg(figure: Any, name: str, title: str, description: str) -> str:
    """``name`` keeps the ids of several charts on one page apart."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg [^>]*?)\s(?:width|height)="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg [^>]*?)\s(?:width|height)="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for stand_in, colour in _CSS_COLOURS.items():
        body = body.replace(stand_in, colour)
    label = f'<svg role="img" aria-labelledby="{name}-chart-title {name}-chart-text" '
    names = f'<title id="{name}-chart-title">{html.escape(title)}</title>'
    names += f'<desc id="{name}-chart-text">{html.escape(description)}</desc>'
    body = body.replace("<svg ", label, 1)
    end_of_tag = body.index(">") + 1
    return body[:end_of_tag] + names + body[end_of_tag:]
