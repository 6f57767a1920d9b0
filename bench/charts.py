"""Charts as inline SVG: no network, colours from the page's style sheet, a text alternative inside."""

from __future__ import annotations

import html
import io
import re
from typing import Any

from pipeline.results import TrainedAdapter

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
        figure, axes = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
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
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_INK, alpha=0.15, linewidth=0.6)
        axes.legend(frameon=False)
        svg = _svg(figure, "Loss by optimizer step", describe_loss(trained))
        plt.close(figure)
    return svg


def _svg(figure: Any, title: str, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg [^>]*?)\s(?:width|height)="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg [^>]*?)\s(?:width|height)="[^"]*"', r"\1", body, count=1)
    for stand_in, colour in _CSS_COLOURS.items():
        body = body.replace(stand_in, colour)
    label = '<svg role="img" aria-labelledby="chart-title chart-text" '
    names = f'<title id="chart-title">{html.escape(title)}</title>'
    names += f'<desc id="chart-text">{html.escape(description)}</desc>'
    body = body.replace("<svg ", label, 1)
    end_of_tag = body.index(">") + 1
    return body[:end_of_tag] + names + body[end_of_tag:]
