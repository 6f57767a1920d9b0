"""Several runs on one page: settings that differ, paired differences on the same records, and why there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_report import TUNED, Page, measurements
from test_run_folder import fail, make_run

from bench.evaluate import stage_records, stage_settings
from bench.kept_records import records_path
from bench.page import render
from bench.record_outcome import RecordOutcome, record_keys
from bench.report_command import report_runs
from bench.run_comparison import ComparisonReport, comparison, differing_settings, open_runs
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.results import EngineName, Evaluation

RECORDS = 40


def evaluated_run(run_dir: Path, config: Config, answer_nll: float, engine: EngineName = "llama.cpp") -> Path:
    """A run whose evaluation has kept its records; the answers' likelihoods are ``answer_nll`` nats a token, or so."""
    results = measurements()
    evaluated = Evaluation.model_validate(results["evaluate"].model_dump())
    answered = [model.model_copy(update={"engine": engine}) for model in evaluated.models]
    make_run(run_dir, results | {"evaluate": evaluated.model_copy(update={"models": answered})}, config)
    lines = [
        {"Question": f"Question {index}?", "Complex_CoT": f"Thought {index}.", "Response": f"Answer {index}."}
        for index in range(RECORDS)
    ]
    (run_dir / "data" / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = run_dir / "gguf" / TUNED
    model.write_bytes(run_dir.name.encode())
    records = stage_records(config, run_dir / "data")
    outcomes = [
        RecordOutcome(
            key=key,
            reasoning_nll=20.0 + index % 3,
            reasoning_tokens=10,
            answer_nll=10 * answer_nll + index % 5,
            answer_tokens=10,
            output="<think>t</think>a",
            answer="a",
            thought_tokens=1,
            well_formed=index % 4 > 0,
            closed_thought=True,
            looping=False,
            finished=True,
            new_tokens=8,
            rouge_1=0.3,
            rouge_2=0.1,
            rouge_l=0.2,
            bleu_counts=[1, 0, 0, 0, 1, 0, 0, 0, 1, 1],
        )
        for index, key in enumerate(record_keys(model, records, stage_settings(config)))
    ]
    # In another order than the records', as an interrupted evaluation leaves them.
    text = "".join(outcome.model_dump_json() + "\n" for outcome in reversed(outcomes))
    records_path(run_dir / "eval", model).write_text(text)
    return run_dir


def config_of(name: str, **changes: Any) -> Config:
    return Config.model_validate({"name": name, "evaluation": {"rows": RECORDS}, **changes})


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    longer = {"training": {"learning_rate": 5e-5}, "lora": {"r": 8}}
    return [
        evaluated_run(tmp_path / "first", config_of("first"), 2.0),
        evaluated_run(tmp_path / "second", config_of("second", **longer), 1.5),
    ]


def text_of(folders: list[Path]) -> str:
    return render("report.md.j2", page=comparison(open_runs(folders))[0]).replace("\\", "")


def test_the_same_records_are_compared_in_pairs(runs: list[Path]) -> None:
    _, document = comparison(open_runs(runs))
    found = {each.metric: each for each in document.differences}
    assert {each.model for each in document.differences} == {"second"}
    assert found["answer_perplexity"].verdict == "better" and found["answer_perplexity"].n == RECORDS
    # Every record improved by as much, so that the paired interval is narrower than either perplexity's.
    assert found["answer_perplexity"].high < 0
    assert found["well_formed"].verdict == found["reasoning_perplexity"].verdict == "no difference shown"
    assert document.not_compared == {}
    text = text_of(runs)
    assert "second is better than first: " in text and "Perplexity of the reference answer" in text
    assert "second is worse" not in text


def test_what_differs_in_the_configuration_is_listed_and_nothing_else(runs: list[Path]) -> None:
    configs = [each.config for each in open_runs(runs)]
    assert differing_settings(configs) == {
        "lora.r": [16, 8],
        "training.learning_rate": [configs[0].training.learning_rate, 5e-5],
    }
    assert "| lora.r | 16 | 8 |" in text_of(runs)


def test_other_records_are_not_compared_and_the_reason_is_told(runs: list[Path], tmp_path: Path) -> None:
    fewer = evaluated_run(tmp_path / "fewer", config_of("fewer", evaluation={"rows": RECORDS - 10}), 1.0)
    elsewhere = evaluated_run(tmp_path / "elsewhere", config_of("elsewhere"), 1.0, "transformers")
    cut = evaluated_run(tmp_path / "cut", config_of("cut", data={"too_long": "truncate"}), 1.0)
    gone = evaluated_run(tmp_path / "gone", config_of("gone"), 1.0)
    (gone / "gguf" / TUNED).unlink()
    failed = make_run(tmp_path / "failed", measurements(), config_of("failed"))
    fail(failed, "evaluate", "The disk is full", 1)
    _, document = comparison(open_runs([*runs, fewer, elsewhere, cut, gone, failed]))
    assert {each.model for each in document.differences} == {"second"}
    assert document.not_compared.keys() == {"fewer", "elsewhere", "cut", "gone", "failed"}
    text = text_of([*runs, fewer, gone, failed])
    assert "No verdict on fewer against first: first was evaluated on other records or in another way." in text
    assert "does not hold the evaluated records" in document.not_compared["gone"]
    assert "failed has no finished evaluation" in document.not_compared["failed"]
    assert "evaluate failed." in text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, measurements()) for name in ("a", "b")]
    assert [each.name for each in open_runs(folders)] == [str(folder) for folder in folders]


def test_a_run_without_anything_does_not_stop_the_comparison(runs: list[Path], tmp_path: Path) -> None:
    empty = make_run(tmp_path / "empty", {}, config_of("empty"))
    assert "empty: no GGUF; not verified." in text_of([empty, *runs])
    with pytest.raises(MedcotError, match="no run's folder"):
        open_runs([*runs, tmp_path])


def test_the_page_is_whole_and_the_json_fits_its_schema(runs: list[Path], tmp_path: Path) -> None:
    path, document = report_runs(runs, tmp_path / "out")
    assert Page(path.read_text()).open == []
    written = json.loads((path.parent / "report.json").read_text())
    jsonschema.validate(written, json.loads((path.parent / written["$schema"]).read_text()))
    assert ComparisonReport.model_validate(written) == document
    assert [each["name"] for each in written["runs"]] == ["first", "second"]
    assert not (path.parent / "MODEL_CARD.md").exists()
