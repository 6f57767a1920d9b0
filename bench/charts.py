"""Charts as inline SVG: no network, colours from the page's style sheet, a text alternative inside."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

# Stand-ins that become CSS colours, so that one drawing serves the light and the dark page.
INK, ACCENT, SECOND, SOFT = "#010101", "#020202", "#030303", "#040404"
_CSS_COLOURS = {INK: "currentColor", ACCENT: "var(--accent)", SECOND: "var(--second)", SOFT: "var(--soft)"}


_LONGEST_NAME = 44  # characters


@contextmanager
def drawing(
    columns: int, size: tuple[float, float], *, rows: int = 1, grid: Literal["x", "y"] = "y"
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure of panels in the page's style, closed afterwards; ``size`` in inches (a phone shows 5.6 well)."""
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
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        panels = list(axes.flat)
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis=grid, color=INK, alpha=0.15, linewidth=0.6)
            panel.set_axisbelow(True)
        try:
            yield figure, panels
        finally:
            plt.close(figure)


def whole_ticks(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, integer=True)


def legend_name(name: str) -> str:
    """A name as a legend can show it: no longer than a phone is wide, hidden by no underscore, no formula."""
    half = _LONGEST_NAME // 2
    shown = name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"
    return shown.replace("$", r"\$").lstrip("_")


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
