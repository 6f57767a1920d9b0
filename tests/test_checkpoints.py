from pathlib import Path

import pytest

from pipeline.checkpoints import TrainingProgress, latest_whole, seal


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(bytes(step))
    (path / "optimizer.pt").write_bytes(b"state")
    return path


def test_the_newest_whole_checkpoint_is_used(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        seal(checkpoint(tmp_path, step), TrainingProgress(step, step * 2.0, step * 100))
    assert latest_whole(tmp_path) == (tmp_path / "checkpoint-100", TrainingProgress(100, 200.0, 10000))


@pytest.mark.parametrize("damage", ["unsealed", "truncated", "changed", "missing", "torn seal"])
def test_a_damaged_checkpoint_is_passed_over_and_removed(tmp_path: Path, damage: str) -> None:
    seal(checkpoint(tmp_path, 5), TrainingProgress(5, 1.0, 1))
    last = checkpoint(tmp_path, 10)
    if damage != "unsealed":
        seal(last, TrainingProgress(10, 2.0, 2))
    if damage == "truncated":
        (last / "optimizer.pt").write_bytes(b"sta")
    elif damage == "changed":
        (last / "optimizer.pt").write_bytes(b"stale")
    elif damage == "missing":
        (last / "optimizer.pt").unlink()
    elif damage == "torn seal":
        (last / "medcot_seal.json").write_text('{"step": 10, "sec')
    found = latest_whole(tmp_path)
    assert found is not None and found[1].step == 5
    assert not last.exists()


def test_nothing_there(tmp_path: Path) -> None:
    assert latest_whole(tmp_path / "absent") is None
