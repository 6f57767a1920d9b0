"""The driver, with the real prepare stage on a tiny model: skipping, redoing, refusing, and exit statuses."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_models import save_model

from pipeline import run as driver
from pipeline.artifacts import read_manifest
from pipeline.config import Config, load_config
from pipeline.errors import MedcotError
from pipeline.failure import read_failure
from pipeline.processes import with_our_packages


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run whose prepare stage is done."""
    config = tiny_config(base)
    run_dir = tmp_path_factory.mktemp("run") / "tiny"
    outcome = driver.run(config, run_dir, until="prepare")
    assert [item.status for item in outcome.stages] == ["made"]
    return config, run_dir


def tiny_config(base: Path, *overrides: str) -> Config:
    return load_config(None, [f"model.base={base}", "data.eval_rows=10", "name=tiny", *overrides])


def test_the_manifest_says_what_the_artifact_is_made_of(finished: tuple[Config, Path]) -> None:
    manifest = read_manifest(finished[1] / "data")
    assert manifest is not None
    assert [record.path for record in manifest.files] == ["eval.jsonl", "rejects.jsonl", "train.jsonl"]
    assert manifest.seconds > 0 and 20e6 < manifest.peak_memory_bytes < 6e9
    assert manifest.result["rejected"] + manifest.result["train_rows"] + 10 == manifest.result["read"] == 150
    assert not (finished[1] / "data" / "in_progress.json").exists()


def test_a_second_run_does_nothing(finished: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_run_in_process", lambda *_: pytest.fail("a stage was started"))
    said: list[str] = []
    outcome = driver.run(*finished, until="prepare", announce=said.append)
    assert outcome.stages[0].status == "up to date" and said == ["prepare: up to date"]


@pytest.mark.parametrize(
    "change", ["seed=7", "data.eval_rows=11", "prompt.system=Careful.", "model.max_seq_length=900"]
)
def test_settings_that_matter_change_the_fingerprint(finished: tuple[Config, Path], base: Path, change: str) -> None:
    stage = driver.stage_named("prepare")
    old = driver.identify(stage, finished[0], finished[1]).fingerprint
    assert driver.identify(stage, tiny_config(base, change), finished[1]).fingerprint != old
    assert driver.identify(stage, tiny_config(base, "training.learning_rate=1e-5"), finished[1]).fingerprint == old


def test_a_lost_file_is_made_again(finished: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config, run_dir = finished
    started: list[str] = []

    def stop(stage: driver.Stage, _: Path) -> None:
        started.append(stage.name)
        raise MedcotError("stopped by the test")

    lost = (run_dir / "data" / "train.jsonl").read_bytes()
    manifest = (run_dir / "data" / "manifest.json").read_bytes()
    others = {p.name: p.read_bytes() for p in (run_dir / "data").iterdir()}
    (run_dir / "data" / "train.jsonl").unlink()
    monkeypatch.setattr(driver, "_run_in_process", stop)
    with pytest.raises(MedcotError, match="stopped by the test"):
        driver.run(config, run_dir, until="prepare")
    assert started == ["prepare"]
    assert read_manifest(run_dir / "data") is None  # what is no longer whole is no longer an artifact
    for name, content in others.items():
        (run_dir / "data" / name).write_bytes(content)
    (run_dir / "data" / "in_progress.json").unlink()
    assert (lost, manifest) == (others["train.jsonl"], others["manifest.json"])


def test_a_stage_without_its_inputs_says_which(finished: tuple[Config, Path]) -> None:
    with pytest.raises(MedcotError, match="verify needs the artifact of train"):
        driver.run(*finished, only="verify")


def test_what_needs_llama_cpp_waits_for_the_build_that_set_up_has_begun(
    finished: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[object] = []

    @contextmanager
    def in_use(on_gpu: bool, announce: object) -> Iterator[None]:
        happened.append("in use, on the GPU" if on_gpu else "in use")
        yield
        happened.append("released")

    monkeypatch.setattr(driver.llama_background, "wait_for_build", lambda on_gpu, _: happened.append(on_gpu))
    monkeypatch.setattr(driver.llama_background, "llama_cpp", in_use)
    monkeypatch.setattr(driver, "_run_in_process", lambda stage, _: happened.append(stage.name))
    driver.run(*finished, until="prepare")
    assert happened == []
    # Before anything is said of its inputs: the installed version is among what a stage's output depends on.
    with pytest.raises(MedcotError, match="verify needs the artifact of train"):
        driver.run(*finished, only="verify")
    assert happened == [False]
    for name in ("export", "evaluate", "train"):
        with pytest.raises(MedcotError, match="ended without writing"):
            driver._make(driver.stage_named(name), driver._State("x", None, None), tmp_path, False, lambda text: None)
    assert happened[1:] == ["in use", "export", "released", "in use, on the GPU", "evaluate", "released", "train"]


@pytest.mark.broad  # a process that imports everything the plan needs
def test_the_plan_and_the_data_need_no_llama_cpp(base: Path, tmp_path: Path) -> None:
    """On a GPU machine it is still being compiled then."""
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp/__init__.py").write_text("raise ImportError('still being compiled')\n")
    environ = with_our_packages()
    environ["PYTHONPATH"] = f"{tmp_path}:{environ['PYTHONPATH']}"
    settings = (f"model.base={base}", "data.eval_rows=10", "name=tiny")
    overrides = [*(f"--set={each}" for each in settings), "--run-dir", str(tmp_path / "run")]
    for command in (["plan"], ["run", "--until", "prepare"]):
        outcome = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *command, *overrides],
            env=environ, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert outcome.returncode == 0, outcome.stderr


def test_files_of_others_are_not_touched(base: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(MedcotError, match="files that medcot did not make"):
        driver.run(tiny_config(base), tmp_path, until="prepare")
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"


def test_two_runs_in_one_folder(finished: tuple[Config, Path]) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(1, flush=True); input()"
    command = [sys.executable, "-c", hold, str(finished[1] / ".lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        with pytest.raises(MedcotError, match="Another medcot run is at work"):
            driver.run(*finished, until="prepare")
    finally:
        holder.communicate(b"\n")


def test_a_failing_stage_says_one_sentence_and_the_run_ends_with_its_status(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"Question": "broken\n')
    command = [sys.executable, "-m", "pipeline.cli", "run", "--set", f"model.base={base}", "--until", "prepare"]
    command += ["--set", f"data.source={source}", "--run-dir", str(tmp_path / "run"), "--json"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 1
    assert outcome.stdout == ""
    assert "Error in prepare:" in outcome.stderr and "unreadable: 1" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.count("Error") == 1
    assert read_manifest(tmp_path / "run" / "data") is None
    failure = read_failure(tmp_path / "run" / "data")  # for the report
    assert failure is not None and failure.exit_status == 1 and failure.message in outcome.stderr


def test_json_output_is_one_document(finished: tuple[Config, Path], base: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "run", "--set", f"model.base={base}", "--set", "name=tiny"]
    command += ["--set", "data.eval_rows=10", "--until", "prepare", "--run-dir", str(finished[1]), "--json"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(outcome.stdout)
    assert document["stages"][0]["status"] == "up to date"


def test_a_stage_killed_from_outside_is_explained(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.sys, "executable", "/bin/sh")
    real = subprocess.Popen
    monkeypatch.setattr(driver.subprocess, "Popen", lambda command, env: real(["/bin/sh", "-c", "kill -9 $$"], env=env))
    with pytest.raises(MedcotError, match="prepare was ended by SIGKILL"):
        driver.run(tiny_config(base), tmp_path, until="prepare")
    failure = read_failure(tmp_path / "data")
    assert failure is not None and failure.message.startswith("prepare was ended by SIGKILL")
