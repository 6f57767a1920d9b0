"""The report's loss curve: our training, the held-out points, and published runs beside them."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_report import measurements

from bench.loss_chart import describe_loss, loss_curve
from bench.report import build_page
from bench.run_folder import Run
from pipeline.config import Config, ReferenceRun, load_config
from pipeline.results import LossPoint, TrainedAdapter

PUBLISHED = ReferenceRun(name="second run", source="https://example.com/run", loss={10: 1.9188, 20: 1.4615, 60: 1.3140})


def trained(**changes: Any) -> TrainedAdapter:
    result = measurements()["train"]
    assert isinstance(result, TrainedAdapter)
    return result.model_copy(update=changes)


def evaluated_in_training() -> TrainedAdapter:
    losses = {0: 2.9, 10: 2.4, 20: 2.2, 30: 2.1, 40: 2.15, 50: 2.3, 60: 2.4}
    return trained(
        steps=60,
        planned_steps=100,
        stopped_early=True,
        kept_step=30,
        eval_loss_before=2.9,
        eval_loss_after=2.1,
        eval_loss=[LossPoint(step=step, loss=loss) for step, loss in losses.items()],
    )


def training_section(result: TrainedAdapter, config: Config) -> Any:
    run = Run({})
    run.trained = result
    section = build_page(config, run).section("Training")
    assert section is not None
    return section


def words(svg: str) -> list[str]:
    return [html.unescape(text).strip() for text in re.findall(r"<text[^>]*>(.*?)</text>", svg, flags=re.DOTALL)]


def test_published_losses_are_drawn_named_and_sourced() -> None:
    svg, text = loss_curve(trained(), [PUBLISHED]), describe_loss(trained(), [PUBLISHED])
    assert "second run" in words(svg) and "training" in words(svg)
    assert text.endswith(
        "For comparison, second run: 1.919 at step 10 and 1.314 at step 60 (source: https://example.com/run)."
    )
    assert html.escape(text) in svg
    assert "second run" not in words(loss_curve(trained()))


def test_the_r1_preset_shows_both_published_runs_beside_ours() -> None:
    ours = trained(steps=60, train_loss=[LossPoint(step=step, loss=2 - step / 100) for step in range(10, 61, 10)])
    section = training_section(ours, load_config("deepseek-r1-8b"))
    table = section.tables[1]
    assert table.header == ("Training loss at step", "This run", "reference run", "second public run of the recipe")
    assert table.rows[0] == ("10", "1.900", "1.914", "1.919") and table.rows[-1] == ("60", "1.400", "1.327", "1.314")
    assert "https://github.com/develops20/" in section.charts[0].text
    assert {"training", "reference run", "second public run of the recipe"} <= set(words(section.charts[0].draw()))


def test_steps_that_only_one_run_has_are_left_blank() -> None:
    config = load_config("smollm2-cpu").model_copy(
        update={"report": load_config("deepseek-r1-8b").report.model_copy(update={"reference_runs": (PUBLISHED,)})}
    )
    ours = trained(train_loss=[LossPoint(step=20, loss=1.5)])
    assert training_section(ours, config).tables[1].rows == (
        ("10", "", "1.919"),
        ("20", "1.500", "1.462"),
        ("60", "", "1.314"),
    )


def test_evaluations_in_training_and_the_kept_adapter_are_shown_and_told() -> None:
    result = evaluated_in_training()
    section = training_section(result, load_config("smollm2-cpu"))
    assert "2.100 after, with the adapter of step 30, the best of 6 evaluations." in section.charts[0].text
    assert {"held out", "the adapter that is kept"} <= set(words(section.charts[0].draw()))
    assert any(cell.startswith("60 of 100, then no further gain") for row in section.tables[0].rows for cell in row)


def test_steps_that_the_gradient_scaler_skipped_are_told_and_too_many_are_a_warning() -> None:
    config = load_config("smollm2-cpu")

    def cells_and_warnings(skipped: int) -> tuple[list[str], list[str]]:
        run = Run({})
        run.trained = trained(steps=60, skipped_steps=skipped)
        page = build_page(config, run)
        section = page.section("Training")
        assert section is not None
        cells = [row[1] for row in section.tables[0].rows if row[0] == "Skipped steps"]
        return cells, [line.text for line in page.decision if "skipped" in line.text and line.tone == "bad"]

    assert cells_and_warnings(0) == ([], [])
    (told,), warnings = cells_and_warnings(3)
    assert told.startswith("3 of 60 steps were skipped by the gradient scaler") and warnings == []
    (told,), warnings = cells_and_warnings(20)
    assert warnings == [told] and "set model.dtype=float32" in told


def test_a_run_that_logged_no_loss_still_has_its_held_out_points() -> None:
    assert describe_loss(trained(train_loss=[])).startswith("No training loss was logged; held-out loss 2.910")
    assert "held out, before and after" in words(loss_curve(trained(train_loss=[]), [PUBLISHED]))


_BOXES = """
<body style="margin:0;width:WIDTHpx;font:16px 'DejaVu Sans',sans-serif"><div>SVG</div><pre id="out"></pre><script>
const boxes = [...document.querySelectorAll("svg text")].map(each => {
  const box = each.getBoundingClientRect();
  return [each.textContent.trim(), box.left, box.top, box.right, box.bottom];
});
const frame = document.querySelector("svg").getBoundingClientRect();
const edges = [frame.left, frame.top, frame.right, frame.bottom];
document.getElementById("out").textContent = JSON.stringify([edges, boxes]);
</script></body>
"""


@pytest.mark.broad
@pytest.mark.parametrize("width", [360, 900])
def test_in_a_browser_no_label_lies_over_another_or_outside(width: int, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    longest_name = ReferenceRun(name="Run of somebody on Two Machines, Seed 42", source="x", loss=PUBLISHED.loss)
    runs = [*load_config("deepseek-r1-8b").report.reference_runs, longest_name]
    page = tmp_path / "page.html"
    svg = loss_curve(evaluated_in_training(), runs).replace("<svg ", '<svg width="100%" ', 1)
    page.write_text(_BOXES.replace("WIDTH", str(width)).replace("SVG", svg))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    [found] = re.findall(r'<pre id="out">(.*?)</pre>', dom, flags=re.DOTALL)
    frame, boxes = json.loads(html.unescape(found))
    assert len(boxes) >= 12
    for index, (name, left, top, right, bottom) in enumerate(boxes):
        assert frame[0] - 1 <= left and right <= frame[2] + 1 and frame[1] - 1 <= top and bottom <= frame[3] + 1, name
        for other, left2, top2, right2, bottom2 in boxes[index + 1 :]:
            apart = right <= left2 or right2 <= left or bottom <= top2 + 1 or bottom2 <= top + 1
            assert apart, f"{name!r} lies over {other!r}"
