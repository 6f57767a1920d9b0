"""The whole pipeline on the real small model, trained once, killed in the middle, shared by every test here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.artifacts import Artifact, read_manifest
from pipeline.checkpoints import SEAL_NAME
from pipeline.plan import Plan
from pipeline.results import Benchmark, Evaluation, ExportedModels, PreparedData, TrainedAdapter, Verification
from pipeline.run import STAGES

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
GIGABYTE = 1e9


@dataclass(frozen=True)
class FinishedRun:
    run_dir: Path
    output: str
    messages: str

    def folder(self, name: str) -> Path:
        return self.run_dir / next(stage.folder for stage in STAGES if stage.name == name)


def command(run_dir: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", "run", "--run-dir", str(run_dir), *arguments]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The default run, killed with -9 after its first checkpoint and started again.

    MEDCOT_E2E_RUN names a finished run to examine instead, for whoever works on these tests.
    """
    if given := os.environ.get("MEDCOT_E2E_RUN"):
        again = subprocess.run(command(Path(given)), cwd=ROOT, capture_output=True, text=True, check=True)
        return FinishedRun(Path(given), again.stdout, again.stderr)
    run_dir = tmp_path_factory.mktemp("e2e") / "smollm2-cpu"
    process = subprocess.Popen(command(run_dir), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = run_dir / "adapter" / "checkpoints"
    while not list(checkpoints.glob(f"*/{SEAL_NAME}")):
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    second = subprocess.run(command(run_dir), cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr[-3000:]
    return FinishedRun(run_dir, second.stdout, second.stderr)


def test_a_killed_run_goes_on_from_its_checkpoint(finished: FinishedRun) -> None:
    result = Artifact.load(finished.folder("train"), TrainedAdapter).result
    assert result.resumed_from_step is not None and result.resumed_from_step >= 25
    assert "prepare: up to date" in finished.messages
    assert "train: resumed" in finished.messages


def test_every_stage_left_a_whole_artifact_within_the_memory_limit(finished: FinishedRun) -> None:
    for stage in STAGES:
        manifest = read_manifest(finished.run_dir / stage.folder)
        assert manifest is not None, stage.name
        assert manifest.peak_memory_bytes < 6 * GIGABYTE, stage.name
        print(f"{stage.name}: {manifest.seconds:.0f} s, {manifest.peak_memory_bytes / GIGABYTE:.2f} GB")


def test_the_plan_came_near_to_what_the_run_took(finished: FinishedRun) -> None:
    """Memory within a quarter. Time within a factor of three: the strict factor of 1.5 is tests/test_estimate.py's, on
    recorded runs, because other work on the machine is not the estimate's fault."""
    plan = Plan.model_validate_json((finished.run_dir / "plan.json").read_bytes())
    assert plan.problems == []
    assert {stage.stage for stage in plan.stages} == {stage.name for stage in STAGES} - {"prepare"}
    planned = measured = 0.0
    for estimate in plan.stages:
        manifest = read_manifest(finished.folder(estimate.stage))
        assert manifest is not None and estimate.seconds is not None
        assert estimate.memory_bytes == pytest.approx(manifest.peak_memory_bytes, rel=0.25), estimate.stage
        planned, measured = planned + estimate.seconds, measured + manifest.seconds
    print(f"planned {planned:.0f} s, took {measured:.0f} s after the kill")
    assert 1 / 3 < planned / measured < 3


def test_the_run_ends_with_a_table_and_the_line_that_starts_the_chat(finished: FinishedRun) -> None:
    assert all(stage.name in finished.output for stage in STAGES)
    assert f"chat {finished.run_dir}/gguf/smollm2-cpu-Q4_K_M.gguf" in finished.output


def test_a_second_run_does_nothing_in_under_five_seconds(finished: FinishedRun) -> None:
    started = time.monotonic()
    outcome = subprocess.run(command(finished.run_dir), cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 5
    assert "Everything is up to date" in outcome.stdout


def test_held_out_loss_falls_by_at_least_15_percent(finished: FinishedRun) -> None:
    result = Artifact.load(finished.folder("train"), TrainedAdapter).result
    assert result.eval_loss_after < 0.85 * result.eval_loss_before


def test_the_gguf_is_the_trained_model(finished: FinishedRun) -> None:
    result = Artifact.load(finished.folder("verify"), Verification).result
    assert result.passed and result.logit_nmse < 1e-4 and result.top1_agreement > 0.995


def test_tuned_answers_in_the_form_and_base_does_not(finished: FinishedRun) -> None:
    models = {model.role: model for model in Artifact.load(finished.folder("evaluate"), Evaluation).result.models}
    assert models["tuned"].well_formed.n >= 24
    assert models["tuned"].well_formed.value >= 0.8
    assert models["base"].well_formed.value <= 0.05
    assert models["tuned"].answer_perplexity.value < models["base"].answer_perplexity.value
    tuned, base = models["tuned"].reasoning_perplexity, models["base"].reasoning_perplexity
    assert tuned is not None and base is not None and tuned.high < base.low


def test_tuned_is_compared_with_base_and_asked_everything(finished: FinishedRun) -> None:
    result = Artifact.load(finished.folder("evaluate"), Evaluation).result
    compared = {comparison.metric: comparison for comparison in result.comparisons}
    for metric in ("perplexity", "reasoning_perplexity", "answer_perplexity", "well_formed"):
        assert compared[metric].verdict == "better", compared[metric]
    tuned = next(model for model in result.models if model.role == "tuned")
    assert tuned.choice_accuracy is not None and tuned.choice_accuracy.n == 4
    assert tuned.rouge_l is not None and 0 < tuned.rouge_l.value < 0.5
    assert [sample.kind for sample in result.samples] == ["reference"] * 3 + ["held-out"] * 3
    assert all(output for sample in result.samples for output in sample.outputs.values())


def test_benchmark_measured_every_file_and_transformers(finished: FinishedRun) -> None:
    exported = Artifact.load(finished.folder("export"), ExportedModels).result
    result = Artifact.load(finished.folder("bench"), Benchmark).result
    measured = result.models
    assert {model.model for model in measured if model.engine == "llama.cpp"} >= {
        file.name for file in exported.files if file.role == "tuned"
    }
    assert any(model.engine == "transformers" for model in measured)
    for model in measured:
        assert min(model.prompt_tokens_per_second + model.generated_tokens_per_second) > 0
        assert min(model.time_to_first_token_seconds) > 0
        assert model.peak_memory_bytes > (model.file_bytes or 0) / 4
        assert len(model.tests) == (4 if model.engine == "llama.cpp" else 2)
        # The memory's speed bounds generation, unless a large cache holds a file of 105 MB.
        assert 0.01 < (result.roofline_share(model) or 0) < 3
    assert result.answer_length is not None and "evaluated answers" in result.answer_length.source


def test_the_shipped_file_is_close_to_f16_and_recommended(finished: FinishedRun) -> None:
    exported = Artifact.load(finished.folder("export"), ExportedModels).result
    result = Artifact.load(finished.folder("bench"), Benchmark).result
    exact, shipped = result.quality
    assert result.quality_note is None and exact.model.endswith("F16.gguf") and shipped.model == exported.ship
    # 0.036 nats and 90 % on 8 records (LOG.md, 2026-11-22)
    assert 0.005 < shipped.whole.mean_kl.value < 0.1 and shipped.whole.top1_agreement.value > 0.85
    assert shipped.whole.mean_kl.value < shipped.whole.p99_kl < 1
    assert shipped.reasoning is not None and shipped.reasoning.tokens > shipped.answer.tokens > 50
    assert result.recommendation is not None and result.recommendation.model == exported.ship


def test_nothing_was_lost_in_prepare(finished: FinishedRun) -> None:
    data = Artifact.load(finished.folder("prepare"), PreparedData).result
    assert data.read == data.train_rows + data.eval_rows + data.unused_rows + data.rejected >= 120
    assert data.rejected == 0


def test_the_report_shows_the_measured_numbers(finished: FinishedRun) -> None:
    html = (finished.folder("report") / "report.html").read_text(encoding="utf-8")
    markdown = (finished.folder("report") / "report.md").read_text(encoding="utf-8")
    assert "smollm2-cpu-Q4_K_M.gguf" in html
    assert "smollm2-cpu-Q4_K_M.gguf" in markdown.replace("\\_", "_")  # Markdown escapes underscores
    assert "<svg" in html and "http://" not in html.replace("http://www.w3.org", "")


def test_the_report_can_be_made_again_and_says_the_same(finished: FinishedRun, tmp_path: Path) -> None:
    arguments = ["report", str(finished.run_dir), "--out", str(tmp_path), "--json"]
    outcome = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    written = finished.folder("report") / "report.json"
    assert json.loads(outcome.stdout) == json.loads(written.read_text(encoding="utf-8"))
    assert (tmp_path / "report.html").read_bytes() == (finished.folder("report") / "report.html").read_bytes()


def test_a_failed_gate_ends_the_run_with_status_3_and_a_report_that_shows_it(
    finished: FinishedRun, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir, copy_function=os.link)  # files are replaced, never written over
    unreachable = ["--set", "verify.max_logit_nmse=1e-30", "--set", "verify.prompts=1"]
    outcome = subprocess.run(command(run_dir, *unreachable), cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 3, outcome.stderr[-3000:]
    assert "The GGUF is not the trained model: logit error" in outcome.stderr and "Traceback" not in outcome.stderr
    report = json.loads((run_dir / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["decision"][0]["text"].startswith("Do not use smollm2-cpu-Q4_K_M.gguf")
    assert {stage["stage"]: stage["state"] for stage in report["stages"]}["verify"] == "gate failed"
    assert report["verified"]["passed"] is False and report["trained"] is not None


def test_the_shipped_file_answers_in_the_chat(finished: FinishedRun) -> None:
    gguf = finished.run_dir / "gguf" / "smollm2-cpu-Q4_K_M.gguf"
    question = "A 60-year-old man has sudden tearing chest pain going through to his back. What is the diagnosis?"
    arguments = ["chat", str(gguf), "--prompt", question, "--json", "--temperature", "0", "--max-new-tokens", "500"]
    outcome = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    document = json.loads(outcome.stdout)
    assert document["thought"] and document["answer"] and document["tokens_per_second"] > 0
