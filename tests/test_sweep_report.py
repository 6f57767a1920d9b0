"""A sweep's result as Markdown, HTML and JSON: one content, failures shown, noise not called a finding."""

import re
from pathlib import Path

import pytest

from bench.loss_chart import MOST_CURVES, describe_losses
from bench.sweep_charts import describe_differences, loss_points
from bench.sweep_comparison import MEASURES, Difference
from bench.sweep_report import build_page, decide, print_result, write_result
from bench.sweep_result import ExperimentRow, Figures, SweepResult
from pipeline.results import LossPoint

NAMES = [measure.key for measure in MEASURES]


def figures(loss: float) -> Figures:
    return Figures(
        steps=20,
        epochs=2,
        train_loss=loss - 0.1,
        held_out_loss=loss,
        held_out_loss_in_training=loss,
        rouge_l=0.328,
        bleu_4=0.09,
        trainable_parameters=12_615_680,
        train_seconds=1056,
        peak_memory_bytes=5_000_000_000,
        loss_curve=[LossPoint(step=10, loss=loss + 1), LossPoint(step=20, loss=loss)],
    )


def row(name: str, loss: float | None, differences: tuple[Difference, ...] = (), **values: object) -> ExperimentRow:
    settings = {
        "name": name,
        "state": "failed" if loss is None else "done",
        "failure": "Error in train: no memory | left" if loss is None else None,
        "changes": {"lora.r": 8},
        "learning_rate": 5e-5,
        "rank": 8,
        "alpha": 16,
        "effective_batch": 16,
        "figures": None if loss is None else figures(loss),
        "differences": dict(zip(NAMES, differences, strict=True)) if differences else {},
        "not_compared": None if differences else "it failed",
    }
    return ExperimentRow.model_validate({**settings, **values})


def difference(value: float, verdict: str) -> Difference:
    return Difference.model_validate({"value": value, "low": value - 0.02, "high": value + 0.02, "verdict": verdict})


@pytest.fixture
def result() -> SweepResult:
    none = difference(0.001, "no difference shown")
    return SweepResult(
        name="cards",
        primary="first",
        held_out_records=200,
        quantization="Q8_0",
        comparisons=6,
        bleu_signature="nrefs:1|tok:13a",
        best={"held_out_loss": "better", "rouge_l": "noisy", "bleu_4": "first"},
        experiments=[
            row("first", 2.0, not_compared="it is the primary experiment", changes={}),
            row("better", 1.9, (difference(-0.1, "better"), none, none)),
            row("noisy", 2.001, (none, none, none)),
            row("broken", None),
        ],
    )


def test_the_decision_tells_findings_from_noise(result: SweepResult) -> None:
    lines = [line.text for line in decide(result)]
    assert lines == [
        "3 of 4 experiments are done; failed: broken.",
        "Held-out loss: better has the best value, 1.900; against first: better, -0.1000 (-0.1200 to -0.0800).",
        "ROUGE-L: noisy has the best value, 0.328; against first: no difference shown, +0.0010 (-0.0190 to +0.0210).",
        "BLEU-4: first (primary) has the best value, 0.090.",
    ]
    assert [line.tone for line in decide(result)] == ["bad", "good", "neutral", "neutral"]


def test_the_table_has_every_column_and_marks_the_best(result: SweepResult, tmp_path: Path) -> None:
    write_result(result, tmp_path)
    text = (tmp_path / "sweep.md").read_text()
    assert "| better | 5e-05 | 8, 16 | 2 | 16 | 1.800 | 1.900 (best) | 0.328 | 0.090 |" in text.splitlines()
    assert "| better | lora.r = 8 | 12,615,680 | 17 min 36 s | 5.00 GB |  |" in text.splitlines()
    assert re.search(r"\| broken \| 5e-05 \| 8, 16 \|  \| 16 \| FAILED \|", text)
    assert "Error in train: no memory \\| left" in text
    assert "broken is not compared: it failed." in text
    assert "hold together with 95% confidence" in text and "paired bootstrap" in text


def test_the_page_is_self_contained_and_its_charts_have_words(result: SweepResult, tmp_path: Path) -> None:
    write_result(result, tmp_path)
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("<svg ") == 2 and page.count("<desc id=") == 2
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page) and "<script" not in page
    assert describe_differences(result).endswith("a difference is shown for better in Held-out loss.")
    titles = [section.title for section in build_page(result).sections]
    assert titles == ["Experiments", "Against first", "Training loss"]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_json_is_the_whole_result(result: SweepResult, tmp_path: Path) -> None:
    write_result(result, tmp_path)
    assert SweepResult.model_validate_json((tmp_path / "sweep.json").read_bytes()) == result


def test_a_sweep_of_which_nothing_is_left_still_has_a_page(result: SweepResult, tmp_path: Path) -> None:
    nothing = result.model_copy(
        update={
            "experiments": [row("first", None), row("other", None)],
            "best": {},
            "held_out_records": None,
            "quantization": None,
        }
    )
    write_result(nothing, tmp_path)
    assert "0 of 2 experiments are done; failed: first, other." in (tmp_path / "sweep.md").read_text()
    assert "<svg" not in (tmp_path / "sweep.html").read_text()


def test_the_terminal_shows_it_in_eighty_columns(
    result: SweepResult, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_result(result)
    shown = capsys.readouterr().out
    assert max(map(len, shown.split("3 of 4")[0].splitlines())) <= 80
    assert all(text in shown for text in ("failed", "1.900", "0.328", "17 min"))


def test_no_more_curves_than_can_be_told_apart(result: SweepResult) -> None:
    many = result.model_copy(
        update={"primary": "e9", "experiments": [row(f"e{number}", 2.0) for number in range(MOST_CURVES + 4)]}
    )
    points = loss_points(many)
    assert list(points)[:MOST_CURVES] == ["e9", *(f"e{number}" for number in range(MOST_CURVES - 1))]
    assert describe_losses(points).endswith("; 4 more are not drawn.")
