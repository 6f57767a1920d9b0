"""What the report and the model card are made of: sections, tables and charts, and how figures read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from bench.statistics import percentile
from pipeline.results import Sample

# Cells that a reader must not miss: they are in red.
_FAILURES = frozenset({"FAILED", "failed", "gate failed", "damaged"})
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:ms|s|min|h|kB|MB|GB|J)\b|%)")
TEMPLATES = Path(__file__).resolve().parent / "templates"
Tone = Literal["good", "bad", "neutral"]


@dataclass(frozen=True)
class Line:
    """One sentence of the decision and how it is meant."""

    text: str
    tone: Tone = "neutral"


@dataclass(frozen=True)
class Table:
    """``align`` has a letter a column, l or r; every row has as many cells as ``header``.

    A ``folded`` one is closed on the page until asked for: what only a doubt makes worth reading.
    """

    header: tuple[str, ...]
    align: str
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """``draw`` gives an ``<svg>`` element; ``text`` says the same in words for whoever does not see it."""

    draw: Callable[[], str]
    text: str


@dataclass(frozen=True)
class Section:
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    samples: tuple[Sample, ...] = ()
    code: str | None = None


@dataclass(frozen=True)
class Page:
    name: str
    decision: tuple[Line, ...]
    disclaimer: str
    sections: tuple[Section, ...]

    def section(self, title: str) -> Section | None:
        return next((section for section in self.sections if section.title == title), None)


def render(template: str, **values: Any) -> str:
    """One of ``bench/templates`` with ``values``; HTML is escaped by itself, Markdown by its filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.globals["failures"] = _FAILURES
    environment.filters["units"] = _units
    environment.filters["cell"] = _markdown_cell
    environment.filters["fenced"] = _fenced
    return environment.get_template(template).render(**values)


def byte_size(count: int) -> str:
    """Decimal units, as disks and downloads are counted."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.2f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{count} bytes"


def percent(share: float) -> str:
    """Whole percent, except close to the ends, where rounding would claim all or nothing."""
    text = f"{100 * share:.0f} %"
    return f"{100 * share:.1f} %" if text in ("0 %", "100 %") and share not in (0.0, 1.0) else text


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    median = percentile(values, 0.5)
    return f"{median:,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def _units(text: str) -> str:
    """Numbers stay on one line with their units."""
    return _BEFORE_UNIT.sub("\N{NO-BREAK SPACE}", text)


def _markdown_cell(text: str) -> str:
    """Text inside a Markdown table or sentence: no cell border, no line break, no markup of its own."""
    for character in "\\`*_<>[]|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _fenced(text: str, language: str = "text") -> str:
    """Text as a Markdown code block whose fence is longer than any run of backticks inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
