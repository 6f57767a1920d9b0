"""Weights & Biases and TensorBoard: every row arrives, resumed trainings go on, and no tracker stops a training."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb_server import WandbServer, wandb_server

from pipeline import tracking
from pipeline.artifacts import TRACKING_NAME, artifact_files
from pipeline.config import Config, load_config
from pipeline.errors import MedcotError
from pipeline.tracking import destination, open_tracker, track

API_KEY = "0" * 40
ROWS = [
    {"step": 0, "eval_loss": 3.25},
    *({"step": step, "loss": 2.0 - step / 16, "learning_rate": 1e-3 / step, "tokens": 90 * step} for step in (1, 2, 3)),
    {"step": 3, "eval_loss": 2.75, "eval_seconds": 0.5},
    *({"step": step, "loss": 2.0 - step / 16, "learning_rate": 1e-3 / step, "tokens": 90 * step} for step in (4, 5, 6)),
    {"step": 6, "eval_loss": 2.5},
]


@pytest.fixture(autouse=True)
def own_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No W&B settings and keys of whoever runs the tests, and a W&B client that begins anew."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tracking, "CONNECT_SECONDS", 1)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 5)
    yield
    if (wandb := sys.modules.get("wandb")) is not None:
        wandb.teardown()


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with wandb_server() as running:
        yield running


def configuration(report_to: str) -> Config:
    return load_config("smollm2-cpu", [f"training.report_to={report_to}"])


def log_all(config: Config, folder: Path, history: list[Any], rows: list[Any]) -> list[str]:
    """One session of a training; returns what it told."""
    told: list[str] = []
    with track(config, folder, history, told.append) as log:
        for row in rows:
            log(row)
    return told


def expected(rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """What is to be recorded at each step, by the names that transformers gives its trainings."""
    recorded: dict[int, dict[str, float]] = {}
    for row in rows:
        names = {key: key.replace("eval_", "eval/", 1) if "eval_" in key else f"train/{key}" for key in row}
        numbers = {names[key]: value for key, value in row.items() if key != "step"}
        recorded.setdefault(row["step"], {}).update(numbers)
    return recorded


def by_step(history: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    assert [row["_step"] for row in history] == sorted({row["_step"] for row in history})
    assert all(row["train/global_step"] == row["_step"] for row in history)
    return {
        row["_step"]: {
            key: value
            for key, value in row.items()
            if key.startswith(("train/", "eval/")) and key != "train/global_step"
        }
        for row in history
    }


def recorded_offline(folder: Path) -> tuple[dict[int, dict[str, float]], dict[str, Any], str]:
    """History, configuration and run id of the one offline recording, read with W&B's own reader."""
    from wandb.util import get_core_path

    [recording] = (folder / "wandb").glob("offline-run-*/*.wandb")
    # What `wandb leet inspect --json` runs, without the seconds that importing W&B's command line takes.
    reader = [get_core_path(), "leet", "inspect", "--no-observability", "--json"]
    command = [*reader, "--run-file", str(recording), str(folder / "wandb")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in output.splitlines()]
    [run] = [record["run"] for record in records if record["type"] == "run"]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    return by_step(history), run["config"]["update"], run["run_id"]


def in_a_process(script: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A training in a process of its own; ``script`` finds this module's names and its tracker's ``folder``."""
    beginning = "import sys; sys.path.insert(0, 'tests')\nfrom test_tracking import *\nfolder = Path(sys.argv[1])\n"
    command = [sys.executable, "-c", beginning + script, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)


@pytest.mark.broad
def test_after_a_kill_one_offline_recording_holds_every_row_and_the_configuration(tmp_path: Path) -> None:
    script = """
import signal
with track(configuration("wandb-offline"), folder, [], print) as log:
    for row in ROWS[:7]:
        log(row)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert in_a_process(script, tmp_path).returncode == -9
    [first] = (tmp_path / "wandb").glob("offline-run-*")
    config = configuration("wandb-offline")
    # The last checkpoint was at step 3: what came after it is trained and logged again.
    [told] = log_all(config, tmp_path, ROWS[:5], ROWS[5:])
    history, recorded_config, run_id = recorded_offline(tmp_path)
    assert history == expected(ROWS)
    recorded_config.pop("_wandb")
    assert recorded_config == config.model_dump(mode="json")
    assert first.name.endswith(run_id)
    command, recording = told.rsplit(" ", 1)
    assert command.endswith("wandb sync") and Path(recording).is_dir() and recording != str(first)


def test_online_the_second_session_goes_on_in_the_same_run(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    config = configuration("wandb")
    with pytest.raises(KeyboardInterrupt), track(config, tmp_path, [], print) as log:
        for row in ROWS[:6]:
            log(row)
        raise KeyboardInterrupt
    told = log_all(config, tmp_path, ROWS[:5], ROWS[5:])
    [(run_id, history)] = server.history.items()
    assert by_step(history) == expected(ROWS)
    assert server.exit_codes == {run_id: [1, 0]}
    assert server.config[run_id]["lora"]["value"] == config.lora.model_dump(mode="json")
    assert told == [f"train: W&B shows it at {server.url}/someone/medcot/runs/{run_id}"]


def test_without_a_key_nothing_is_asked_at_the_keyboard(tmp_path: Path) -> None:
    keyboard, terminal = pty.openpty()
    script = "print(*log_all(configuration('wandb'), folder, [], ROWS), sep='\\n')"
    outcome = in_a_process(script, tmp_path / "run", stdin=terminal)
    os.close(keyboard)
    os.close(terminal)
    assert outcome.returncode == 0, outcome.stderr
    assert "no API key" in outcome.stdout and "WANDB_API_KEY" in outcome.stdout
    assert recorded_offline(tmp_path / "run")[0] == expected(ROWS)


@pytest.mark.broad
def test_a_server_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        told = log_all(configuration("wandb"), tmp_path, [], ROWS)
    assert "cannot be used online" in told[0] and "records offline" in told[1]
    assert recorded_offline(tmp_path)[0] == expected(ROWS)


def test_a_tracker_that_dies_is_told_once_and_training_goes_on(tmp_path: Path) -> None:
    script = """
import psutil
with track(configuration("wandb-offline"), folder, [], print) as log:
    [core] = [child for child in psutil.Process().children(recursive=True) if child.name() == "wandb-core"]
    core.kill()
    for row in ROWS:
        log(row)
print("trained")
"""
    outcome = in_a_process(script, tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    _, failure, end = outcome.stdout.splitlines()
    assert "training goes on without it" in failure and end == "trained"
    assert "Traceback" not in outcome.stderr


def tensorboard_scalars(folder: Path) -> tuple[dict[int, dict[str, float]], str]:
    """Scalars by step, and the configuration, from the one event file."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    [events] = (folder / "tensorboard").iterdir()
    scalars: dict[int, dict[str, float]] = {}
    text = ""
    for event in EventFileLoader(str(events)).Load():
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "text":
                text = make_ndarray(value.tensor).item().decode()
            else:
                scalars.setdefault(event.step, {})[value.tag] = float(make_ndarray(value.tensor))
    return scalars, text


def test_tensorboard_shows_every_row_once_although_the_first_session_did_not_end(tmp_path: Path) -> None:
    config = configuration("tensorboard")
    interrupted = open_tracker(config, tmp_path, [], print)
    assert interrupted is not None
    for row in ROWS[:7]:
        interrupted.log(row)
    [told] = log_all(config, tmp_path, ROWS[:5], ROWS[5:])
    scalars, text = tensorboard_scalars(tmp_path)
    # TensorBoard keeps 32 bits of a number.
    assert scalars == {step: pytest.approx(row, rel=1e-6) for step, row in expected(ROWS).items()}
    assert "learning_rate: 0.003" in text
    assert told.endswith(f"tensorboard --logdir {tmp_path / 'tensorboard'}")


@pytest.mark.parametrize(
    ("setting", "variables", "where"),
    [
        ("auto", {}, "none"),
        ("auto", {"WANDB_API_KEY": API_KEY}, "none"),
        ("auto", {"WANDB_PROJECT": "cases"}, "wandb"),
        ("auto", {"WANDB_MODE": "offline"}, "wandb-offline"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_PROJECT": "cases"}, "none"),
        ("none", {"WANDB_MODE": "online", "WANDB_PROJECT": "cases"}, "none"),
        ("wandb", {}, "wandb"),
        ("wandb", {"WANDB_MODE": "dryrun"}, "wandb-offline"),
        ("wandb", {"WANDB_MODE": "disabled"}, "none"),
        ("wandb", {"WANDB_DISABLED": "true"}, "none"),
        ("wandb-offline", {"WANDB_MODE": "online"}, "wandb-offline"),
        ("tensorboard", {"WANDB_MODE": "offline"}, "tensorboard"),
    ],
)
def test_setting_and_variables_together(setting: str, variables: dict[str, str], where: str) -> None:
    assert destination(setting, variables) == where


def test_an_unknown_mode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MedcotError, match="WANDB_MODE is 'of'"):
        destination("wandb", {"WANDB_MODE": "of"})
    monkeypatch.setenv("WANDB_MODE", "of")
    [told] = log_all(configuration("auto"), tmp_path, [], ROWS)
    assert "WANDB_MODE is 'of'" in told and "training goes on" in told


@pytest.mark.parametrize(("package", "setting"), [("wandb", "wandb"), ("torch.utils.tensorboard", "tensorboard")])
def test_a_tracker_that_is_not_installed_is_named(
    package: str, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    [told] = log_all(configuration(setting), tmp_path, [], ROWS)
    assert "is not installed" in told and "pip install" in told


def test_only_the_first_process_of_several_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert log_all(configuration("tensorboard"), tmp_path, [], ROWS) == []
    assert list(tmp_path.iterdir()) == []


def test_the_tracker_s_files_are_no_part_of_the_adapter(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    log_all(configuration("tensorboard"), tmp_path / TRACKING_NAME, [], ROWS)
    assert any(path.is_file() for path in (tmp_path / TRACKING_NAME).rglob("*"))
    assert artifact_files(tmp_path) == [tmp_path / "metrics.jsonl"]
