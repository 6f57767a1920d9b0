"""A run's folder as the report finds it: finished, failed, stopped by a gate, outdated, damaged, or no run at all."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from pydantic import BaseModel
from test_report import TUNED, Page, measurements

from bench.report import build_page
from bench.report_command import report_runs
from bench.run_folder import open_run
from pipeline import run as driver
from pipeline.artifacts import FAILURE_NAME, FileRecord, Manifest, read_manifest, write_manifest
from pipeline.config import Config
from pipeline.errors import GateFailed, MedcotError
from pipeline.failure import write_failure
from pipeline.results import Verification
from pipeline.run import STAGES, stage_named


def make_run(
    run_dir: Path,
    results: dict[str, BaseModel],
    config: Config | None = None,
    files: dict[str, dict[str, bytes]] | None = None,
) -> Path:
    """A run's folder with a real chain of manifests: each names the artifacts that it was made from.

    ``files`` are what the stages left, by stage and name; of the others only a record is there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text((config or Config(name="run")).to_yaml())
    digests: dict[str, str] = {}
    for stage in STAGES:
        result = results.get(stage.name)
        if result is None:
            continue
        (run_dir / stage.folder).mkdir()
        contents = (files or {}).get(stage.name, {})
        for name, content in contents.items():
            (run_dir / stage.folder / name).write_bytes(content)
        manifest = Manifest(
            stage=stage.name,
            fingerprint="12" * 32,
            config={},
            inputs={name: digests[name] for name in stage.inputs if name in digests},
            versions={"python": "3.11"},
            created="2026-11-22T02:00:00+00:00",
            seconds=83.2,
            peak_memory_bytes=2_400_000_000,
            files=[
                FileRecord(path=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
                for name, content in contents.items()
            ]
            or [FileRecord(path="eval.jsonl", size=1_000, sha256="cd" * 32)],
            result=result.model_dump(mode="json"),
        )
        write_manifest(run_dir / stage.folder, manifest)
        digests[stage.name] = manifest.digest
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", measurements())


def decision(run_dir: Path) -> list[str]:
    return [line.text for line in build_page(*open_run(run_dir)).decision]


def states(run_dir: Path) -> dict[str, str]:
    _, run = open_run(run_dir)
    return {stage: state.name for stage, state in run.states.items()}


def fail(run_dir: Path, stage: str, message: str, status: int) -> Path:
    """What a stage leaves that fails: no manifest, and why."""
    folder = run_dir / stage_named(stage).folder
    (folder / "manifest.json").unlink()
    (folder / "in_progress.json").write_text("{}")
    write_failure(folder / FAILURE_NAME, message, status)
    return folder


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_a_finished_run_is_done(run_dir: Path) -> None:
    assert set(states(run_dir).values()) == {"done"}
    assert decision(run_dir)[0].startswith(f"Use {TUNED}")


def test_a_failed_stage_is_shown_with_its_reason(run_dir: Path) -> None:
    fail(run_dir, "bench", "Out of memory: take a smaller file.", 1)
    assert states(run_dir)["bench"] == "failed"
    assert "bench: failed. Out of memory: take a smaller file." in decision(run_dir)
    _, run = open_run(run_dir)
    assert run.benchmarked is None


def test_a_failed_gate_keeps_what_was_measured_and_warns_of_the_file(run_dir: Path) -> None:
    whole = measurements()["verify"]
    assert isinstance(whole, Verification)
    failed = whole.model_copy(
        update={"passed": False, "checks": [whole.checks[0].model_copy(update={"passed": False})]}
    )
    folder = fail(run_dir, "verify", "The GGUF is not the trained model: token ids: 3 differ", 3)
    (folder / "verification.json").write_text(failed.model_dump_json())
    config, run = open_run(run_dir)
    assert run.states["verify"].name == "gate failed" and run.verified == failed
    lines = decision(run_dir)
    assert lines[0].startswith(f"Do not use {TUNED}") and "it is not what was trained" in lines[0]
    assert "verify: gate failed. The GGUF is not the trained model: token ids: 3 differ." in lines
    assert build_page(config, run).section("Verification") is not None


def test_a_failed_regression_gate_warns_of_a_verified_file(run_dir: Path) -> None:
    folder = fail(run_dir, "evaluate", "The gate failed: well_formed must be >= 0.95, it is 0.9.", 3)
    (folder / "evaluation.json").write_text(measurements()["evaluate"].model_dump_json())
    lines = decision(run_dir)
    assert lines[0].startswith(f"Do not use {TUNED}") and "before the failed gate" in lines[0]
    assert any(line.startswith("Perplexity of the reference answer: tuned is better") for line in lines)


def test_figures_of_an_earlier_artifact_are_not_shown_as_this_runs(run_dir: Path) -> None:
    adapter = run_dir / "adapter"
    manifest = read_manifest(adapter)
    assert manifest is not None
    write_manifest(adapter, manifest.model_copy(update={"fingerprint": "34" * 32}))
    found = states(run_dir)
    assert (found["prepare"], found["train"], found["export"]) == ("done", "done", "outdated")
    assert found["evaluate"] == "outdated"  # it was made from an export that is outdated itself
    assert "There is no GGUF to use" in decision(run_dir)[0]


def test_a_damaged_manifest_is_named(run_dir: Path) -> None:
    (run_dir / "eval" / "manifest.json").write_text('{"stage": ')
    (run_dir / "bench" / "manifest.json").write_text(
        (run_dir / "bench" / "manifest.json").read_text().replace('"machine"', '"machin"')
    )
    assert states(run_dir)["evaluate"] == states(run_dir)["bench"] == "damaged"
    assert any("eval/manifest.json cannot be read" in line for line in decision(run_dir))


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    make_run(tmp_path, {})
    assert set(states(tmp_path).values()) == {"not run"}
    page, document = report_runs([tmp_path], None)
    assert page == tmp_path / "report" / "report.html"
    assert [stage.state for stage in document.stages] == ["not run"] * 6  # type: ignore[union-attr]
    assert Page(page.read_text()).open == []


def test_a_report_in_the_runs_folder_is_made_again_by_the_next_run(run_dir: Path) -> None:
    report_runs([run_dir], None)
    assert (run_dir / "report" / "in_progress.json").is_file() and read_manifest(run_dir / "report") is None
    report_runs([run_dir], None)  # over itself
    (run_dir / "report" / "in_progress.json").unlink()
    (run_dir / "report" / "thesis.txt").write_text("mine")
    with pytest.raises(MedcotError, match="files that medcot did not make"):
        report_runs([run_dir], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no run's folder (there is no such folder)"),
        (["."], "it has no config.yaml"),
        (["run", "run"], "run is named twice"),
        (["run", "run/../run"], "run/../run is named twice"),
        (["run", "--out", "run/config.yaml"], "run/config.yaml is a file"),
    ],
)
def test_bad_folders_are_one_sentence(
    arguments: list[str], message: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_dir.parent)
    out = Path(arguments[2]) if "--out" in arguments else None
    with pytest.raises(MedcotError) as caught:
        report_runs([Path(each) for each in arguments if "--out" not in arguments] or [Path("run")], out)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.broad
def test_the_command_prints_the_decision_or_one_document(run_dir: Path, tmp_path: Path) -> None:
    fail(run_dir, "evaluate", "The disk is full", 1)
    shown = command("report", run_dir, "--out", tmp_path / "out", "--json")
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert document == json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["evaluated"] is None
    wrong = command("report", tmp_path)
    assert (wrong.returncode, wrong.stdout) == (1, "") and wrong.stderr.startswith("Error: ")
    assert "Traceback" not in wrong.stderr


def test_after_a_failed_gate_the_run_writes_its_report_and_ends_with_status_3(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate's own process is played, the report's is real."""
    config = Config(name="run")
    real, started = driver._examine, []

    def examine(stage: driver.Stage, *arguments: object) -> object:
        if stage.name in ("prepare", "train", "export"):
            return driver._State("12" * 32, read_manifest(run_dir / stage.folder), None)
        return real(stage, *arguments)  # type: ignore[arg-type]

    def gate(stage: driver.Stage, _: Path) -> None:
        started.append(stage.name)
        write_failure(run_dir / stage.folder / FAILURE_NAME, "token ids differ", 3)
        raise driver.StageFailed(stage.name, GateFailed.exit_status)

    monkeypatch.setattr(driver, "_examine", examine)
    monkeypatch.setattr(driver, "_run_in_process", gate)
    said: list[str] = []
    with pytest.raises(driver.StageFailed) as caught:
        driver.run(config, run_dir, plan_first=False, announce=said.append)
    assert caught.value.exit_status == 3 and started == ["verify"]
    text = Page((run_dir / "report" / "report.html").read_text()).text
    assert "verify: gate failed. token ids differ; what it measured is not there." in text
    assert read_manifest(run_dir / "report") is None and said[-1].endswith("shows what failed, and what is there")
    # Who asked for less gets no report, unless it is to come early.
    (run_dir / "report" / "report.html").unlink()
    with pytest.raises(driver.StageFailed):
        driver.run(config, run_dir, until="verify", plan_first=False)
    assert not (run_dir / "report" / "report.html").exists()
    with pytest.raises(driver.StageFailed):
        driver.run(config, run_dir, until="verify", plan_first=False, first_report=True)
    assert (run_dir / "report" / "report.html").is_file()


def test_on_a_hosted_machine_the_report_comes_before_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages' processes are played, the report's is real."""
    done = {name: each for name, each in measurements().items() if name in ("prepare", "train", "export", "verify")}
    run_dir = make_run(tmp_path / "run", done, files={"export": {TUNED: b"GGUF"}})
    started: list[str] = []

    def examine(stage: driver.Stage, *_: object) -> object:
        return driver._State("12" * 32, read_manifest(run_dir / stage.folder), None)

    def evaluate(stage: driver.Stage, _: Path) -> None:
        started.append(stage.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "_examine", examine)
    monkeypatch.setattr(driver, "_run_in_process", evaluate)
    said: list[str] = []
    copied: list[int] = []

    @contextmanager
    def copies(*_: object) -> Iterator[Callable[[], None]]:
        yield lambda: copied.append(len(started))

    monkeypatch.setattr(driver, "kept_copy", copies)
    run = partial(driver.run, Config(name="run"), run_dir, plan_first=False, announce=said.append)
    run(until="verify")
    assert not (run_dir / "report").exists()  # on a machine of one's own it comes at the end

    run(until="verify", first_report=True)
    gguf = run_dir / "gguf" / TUNED
    assert said[-2:] == [
        f"report: {run_dir / 'report'} is the first report, without evaluation and benchmark",
        f"The GGUF is ready and verified: {gguf} (0.00 GB). It is not evaluated yet; medcot publish says so on its "
        "card.",
    ]
    text = Page((run_dir / "report" / "report.html").read_text()).text
    assert "Not evaluated yet" in text and "Speed is not measured yet." in text
    assert read_manifest(run_dir / "report") is None and copied[-1] == 0

    written = (run_dir / "report" / "report.html").stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt):
        run(first_report=True)
    assert started == ["evaluate"] and "It can be taken or published while it is evaluated" in said[-2]
    assert (run_dir / "report" / "report.html").stat().st_mtime_ns == written  # once is enough


def test_files_that_a_copy_left_behind_are_missed_until_they_are_verified(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    run_dir, config = tmp_path / "run", Config.model_validate({"name": "run", "model": {"base": str(base)}})
    files = {"export": {TUNED: b"GGUF", "run-F16.gguf": b"large"}}
    make_run(run_dir, measurements(), config, files)
    for name in ("prepare", "train", "export", "verify"):
        stage = stage_named(name)
        manifest = read_manifest(run_dir / stage.folder)
        assert manifest is not None
        identity = driver.identify(stage, config, run_dir)
        renewed = {"fingerprint": identity.fingerprint, "inputs": identity.inputs}
        write_manifest(run_dir / stage.folder, manifest.model_copy(update=renewed))
    export = stage_named("export")
    assert driver.finished_artifact(export, config, run_dir) is not None
    (run_dir / "gguf" / "run-F16.gguf").unlink()
    assert driver.finished_artifact(export, config, run_dir) is None  # lost here
    (run_dir / "gguf" / "left_behind.json").write_text('["run-F16.gguf"]')
    assert driver.finished_artifact(export, config, run_dir) is not None
    (run_dir / "verify" / "manifest.json").unlink()
    assert driver.finished_artifact(export, config, run_dir) is None  # there is no proof without it
