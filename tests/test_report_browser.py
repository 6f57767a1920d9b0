"""The report in a real browser, at the widths of a phone and of a desk, light and dark, and printed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_report import BASE, TUNED, measurements
from test_run_comparison import config_of, evaluated_run
from test_run_folder import fail, make_run

from bench.report_command import report_runs
from pipeline.results import Evaluation

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.broad
WIDTHS = (360, 390, 1280)
LEAST_CONTRAST = 4.5  # WCAG 2.2, success criterion 1.4.3, for text of ordinary size
LEAST_TEXT = 7.5  # CSS pixels on a phone of 360

# What lies wider than the page without a box of its own to scroll in.
OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter(each => {
  if (each.closest(".scroll, pre, svg") && !each.matches(".scroll, pre, svg")) return false;
  const box = each.getBoundingClientRect();
  return box.width > 1 && (box.right > document.documentElement.clientWidth + 1 || box.left < -1);
}).map(each => each.outerHTML.slice(0, 120))"""

# Every text of a drawing with its box, its size, and the drawing's box.
LABELS = """() => [...document.querySelectorAll("svg")].map(svg => ({
  frame: (box => [box.left, box.top, box.right, box.bottom])(svg.getBoundingClientRect()),
  labels: [...svg.querySelectorAll("text")].map(each => {
    const box = each.getBoundingClientRect();
    return [each.textContent.trim(), box.left, box.top, box.right, box.bottom];
  }).filter(each => each[0]),
}))"""

# Contrast ratio (WCAG) of every text outside drawings with the nearest background behind it.
CONTRASTS = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const linear = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const background = element => {
    for (let each = element; each; each = each.parentElement) {
      const colour = parse(getComputedStyle(each).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let node; (node = texts.nextNode());) {
    if (!node.textContent.trim()) continue;
    const element = node.parentElement;
    const svg = element.closest("svg");
    const colour = parse(getComputedStyle(element)[svg ? "fill" : "color"]);
    if (svg && element.closest("title, desc, style")) continue;
    const [a, b] = [luminance(colour), luminance(background(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), node.textContent.trim().slice(0, 60)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole run with awkward outputs, one that a gate has stopped, an empty one, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    results = measurements()
    evaluation = results["evaluate"]
    assert isinstance(evaluation, Evaluation)
    awkward = evaluation.samples[0].model_copy(
        update={
            "question": "Überempfindlichkeit" * 12 + " <b>?</b>",
            "outputs": {TUNED: "pneumonoultramicroscopic" * 300, BASE: "مرحبا " * 400 + "\u202e" + "界" * 2000},
        }
    )
    results["evaluate"] = evaluation.model_copy(update={"samples": [awkward, *evaluation.samples]})
    whole = make_run(folder / "whole", results)
    stopped = make_run(folder / "stopped", measurements())
    fail(stopped, "evaluate", f"The gate failed: {'x' * 300} must be at least 0.8", 3)
    runs = [
        evaluated_run(folder / name, config_of(name), 2.0 - index / 10) for index, name in enumerate(("a", "b" * 90))
    ]
    asked = {"whole": [whole], "stopped": [stopped], "empty": [make_run(folder / "empty", {})], "comparison": runs}
    return {name: report_runs(folders, folder / f"{name}-report")[0] for name, folders in asked.items()}


@pytest.mark.parametrize("name", ["whole", "stopped", "empty", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_overlaps_or_fades(name: str, scheme: Any, browser: Browser, pages: dict[str, Path]) -> None:
    for width in WIDTHS:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(pages[name].as_uri())
        page.evaluate("() => document.querySelectorAll('details').forEach(each => each.open = true)")
        assert asked == [pages[name].as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OVERFLOWING) == [], width
        faint = [each for each in page.evaluate(CONTRASTS) if each[0] < LEAST_CONTRAST]
        assert faint == [], width
        for drawing in page.evaluate(LABELS):
            check_labels(drawing["frame"], drawing["labels"])
        context.close()


def check_labels(frame: list[float], labels: list[list[Any]]) -> None:
    """Readable, inside the drawing, and none over another."""
    for name, left, top, right, bottom in labels:
        assert frame[0] - 1 <= left and right <= frame[2] + 1 and frame[1] - 1 <= top and bottom <= frame[3] + 1, name
        assert bottom - top >= LEAST_TEXT, name
    for (name, *one), (other, *two) in itertools.combinations(labels, 2):
        apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] + 1 or two[3] <= one[1] + 1
        assert apart, f"{name!r} lies over {other!r}"


@pytest.mark.parametrize("name", ["whole", "comparison"])
def test_a_screen_reader_finds_a_name_for_every_picture_and_table(
    name: str, browser: Browser, pages: dict[str, Path]
) -> None:
    page = browser.new_page()
    page.goto(pages[name].as_uri())
    for picture in page.locator("svg, img").all():
        labelled = (picture.get_attribute("aria-labelledby") or "").split()
        texts = [page.locator(f"[id='{each}']").text_content() for each in labelled]
        assert picture.get_attribute("role") == "img" and len(texts) == 2 and all(texts)
    assert page.locator(".scroll:not([aria-label])").count() == 0
    headings = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(each => Number(each.tagName[1]))")
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    page.close()


def test_the_first_screen_of_a_phone_is_the_decision(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(pages["whole"].as_uri())
    bottoms = page.evaluate("[...document.querySelectorAll('.decision li')].map(e => e.getBoundingClientRect().bottom)")
    assert max(bottoms[:6]) < 844
    page.close()


def test_printed_nothing_is_cut_off_or_left_out(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 700, "height": 1000})  # A4 less its margins, at 96 dots an inch
    page.goto(pages["whole"].as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    assert page.evaluate(OVERFLOWING) == []
    hidden = page.evaluate(
        "[...document.querySelectorAll('details td')].filter(e => !e.getClientRects().length).length"
    )
    assert hidden == 0
    clipped = "[...document.querySelectorAll('pre, .scroll')].filter(e => e.scrollHeight > e.clientHeight + 1).length"
    assert page.evaluate(clipped) == 0
    page.close()
