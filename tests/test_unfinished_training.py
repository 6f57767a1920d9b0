"""A training that ran out of time: the later stages may use it, and the next run goes on with it."""

import shutil
from pathlib import Path

import pytest
from tiny_models import save_model

from pipeline import run as driver
from pipeline.artifacts import CHECKPOINTS_NAME, IN_PROGRESS_NAME, Manifest, read_manifest, write_manifest
from pipeline.config import Config, load_config

pytestmark = pytest.mark.broad


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), layers=1)


@pytest.fixture(scope="module")
def prepared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "run"
    driver.run(config_of(base), folder, until="prepare")
    return folder


@pytest.fixture
def run_dir(prepared: Path, tmp_path: Path) -> Path:
    """A run of its own whose prepare stage is done."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def config_of(base: Path, *settings: str) -> Config:
    return load_config(None, [f"model.base={base}", "data.eval_rows=10", "name=tiny", *settings])


class Sessions:
    """Stands in for the stage's process: each session trains so many steps more of 10 and leaves a manifest."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.steps: list[int] = []
        self.killed = False

    def __call__(self, stage: driver.Stage, run_dir: Path) -> None:
        folder = run_dir / stage.folder
        checkpoint = folder / CHECKPOINTS_NAME / "step"
        step = int(checkpoint.read_text()) if checkpoint.is_file() else 0
        self.steps.append(step)
        assert not (folder / "manifest.json").exists(), "an artifact that is being changed is none"
        if self.killed:
            raise KeyboardInterrupt
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.write_text(str(step + 5))
        identity = driver.identify(stage, self.config, run_dir)
        write_manifest(
            folder,
            Manifest(
                stage=stage.name,
                fingerprint=identity.fingerprint,
                config={},
                inputs={},
                versions={},
                created="",
                seconds=1.0,
                peak_memory_bytes=1,
                files=[],
                result={"finished": step + 5 >= 10},
            ),
        )
        (folder / IN_PROGRESS_NAME).unlink()


def train(config: Config, run_dir: Path) -> str:
    return driver.run(config, run_dir, only="train", plan_first=False).stages[0].status


def test_the_next_run_goes_on_until_it_is_finished(base: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(base, "training.max_minutes=1")
    sessions = Sessions(config)
    monkeypatch.setattr(driver, "_run_in_process", sessions)
    folder = run_dir / "adapter"

    assert train(config, run_dir) == "made"
    partial = read_manifest(folder)
    assert partial is not None and (folder / CHECKPOINTS_NAME).is_dir()
    assert driver.identify(driver.stage_named("export"), config, run_dir).inputs["train"] == partial.digest

    sessions.killed = True  # the artifact is gone until a session ends, its checkpoints are not
    with pytest.raises(KeyboardInterrupt):
        train(config, run_dir)
    assert read_manifest(folder) is None
    sessions.killed = False
    # Another limit, or none, is no other training.
    assert train(config_of(base), run_dir) == "resumed"
    assert sessions.steps == [0, 5, 5]
    assert read_manifest(folder) is not None and not (folder / CHECKPOINTS_NAME).exists()
    assert train(config, run_dir) == "up to date"


def test_force_and_other_settings_begin_anew(base: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(base)
    sessions = Sessions(config)
    monkeypatch.setattr(driver, "_run_in_process", sessions)
    assert train(config, run_dir) == "made"
    forced = driver.run(config, run_dir, only="train", force=["train"], plan_first=False)
    assert forced.stages[0].status == "made" and sessions.steps == [0, 0]
    sessions.config = config_of(base, "training.learning_rate=1e-5")
    assert train(sessions.config, run_dir) == "made"
    assert sessions.steps == [0, 0, 0]


def test_where_metrics_go_and_how_long_it_may_take_change_no_fingerprint(base: Path, run_dir: Path) -> None:
    stage = driver.stage_named("train")
    expected = driver.identify(stage, config_of(base), run_dir).fingerprint
    free = config_of(base, "training.max_minutes=3", "training.report_to=tensorboard")
    assert driver.identify(stage, free, run_dir).fingerprint == expected
    assert driver.identify(stage, config_of(base, "training.learning_rate=1e-5"), run_dir).fingerprint != expected
