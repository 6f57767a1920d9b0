"""A stage that its time limit ended: finished for this limit, and continued by the next run with a larger one."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import run as driver
from pipeline.artifacts import IN_PROGRESS_NAME, Manifest, read_manifest, write_manifest
from pipeline.config import Config, load_config


def finish(stage: driver.Stage, config: Config, run_dir: Path, result: dict[str, Any]) -> None:
    identity = driver.identify(stage, config, run_dir)
    manifest = Manifest(
        stage=stage.name,
        fingerprint=identity.fingerprint,
        config=identity.config,
        inputs=identity.inputs,
        versions=identity.versions,
        created="now",
        seconds=1.0,
        peak_memory_bytes=1,
        files=[],
        result=result,
    )
    (run_dir / stage.folder).mkdir(parents=True, exist_ok=True)
    write_manifest(run_dir / stage.folder, manifest)
    (run_dir / stage.folder / IN_PROGRESS_NAME).unlink(missing_ok=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    from tiny_models import save_model

    return save_model(tmp_path / "base", layers=1)


class Sessions:
    """Stands in for the stage's process: each one adds a line of records and ends early while there is a limit."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.found: list[int] = []

    def __call__(self, stage: driver.Stage, run_dir: Path) -> None:
        folder = run_dir / stage.folder
        records = folder / "records.jsonl"
        lines = records.read_text() if records.is_file() else ""
        assert read_manifest(folder) is None, "an artifact that is being changed is none"
        self.found.append(lines.count("\n"))
        records.write_text(lines + "{}\n")
        limit = getattr(self.config, "bench" if stage.name == "bench" else "evaluation").max_minutes
        finish(stage, self.config, run_dir, {"ended_early": None if limit is None else {"minutes": limit}})


@pytest.mark.parametrize(("name", "section"), [("evaluate", "evaluation"), ("bench", "bench")])
def test_it_continues_once_the_limit_is_raised_and_not_before(
    name: str, section: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config_with(limit: str) -> Config:
        return load_config(None, [f"model.base={base}", "name=tiny", f"{section}.max_minutes={limit}"])

    run_dir, said = tmp_path / "run", list[str]()
    for earlier in driver.STAGE_NAMES[: driver.STAGE_NAMES.index(name)]:
        finish(driver.stage_named(earlier), config_with("5"), run_dir, {})
    sessions = Sessions(config_with("5"))
    monkeypatch.setattr(driver, "_run_in_process", sessions)

    def session(limit: str) -> str:
        sessions.config = config_with(limit)
        outcome = driver.run(sessions.config, run_dir, only=name, plan_first=False, announce=said.append)
        return outcome.stages[0].status

    assert [session(limit) for limit in ("5", "5", "3", "7.5", "7", "null", "null", "2")] == [
        "made", "up to date", "up to date", "resumed", "up to date", "resumed", "up to date", "up to date"
    ]  # fmt: skip
    assert sessions.found == [0, 1, 2]  # each session found what the ones before had kept
    assert said.count(f"{name}: resumed") == 2
    # Whoever changes anything else begins with an empty folder, though the limit is larger too.
    sessions.config = load_config(None, [f"model.base={base}", "name=tiny", "seed=7", f"{section}.max_minutes=9"])
    for earlier in driver.STAGE_NAMES[: driver.STAGE_NAMES.index(name)]:
        finish(driver.stage_named(earlier), sessions.config, run_dir, {})
    driver.run(sessions.config, run_dir, only=name, plan_first=False)
    assert sessions.found[-1] == 0
