"""Charts as inline SVG: no network, colours from the page's style sheet, a text alternative inside."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.results import Distribution, TrainedAdapter

# Stand-ins that become CSS colours, so that one drawing serves the light and the dark page.
_INK, _ACCENT, _SECOND = "#010101", "#020202", "#030303"
_CSS_COLOURS = {_INK: "currentColor", _ACCENT: "var(--accent)", _SECOND: "var(--second)"}


def describe_loss(trained: TrainedAdapter) -> str:
    """The loss curve in words, for whoever does not see it."""
    before, after = trained.eval_loss_before, trained.eval_loss_after
    held_out = f"held-out loss {before:.3f} before training and {after:.3f} after"
    if not trained.train_loss:
        return f"No training loss was logged; {held_out}."
    first, last = trained.train_loss[0], trained.train_loss[-1]
    return f"Training loss {first.loss:.3f} at step {first.step} and {last.loss:.3f} at step {last.step}; {held_out}."


def loss_curve(trained: TrainedAdapter) -> str:
    """Training loss by step, and held-out loss before and after, as an ``<svg>`` element."""
    with _figure(1, (5.6, 3.2)) as (figure, (axes,)):
        steps = [point.step for point in trained.train_loss]
        losses = [point.loss for point in trained.train_loss]
        axes.plot(steps, losses, color=_ACCENT, linewidth=1.8, marker="o", markersize=3, label="training")
        axes.plot(
            [0, trained.steps],
            [trained.eval_loss_before, trained.eval_loss_after],
            color=_SECOND,
            linestyle="none",
            marker="D",
            markersize=6,
            label="held out, before and after",
        )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.legend(frameon=False)
        return _svg(figure, "loss", "Loss by optimizer step", describe_loss(trained))


def describe_lengths(lengths: Mapping[Any, Distribution]) -> str:
    """The histograms in words."""
    parts = [f"{name} {d.median:,.0f} (95 % up to {d.p95:,.0f})" for name, d in lengths.items()]
    return f"Tokens per record, median: {', '.join(parts)}."


def length_histograms(lengths: Mapping[Any, Distribution]) -> str:
    """How long the parts of the records are, a panel for each part, as an ``<svg>`` element."""
    with _figure(len(lengths), (2.6 * len(lengths), 2.4)) as (figure, panels):
        for axes, (name, spread) in zip(panels, lengths.items(), strict=True):
            bins = spread.histogram
            left = [bins.start + index * bins.width for index in range(len(bins.counts))]
            axes.bar(left, bins.counts, width=bins.width, align="edge", color=_ACCENT)
            axes.axvline(spread.median, color=_SECOND, linewidth=1.4, linestyle="--")
            axes.set_title(name, fontsize=11)
            axes.set_xlabel("tokens")
            axes.xaxis.set_major_locator(_ticks(4))
            axes.yaxis.set_major_locator(_ticks(4))
        panels[0].set_ylabel("records")
        return _svg(figure, "lengths", "Lengths of the records", describe_lengths(lengths))


@contextmanager
def _figure(columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, list[Any]]]:
    """A figure of ``columns`` panels in the page's style, closed afterwards; ``size`` in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "medcot",  # the same numbers give the same file
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
        panels = list(axes[0])
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", color=_INK, alpha=0.15, linewidth=0.6)
            panel.set_axisbelow(True)
        try:
            yield figure, panels
        finally:
            plt.close(figure)


def _ticks(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, integer=True)


def _svg(figure: Any, name: str, title: str, description: str) -> str:
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
