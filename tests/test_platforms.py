"""Kaggle, Colab and a machine of one's own, told apart by environment and folders alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import platforms
from pipeline.platforms import COLAB, KAGGLE, detect, no_gpu_sentence, use_scratch, why_no_index

ROOT = Path(__file__).resolve().parent.parent
KAGGLES = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
COLABS = {"COLAB_RELEASE_TAG": "release-colab"}


@pytest.fixture
def kaggle_root(tmp_path: Path) -> Path:
    (tmp_path / "kaggle/working").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def colab_root(tmp_path: Path) -> Path:
    (tmp_path / "content/sample_data").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("environ", [KAGGLES, {}, KAGGLES | COLABS], ids=["variable", "folder", "Colab's image"])
def test_kaggle_keeps_runs_and_nothing_else_in_its_working_folder(environ: dict[str, str], kaggle_root: Path) -> None:
    found = detect(environ, kaggle_root)
    assert found.service is KAGGLE and found.name == "Kaggle"
    assert found.runs == kaggle_root / "kaggle/working/runs"
    assert found.scratch == kaggle_root / "kaggle/temp"
    assert found.kept is None and found.to_keep is None and "Save Version" in found.persistence


@pytest.mark.parametrize("environ", [COLABS, {}], ids=["variable", "folder"])
def test_colab_without_drive_says_that_nothing_is_kept(environ: dict[str, str], colab_root: Path) -> None:
    found = detect(environ, colab_root)
    assert found.service is COLAB and found.runs == colab_root / "content/runs"
    assert found.kept is None and found.scratch is None
    assert found.to_keep is not None and "drive.mount" in found.to_keep and "medcot publish" in found.to_keep


def test_colab_with_drive_runs_on_its_own_disk_and_copies_to_drive(colab_root: Path) -> None:
    (colab_root / "content/drive/MyDrive").mkdir(parents=True)
    found = detect({}, colab_root)
    assert found.runs == colab_root / "content/runs"
    assert found.kept == colab_root / "content/drive/MyDrive/medcot" and found.to_keep is None
    assert found.wheels == found.kept / "wheels"


def test_a_machine_of_ones_own_keeps_its_runs_beside_the_project(tmp_path: Path) -> None:
    found = detect({}, tmp_path)
    assert found.service is None and found.runs == Path("runs")
    assert found.kept is None and found.scratch is None and found.to_keep is None and found.wheels is None


@pytest.mark.parametrize("environ", [{}, KAGGLES, COLABS])
def test_the_user_chooses_where_runs_are(environ: dict[str, str], tmp_path: Path) -> None:
    assert detect(environ | {"MEDCOT_RUNS": "/data/runs"}, tmp_path).runs == Path("/data/runs")


def test_caches_go_where_there_is_room_and_the_token_stays_where_it_is(kaggle_root: Path) -> None:
    environ: dict[str, str] = {"TMPDIR": "/chosen"}
    use_scratch(detect(KAGGLES, kaggle_root), environ)
    assert environ.pop("TMPDIR") == "/chosen"
    assert set(environ) == {"MEDCOT_CACHE", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_DATASETS_CACHE"}
    for folder in map(Path, environ.values()):
        assert folder.is_dir() and folder.is_relative_to(kaggle_root / "kaggle/temp")


def test_a_hub_folder_of_the_users_is_respected(kaggle_root: Path) -> None:
    environ = {"HF_HOME": "/chosen"}
    use_scratch(detect(KAGGLES, kaggle_root), environ)
    assert set(environ) == {"HF_HOME", "MEDCOT_CACHE", "TMPDIR"}


def test_a_machine_of_ones_own_is_left_as_it_is(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    use_scratch(detect({}, tmp_path), environ)
    assert environ == {}


def test_a_notebook_without_internet_is_told_the_setting(kaggle_root: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: nobody else gets the port, and nobody answers
        index = {"PIP_INDEX_URL": f"http://127.0.0.1:{closed.getsockname()[1]}/simple"}
        reason = why_no_index(detect(KAGGLES, kaggle_root), index)
        assert reason is not None and "no internet: switch it on (on Kaggle: Settings, Turn on internet" in reason
        assert why_no_index(detect({}, kaggle_root / "nowhere"), index) is None
        closed.listen()
        assert why_no_index(detect(KAGGLES, kaggle_root), index) is None


def test_a_tpu_is_seen(tmp_path: Path) -> None:
    unused = "this session has no GPU, and medcot does not use its TPU"
    assert no_gpu_sentence({}, tmp_path) == "this session has no GPU"
    assert no_gpu_sentence({"TPU_ACCELERATOR_TYPE": "v5e-8"}, tmp_path) == unused
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/accel0").touch()
    assert no_gpu_sentence({}, tmp_path) == unused


@pytest.mark.parametrize(("environ", "name"), [(KAGGLES, "Kaggle"), (COLABS, "Colab"), ({}, "")])
def test_the_shell_asks_with_nothing_installed(environ: dict[str, str], name: str, tmp_path: Path) -> None:
    """-I -S: no site-packages, as before set-up."""
    outcome = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "pipeline/platforms.py"],
        env={"PATH": os.environ["PATH"]} | environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert outcome.stdout.strip() == name and outcome.stderr == ""


def test_every_service_has_a_machine_to_plan_for() -> None:
    from pipeline.machines import MACHINES

    assert {machine.platform for machine in MACHINES.values()} >= {KAGGLE.name, COLAB.name}
    assert platforms.service_named("Linux x86_64") is None and platforms.service_named("Kaggle") is KAGGLE


@pytest.mark.parametrize("service", [False, True])
def test_a_services_environment_is_known_by_its_place_alone(
    service: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    at = platforms.detect({"KAGGLE_KERNEL_RUN_TYPE": "Batch"} if service else {}, tmp_path)
    monkeypatch.setattr(platforms, "here", lambda: at)
    (tmp_path / "purelib").mkdir()
    before = platforms.environment_id()
    (tmp_path / "purelib").rename(tmp_path / "old")  # keeps its number
    (tmp_path / "purelib").mkdir()
    assert (platforms.environment_id() == before) is service


def test_environments_are_told_apart_also_one_made_anew_in_the_same_place(tmp_path: Path) -> None:
    def identity(name: str) -> str:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / name], check=True)
        command = [tmp_path / name / "bin/python", "-I", ROOT / "pipeline/platforms.py", "environment"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    first = identity("a")
    assert identity("a") == first  # as it is
    assert identity("b") != first
    (tmp_path / "a").rename(tmp_path / "old")
    assert identity("a") != first
