"""How a sweep's runs share prepared data, fail alone and go on; the runs here end with their first stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_sweep import write_experiments

from pipeline import sweep as sweeps
from pipeline.artifacts import changed_files, read_manifest
from pipeline.errors import MedcotError
from pipeline.run import finished_artifact, locked, stage_named
from pipeline.sweep import ExperimentOutcome, run_sweep
from pipeline.sweep_file import Sweep, load_sweep
from pipeline.sweep_machine import gpu_slots, run_here
from pipeline.sweep_process import LOG_NAME

# Every experiment is a run with processes of its own.
pytestmark = pytest.mark.broad

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = """
experiments:
  - name: primary
  - {name: low-rank, overrides: {lora.r: 4}}
  - {name: no-data, overrides: {data.source: /nowhere.jsonl}}
  - {name: too-few, overrides: {data.eval_rows: 24}}
"""
PREPARE = stage_named("prepare")


Finished = tuple[Sweep, Path, list[ExperimentOutcome], list[str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A sweep whose runs have prepared their data, or failed to: its folder, outcomes and messages."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep = load_sweep(str(write_experiments(folder, EXPERIMENTS)))
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "LAST_STAGE", "prepare")
        outcomes = run_sweep(sweep, folder / "out", announce=said.append)
    return sweep, folder / "out", outcomes, said


def test_data_is_prepared_once_for_all_that_want_the_same(finished: Finished) -> None:
    _, out, _, said = finished
    assert said.count("low-rank: data of primary") == 1
    assert [line for line in said if line.endswith("prepare: started")] == [
        f"{name}: prepare: started" for name in ("primary", "too-few")
    ]
    assert (out / "primary" / "data" / "train.jsonl").samefile(out / "low-rank" / "data" / "train.jsonl")


def test_shared_data_is_a_whole_artifact_of_its_run(finished: Finished) -> None:
    sweep, out, _, said = finished
    manifest = read_manifest(out / "low-rank" / "data")
    assert manifest is not None and changed_files(out / "low-rank" / "data", manifest) == []
    assert finished_artifact(PREPARE, sweep.experiments[1].config, out / "low-rank") == manifest
    assert "low-rank: prepare: up to date" in said
    assert not list(out.glob("*/.data.tmp"))


def test_a_failed_experiment_is_told_and_the_others_go_on(finished: Finished) -> None:
    _, out, outcomes, _ = finished
    failures = {outcome.experiment.name: outcome.failure for outcome in outcomes}
    assert [name for name, failure in failures.items() if failure is None] == ["primary", "low-rank"]
    assert "/nowhere.jsonl does not exist" in str(failures["no-data"])
    assert "gives 24 usable records" in str(failures["too-few"]) and "\n" not in str(failures["too-few"])
    assert "gives 24 usable records" in (out / "too-few" / LOG_NAME).read_text()


def test_files_of_others_in_the_place_of_data_are_not_touched(finished: Finished, tmp_path: Path) -> None:
    _, out, _, _ = finished
    manifest = read_manifest(out / "primary" / "data")
    assert manifest is not None
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    sweeps._share(out / "primary", manifest, tmp_path)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["thesis.txt"]


def test_each_slot_gives_its_process_its_environment(tmp_path: Path) -> None:
    """MEDCOT_DEBUG stands for CUDA_VISIBLE_DEVICES: with it a failing run shows a traceback."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.yaml").write_text("lora: {r: 0}\n")
    said: list[str] = []
    failures = run_here(folders, "prepare", [{"MEDCOT_DEBUG": "1"}, {}], said.append)
    assert all("lora.r: input should be greater" in str(failures[folder]) for folder in folders)
    assert any(line.startswith("one: Traceback") for line in said)
    assert not any(line.startswith("two: Traceback") for line in said)


def test_one_slot_for_each_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert gpu_slots() == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_slots() == [{}]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU-aa\necho GPU-bb\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert gpu_slots() == [{"CUDA_VISIBLE_DEVICES": "GPU-aa"}, {"CUDA_VISIBLE_DEVICES": "GPU-bb"}]


def test_two_sweeps_in_one_folder(finished: Finished) -> None:
    sweep, out, _, _ = finished
    with locked(out), pytest.raises(MedcotError, match="Another medcot run is at work"):
        run_sweep(sweep, out)


def test_a_killed_sweep_takes_its_runs_with_it(tmp_path: Path) -> None:
    file = write_experiments(tmp_path, "experiments: [{name: only}]")
    command = [sys.executable, "-m", "pipeline.cli", "sweep", str(file), "--out", str(tmp_path / "out")]
    sweep = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out" / "only" / "data").is_dir():
        assert sweep.poll() is None
        time.sleep(0.05)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    deadline = time.monotonic() + 30
    while True:
        try:
            with locked(tmp_path / "out" / "only"):
                return
        except MedcotError:
            assert time.monotonic() < deadline, "the run lives on"
            time.sleep(0.1)


def test_the_command_ends_with_status_1_when_all_failed(tmp_path: Path) -> None:
    file = write_experiments(tmp_path, "experiments: [{name: a, overrides: {data.source: /nowhere.jsonl}}]")
    command = [sys.executable, "-m", "pipeline.cli", "sweep", str(file), "--out", str(tmp_path / "out"), "--json"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    document = json.loads(outcome.stdout)
    assert outcome.returncode == 1 and "Traceback" not in outcome.stderr
    assert document["experiments"][0]["state"] == "failed" and document["best"] == {}
    assert sorted(path.name for path in (tmp_path / "out").glob("sweep.*")) == ["sweep.html", "sweep.json", "sweep.md"]
