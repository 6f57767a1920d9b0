"""A run's copy in another folder: complete when it is read, never ahead of what is finished."""

import json
import shutil
import time
from pathlib import Path

import pytest

from pipeline.artifacts import FileRecord, Manifest, read_manifest, sha256_file, write_manifest
from pipeline.checkpoints import TrainingProgress, latest_whole, seal
from pipeline.errors import MedcotError
from pipeline.kept_copy import bring_back, copy_finished, kept_copy


def artifact(folder: Path, files: dict[str, str], result: dict[str, object] | None = None) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    records = [FileRecord(path=name, size=len(text), sha256=sha256_file(folder / name)) for name, text in files.items()]
    manifest = Manifest(
        stage="x", fingerprint="f", config={}, inputs={}, versions={}, created="now", seconds=1.0,
        peak_memory_bytes=1, files=records, result=result or {},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


def checkpoint(folder: Path, step: int, text: str = "weights") -> Path:
    made = folder / "checkpoints" / f"checkpoint-{step}"
    (made / "deep").mkdir(parents=True)
    (made / "deep" / "adapter.safetensors").write_text(f"{text} {step}")
    seal(made, TrainingProgress(step, 1.0, 1))
    (folder / "in_progress.json").write_text(json.dumps({"fingerprint": "f"}))
    return made


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = tmp_path / "here" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("name: run\n")
    (run_dir / ".lock").touch()
    return run_dir


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "drive" / "run"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_finished_artifacts_are_copied_and_of_the_ggufs_the_one_to_ship(run_dir: Path, copy: Path) -> None:
    artifact(run_dir / "data", {"train.jsonl": "{}"})
    artifact(
        run_dir / "gguf", {"r-F16.gguf": "large", "r-Q4_K_M.gguf": "small", "Modelfile": "F"}, {"ship": "r-Q4_K_M.gguf"}
    )
    (run_dir / "verify").mkdir()
    (run_dir / "verify" / "half").write_text("under way")
    copy_finished(run_dir, copy)
    assert names(copy) == {
        "config.yaml", "data/train.jsonl", "data/manifest.json",
        "gguf/r-Q4_K_M.gguf", "gguf/Modelfile", "gguf/manifest.json",
    }  # fmt: skip
    assert read_manifest(copy / "data") == read_manifest(run_dir / "data")


def test_what_has_not_changed_is_not_copied_again(run_dir: Path, copy: Path) -> None:
    artifact(run_dir / "data", {"train.jsonl": "{}"})
    copy_finished(run_dir, copy)
    before = (copy / "data/train.jsonl").stat().st_mtime_ns
    copy_finished(run_dir, copy)
    assert (copy / "data/train.jsonl").stat().st_mtime_ns == before
    artifact(run_dir / "data", {"train.jsonl": "{...}"})
    copy_finished(run_dir, copy)
    assert (copy / "data/train.jsonl").read_text() == "{...}"


def test_whole_checkpoints_are_copied_torn_ones_are_not(run_dir: Path, copy: Path) -> None:
    adapter = run_dir / "adapter"
    checkpoint(adapter, 10)
    (adapter / "metrics.jsonl").write_text("{}\n")
    (adapter / "scratch").mkdir()
    (adapter / "scratch" / "rows.arrow").write_text("again in seconds")
    torn = adapter / "checkpoints" / "checkpoint-20"
    torn.mkdir()
    (torn / "adapter.safetensors").write_text("half")
    copy_finished(run_dir, copy)
    assert names(copy / "adapter") == {
        "in_progress.json", "metrics.jsonl",
        "checkpoints/checkpoint-10/deep/adapter.safetensors", "checkpoints/checkpoint-10/medcot_seal.json",
    }  # fmt: skip
    found = latest_whole(copy / "adapter" / "checkpoints")
    assert found is not None and found[1].step == 10


def test_replaced_checkpoints_go_and_those_of_another_training_are_not_taken_for_ours(
    run_dir: Path, copy: Path
) -> None:
    first = checkpoint(run_dir / "adapter", 10)
    copy_finished(run_dir, copy)
    shutil.rmtree(first)
    checkpoint(run_dir / "adapter", 10, "other weights")
    checkpoint(run_dir / "adapter", 20)
    copy_finished(run_dir, copy)
    kept = copy / "adapter" / "checkpoints"
    assert (kept / "checkpoint-10/deep/adapter.safetensors").read_text() == "other weights 10"
    shutil.rmtree(run_dir / "adapter" / "checkpoints" / "checkpoint-10")
    copy_finished(run_dir, copy)
    assert [path.name for path in kept.iterdir()] == ["checkpoint-20"]


def test_a_finished_training_leaves_no_checkpoints_in_the_copy(run_dir: Path, copy: Path) -> None:
    checkpoint(run_dir / "adapter", 10)
    copy_finished(run_dir, copy)
    shutil.rmtree(run_dir / "adapter")
    artifact(run_dir / "adapter", {"adapter_model.safetensors": "trained"})
    copy_finished(run_dir, copy)
    assert names(copy / "adapter") == {"adapter_model.safetensors", "manifest.json"}


def test_a_new_machine_goes_on_from_the_copy(run_dir: Path, copy: Path, tmp_path: Path) -> None:
    artifact(run_dir / "data", {"train.jsonl": "{}"})
    checkpoint(run_dir / "adapter", 10)
    said: list[str] = []
    with kept_copy(run_dir, copy.parent, said.append):
        pass
    assert said == []  # an existing run is not replaced by its copy
    shutil.rmtree(run_dir)
    run_dir.mkdir()
    with kept_copy(run_dir, copy.parent, said.append):
        assert names(run_dir) == names(copy)
        found = latest_whole(run_dir / "adapter" / "checkpoints")
        assert found is not None and found[1].step == 10
    assert said == [f"keep: going on from {copy}"]


def test_the_copy_is_made_on_the_way_and_at_the_end_however_it_ends(run_dir: Path, copy: Path) -> None:
    with pytest.raises(MedcotError, match="killed"), kept_copy(run_dir, copy.parent, print, seconds_between=0.01):
        artifact(run_dir / "data", {"train.jsonl": "{}"})
        for _ in range(500):
            if read_manifest(copy / "data"):
                break
            time.sleep(0.01)
        assert read_manifest(copy / "data") is not None
        artifact(run_dir / "eval", {"samples.jsonl": "{}"})
        raise MedcotError("killed")
    assert read_manifest(copy / "eval") is not None


def test_a_copy_that_cannot_be_written_does_not_stop_the_run(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "full").write_text("not a folder")
    said: list[str] = []
    with kept_copy(run_dir, tmp_path / "full", said.append):
        artifact(run_dir / "data", {"train.jsonl": "{}"})
    assert len(said) == 1 and said[0].startswith("keep: ") and "cannot be copied" in said[0]


def test_a_copy_that_cannot_be_read_is_told(copy: Path, tmp_path: Path) -> None:
    artifact(copy / "data", {"train.jsonl": "{}"})
    (copy / "config.yaml").write_text("name: run\n")
    (copy / "data" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MedcotError, match="cannot be read: mount it again"):
        bring_back(copy, tmp_path / "new", print)
    assert not (tmp_path / "new" / "config.yaml").exists()
