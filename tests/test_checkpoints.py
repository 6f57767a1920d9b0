import errno
from pathlib import Path

import pytest

from pipeline.checkpoints import TrainingProgress, disk_errors_told, latest_whole, prune, remove_after, seal, whole
from pipeline.errors import MedcotError


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(bytes(step))
    (path / "optimizer.pt").write_bytes(b"state")
    return path


def sealed(folder: Path, *steps: int) -> None:
    for step in steps:
        seal(checkpoint(folder, step), TrainingProgress(step, step * 2.0, step * 100))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_whole_checkpoint_is_used(tmp_path: Path) -> None:
    sealed(tmp_path, 5, 10, 100)
    assert latest_whole(tmp_path) == (tmp_path / "checkpoint-100", TrainingProgress(100, 200.0, 10000))


def test_a_seal_keeps_the_progress_to_the_last_bit(tmp_path: Path) -> None:
    progress = TrainingProgress(7, 0.1 + 0.2, 12, planned_steps=9, logged_step=6, pending_loss=1 / 3)
    seal(checkpoint(tmp_path, 7), progress)
    assert whole(tmp_path / "checkpoint-7") == progress


@pytest.mark.parametrize("damage", ["unsealed", "truncated", "changed", "missing", "torn seal"])
def test_a_damaged_checkpoint_is_passed_over_and_then_removed(tmp_path: Path, damage: str) -> None:
    sealed(tmp_path, 5)
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
        (last / "medcot_seal.json").write_text('{"progress": {"step": 10, "sec')
    found = latest_whole(tmp_path)
    assert found is not None and found[1].step == 5
    remove_after(tmp_path, found[1].step)
    assert names(tmp_path) == ["checkpoint-5"]


def test_nothing_there(tmp_path: Path) -> None:
    assert latest_whole(tmp_path / "absent") is None
    remove_after(tmp_path / "absent", 0)


@pytest.mark.parametrize(
    ("best", "left"),
    [(None, [30, 40]), (10, [10, 30, 40]), (40, [30, 40])],
)
def test_the_newest_two_and_the_best_are_kept(tmp_path: Path, best: int | None, left: list[int]) -> None:
    sealed(tmp_path, 10, 20, 30, 40)
    prune(tmp_path, best)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EACCES, "Permission denied"), r"\[Errno 13\] Permission denied"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed\nstack"), "file write failed"),
    ],
)
def test_what_cannot_be_written_is_told_in_one_sentence(tmp_path: Path, error: Exception, reason: str) -> None:
    with (
        pytest.raises(
            MedcotError, match=rf"^It cannot be written to .*{reason}; \d+\.\d\d GB are free.*from step 5"
        ) as told,
        disk_errors_told("It", tmp_path, 5),
    ):
        raise error
    assert "\n" not in str(told.value)
    with pytest.raises(MedcotError, match="from the beginning"), disk_errors_told("It", tmp_path, 0):
        raise error
