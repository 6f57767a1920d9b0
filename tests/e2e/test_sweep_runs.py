"""Half of the shipped sweep on the embedded model, a few steps each, killed in the middle and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bench.sweep_comparison import MEASURES
from bench.sweep_result import SweepResult
from pipeline.artifacts import MANIFEST_NAME
from pipeline.sweep_file import EXPERIMENTS_DIR, load_sweep

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
SCALE = [
    "training.max_steps=4", "training.logging_steps=1", "verify.prompts=1", "evaluation.rows=20",
    "evaluation.max_new_tokens=8",
]  # fmt: skip
SHIPPED = EXPERIMENTS_DIR / "smollm2-cpu.yaml"
FIRST, SECOND = "learning_rate-0.003-r-16", "learning_rate-0.0003-r-16"


def command(experiments: Path, out: Path) -> list[str]:
    scale = [part for setting in SCALE for part in ("--set", setting)]
    return [sys.executable, "-m", "pipeline.cli", "sweep", str(experiments), "--out", str(out), "--json", *scale]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepResult, Path]:
    out = tmp_path_factory.mktemp("sweep")
    shipped = yaml.safe_load(SHIPPED.read_text())
    shipped["grid"]["lora.r"] = [16]
    experiments = tmp_path_factory.mktemp("experiments") / "smollm2-cpu.yaml"
    experiments.write_text(yaml.safe_dump(shipped, sort_keys=False))
    assert [experiment.name for experiment in load_sweep(str(experiments)).experiments] == [FIRST, SECOND]
    process = subprocess.Popen(
        command(experiments, out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (out / SECOND / "adapter").is_dir():
        assert process.poll() is None, "the sweep ended before its second experiment"
        time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = subprocess.run(command(experiments, out), cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    return SweepResult.model_validate(json.loads(again.stdout)), out


def test_what_was_done_before_the_kill_is_not_done_again(finished: tuple[SweepResult, Path]) -> None:
    _, out = finished
    log = (out / FIRST / "run.log").read_text()
    assert log.count("train: started") == log.count("evaluate: started") == 1
    assert "evaluate: up to date" in log
    assert "prepare: started" in log and "prepare: started" not in (out / SECOND / "run.log").read_text()


def test_every_experiment_has_its_figures(finished: tuple[SweepResult, Path]) -> None:
    result, out = finished
    assert [row.state for row in result.experiments] == ["done"] * 2
    for row in result.experiments:
        assert row.figures is not None and row.figures.steps == 4 and len(row.figures.loss_curve) == 4
        # 305,280 for each unit of rank: the inputs and outputs of all seven projections in thirty layers.
        assert row.figures.trainable_parameters == 305_280 * row.rank
        assert 1 < row.figures.held_out_loss < 5 and 0 < row.figures.rouge_l < 0.5 and 0 <= row.figures.bleu_4 < 0.5
        assert (out / row.name / "eval" / MANIFEST_NAME).is_file()
    assert result.held_out_records == 20 and set(result.best) == {measure.key for measure in MEASURES}


def test_a_rate_ten_times_lower_learns_less_in_four_steps(finished: tuple[SweepResult, Path]) -> None:
    result, _ = finished
    slow = next(row for row in result.experiments if row.name == SECOND)
    assert slow.differences["held_out_loss"].verdict == "worse"
