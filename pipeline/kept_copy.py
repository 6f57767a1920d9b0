"""A second copy of a run where it outlives the machine, such as a mounted Google Drive.

    medcot run deepseek-r1-8b --keep /content/drive/MyDrive/medcot

A run does not live there itself: Drive's driver takes every written file whole into a cache on the machine's own disk
and uploads it later, so that large files would be on that disk twice and half-written ones nowhere; and a free account
holds 15 GB, less than an 8B model's run. So the run is made on the machine's disk, and what the next session needs is
copied: finished artifacts, whole checkpoints, and of the GGUFs the one to ship. When they come back, export makes the
others again.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.artifacts import (
    CHECKPOINTS_NAME,
    IN_PROGRESS_NAME,
    MANIFEST_NAME,
    WORKING_SUFFIXES,
    read_manifest,
)
from pipeline.checkpoints import SEAL_NAME, newest_first
from pipeline.errors import MedcotError

# Replaced files go to Drive's bin, which counts, so checkpoints are not copied as often as they are made.
_SECONDS_BETWEEN = 300.0
_CONFIG_NAME = "config.yaml"


@contextmanager
def kept_copy(
    run_dir: Path, keep: Path | None, announce: Callable[[str], None], seconds_between: float = _SECONDS_BETWEEN
) -> Iterator[None]:
    """While a run is at work, and when it ends however it does, copy what is finished to ``keep/<name of run_dir>``.

    Begins with the copy of an earlier session when ``run_dir`` is empty. What cannot be copied is told and does not
    stop the run; raises MedcotError when an earlier session's copy cannot be read.
    """
    copy = None if keep is None else keep / run_dir.name
    if copy is None or copy.resolve() == run_dir.resolve():  # a run that lives there is its own copy
        yield
        return
    bring_back(copy, run_dir, announce)
    ended = threading.Event()

    def copy_now() -> None:
        try:
            copy_finished(run_dir, copy)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not ended.is_set():
                return  # the run has replaced something meanwhile; the next copy has what takes its place
            announce(f"keep: {error.filename or copy} cannot be copied to {copy} ({error.strerror or error})")

    def copy_on_the_way() -> None:
        while not ended.wait(seconds_between):
            copy_now()

    worker = threading.Thread(target=copy_on_the_way, daemon=True)
    worker.start()
    try:
        yield
    finally:
        ended.set()
        worker.join()
        copy_now()


def bring_back(copy: Path, run_dir: Path, announce: Callable[[str], None]) -> None:
    """Fill an empty run folder from its copy; its configuration comes last, so that a kill in between is repeated."""
    if (run_dir / _CONFIG_NAME).exists() or not (copy / _CONFIG_NAME).is_file():
        return
    announce(f"keep: going on from {copy}")
    try:
        for folder in (path for path in copy.iterdir() if path.is_dir()):
            # Neither: the machine went while its first files were copied; run.py would take them for someone else's.
            if (folder / MANIFEST_NAME).is_file() or (folder / IN_PROGRESS_NAME).is_file():
                ignore = shutil.ignore_patterns("*.tmp")
                shutil.copytree(folder, run_dir / folder.name, dirs_exist_ok=True, ignore=ignore)
        shutil.copyfile(copy / _CONFIG_NAME, run_dir / _CONFIG_NAME)
    except (OSError, shutil.Error) as error:
        raise MedcotError(
            f"The copy of an earlier session in {copy} cannot be read: mount it again, or run without --keep."
        ) from error


def copy_finished(run_dir: Path, copy: Path) -> None:
    """Bring the copy up to date with every finished artifact and the whole checkpoints of an unfinished one."""
    for folder in sorted(path for path in run_dir.iterdir() if path.is_dir()):
        if (folder / MANIFEST_NAME).is_file():
            _copy_artifact(folder, copy / folder.name)
        elif (folder / CHECKPOINTS_NAME).is_dir():
            _copy_unfinished(folder, copy / folder.name)
    if (run_dir / _CONFIG_NAME).is_file():
        _copy_file(run_dir / _CONFIG_NAME, copy / _CONFIG_NAME)


def _copy_artifact(folder: Path, copy: Path) -> None:
    manifest = read_manifest(folder)
    if manifest is None or _same(folder / MANIFEST_NAME, copy / MANIFEST_NAME):
        return
    (copy / MANIFEST_NAME).unlink(missing_ok=True)
    for record in manifest.files:
        other_gguf = record.path.endswith(".gguf") and record.path != manifest.result.get("ship")
        if not other_gguf:
            _copy_file(folder / record.path, copy / record.path)
    # A training that has run out of time is an artifact, and goes on from its checkpoints.
    _copy_checkpoints(folder / CHECKPOINTS_NAME, copy / CHECKPOINTS_NAME)
    _copy_file(folder / MANIFEST_NAME, copy / MANIFEST_NAME)
    (copy / IN_PROGRESS_NAME).unlink(missing_ok=True)


def _copy_unfinished(folder: Path, copy: Path) -> None:
    """What an interrupted stage goes on from: its checkpoints and the small files beside them."""
    if not any((path / SEAL_NAME).is_file() for path in newest_first(folder / CHECKPOINTS_NAME)):
        return  # nothing to go on from yet: what an earlier session left in the copy stays
    # First, because without it the checkpoints of a copy that is cut off belong to nothing.
    _copy_file(folder / IN_PROGRESS_NAME, copy / IN_PROGRESS_NAME)
    _copy_checkpoints(folder / CHECKPOINTS_NAME, copy / CHECKPOINTS_NAME)
    for path in folder.iterdir():
        if path.is_file() and not path.name.endswith(WORKING_SUFFIXES):
            _copy_file(path, copy / path.name)
    (copy / MANIFEST_NAME).unlink(missing_ok=True)


def _copy_checkpoints(checkpoints: Path, copy: Path) -> None:
    """Make the copy hold the sealed checkpoints, the newest first, and no others.

    A seal holds its checkpoint's hashes, so an equal seal says that the checkpoint is there; it is copied last.
    """
    sealed = [path for path in newest_first(checkpoints) if (path / SEAL_NAME).is_file()]
    for checkpoint in sealed:
        target = copy / checkpoint.name
        if _same(checkpoint / SEAL_NAME, target / SEAL_NAME):
            continue
        (target / SEAL_NAME).unlink(missing_ok=True)
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL_NAME):
            _copy_file(path, target / path.relative_to(checkpoint))
        _copy_file(checkpoint / SEAL_NAME, target / SEAL_NAME)
    for former in newest_first(copy):
        if former.name not in {path.name for path in sealed}:
            shutil.rmtree(former)


def _same(first: Path, second: Path) -> bool:
    """Whether two small files are equal; a missing one is not."""
    try:
        return first.read_bytes() == second.read_bytes()
    except FileNotFoundError:
        return False


def _copy_file(source: Path, target: Path) -> None:
    """Whole or not at all, as far as a network folder can promise it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
