"""A second copy of a run where it outlives the machine, such as a mounted Google Drive.

    medcot run deepseek-r1-8b --keep /content/drive/MyDrive/medcot

A run does not live there itself: Drive's driver takes every written file whole into a cache on the machine's own disk
and uploads it later, so that large files would be on that disk twice and half-written ones nowhere; and a free account
holds 15 GB, less than an 8B model's run. So the run is made on the machine's disk, and what the next session needs is
copied: finished artifacts, whole checkpoints, the records of an evaluation at work, and of the GGUFs the one to ship
and the base that it is compared with. The others stay behind; once they are verified nothing needs them.

A file is copied once. A manifest is copied after its files, and what comes back is held to its hashes.
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
    Manifest,
    copy_file,
    read_manifest,
)
from pipeline.bring_back import CONFIG_NAME, bring_back, left_behind_by_a_copy, stage_folders
from pipeline.checkpoints import SEAL_NAME, newest_first
from pipeline.stage_progress import mark_resumable, records, sealed_checkpoints, why_not_replaced, work_in

# Replaced files go to Drive's bin, which counts, so checkpoints are not copied as often as they are made.
_SECONDS_BETWEEN = 300.0
# A record is minutes of work and a few kilobytes.
_SECONDS_BETWEEN_RECORDS = 2.0
_REPORT_NAME = "report.html"  # of a first report, which is no artifact


@contextmanager
def kept_copy(
    run_dir: Path,
    keep: Path | None,
    announce: Callable[[str], None],
    seconds_between: float = _SECONDS_BETWEEN,
) -> Iterator[Callable[[], None]]:
    """While a run is at work, and when it ends however it does, copy what is finished to ``keep/<name of run_dir>``.

    Begins with what an earlier session's copy has and ``run_dir`` lacks; yields a function that asks for a copy now, on
    the way. What cannot be copied is told and does not stop the run; raises MedcotError when an earlier session's copy
    cannot be read.
    """
    copy = None if keep is None else keep / run_dir.name
    if copy is None or copy.resolve() == run_dir.resolve():  # a run that lives there is its own copy
        yield lambda: None
        return
    bring_back(copy, run_dir, announce)
    ended, due = threading.Event(), threading.Event()
    told: set[str] = set()

    def copy_now(copy_it: Callable[[Path, Path], list[str]]) -> None:
        try:
            sentences = copy_it(run_dir, copy)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not ended.is_set():
                return  # the run has replaced something meanwhile; the next copy has what takes its place
            sentences = [f"{error.filename or copy} cannot be copied to {copy} ({error.strerror or error})"]
        for sentence in sentences:
            if sentence not in told:
                announce(f"keep: {sentence}")
                told.add(sentence)

    def copy_on_the_way() -> None:
        while due.wait(seconds_between) or not ended.is_set():
            due.clear()
            if ended.is_set():
                return
            copy_now(_copy_without_records)

    def copy_records_on_the_way() -> None:
        copied = _RecordsCopy()
        while not ended.wait(min(seconds_between, _SECONDS_BETWEEN_RECORDS)):
            copy_now(copied.bring_up_to_date)

    # Two, because a GGUF may be under way for minutes. Neither touches a folder of the other's.
    workers = [threading.Thread(target=work, daemon=True) for work in (copy_on_the_way, copy_records_on_the_way)]
    for worker in workers:
        worker.start()
    try:
        yield due.set
    finally:
        ended.set()
        due.set()
        for worker in workers:
            worker.join()
        copy_now(copy_finished)


def copy_finished(run_dir: Path, copy: Path) -> list[str]:
    """Bring the copy up to date with every finished artifact and what an unfinished one is resumed from.

    Gives sentences on what is worth knowing. A state never replaces one that is farther.
    """
    return [*_RecordsCopy().bring_up_to_date(run_dir, copy), *_copy_without_records(run_dir, copy)]


def _copy_without_records(run_dir: Path, copy: Path) -> list[str]:
    # The configuration first: without it nothing is taken up.
    if (run_dir / CONFIG_NAME).is_file():
        _copy_if_changed(run_dir / CONFIG_NAME, copy / CONFIG_NAME)
    folders = [folder for folder in stage_folders(run_dir) if not records(folder)]
    return [sentence for folder in folders if (sentence := _copy_folder(folder, copy / folder.name))]


class _RecordsCopy:
    """Copies evaluations, which grow by small records; asks Drive for nothing as long as no record is new."""

    def __init__(self) -> None:
        self._copied: dict[Path, list[tuple[str, int, int]]] = {}

    def bring_up_to_date(self, run_dir: Path, copy: Path) -> list[str]:
        sentences = []
        for folder in (each for each in stage_folders(run_dir) if records(each)):
            found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
            if self._copied.get(folder) != found:
                if sentence := _copy_folder(folder, copy / folder.name):
                    sentences.append(sentence)
                self._copied[folder] = found
        return sentences


def _copy_folder(folder: Path, copy: Path) -> str | None:
    """A finished artifact, or what an unfinished one is resumed from; gives a sentence where there is one to say."""
    manifest = read_manifest(folder)
    if manifest is not None and _same(folder / MANIFEST_NAME, copy / MANIFEST_NAME):
        return None
    if manifest is None and not (sealed_checkpoints(folder) or records(folder) or (folder / _REPORT_NAME).is_file()):
        return None  # nothing to resume from yet: what an earlier session left in the copy stays
    if (reason := why_not_replaced(folder, copy)) is not None:
        return reason
    before = read_manifest(copy)
    _remove_other_work(folder, copy)
    kept = _copy_unfinished(folder, copy) if manifest is None else _copy_artifact(folder, copy, manifest, before)
    # Under another name it is of no use any more, and fills Drive.
    for record in before.files if before is not None else []:
        if record.path not in kept:
            (copy / record.path).unlink(missing_ok=True)
    ship = None if manifest is None else manifest.result.get("ship")
    return None if ship is None else f"{copy / ship} is whole"


def _remove_other_work(folder: Path, copy: Path) -> None:
    """Or a copy that is cut off would be resumed from the checkpoints of other work."""
    if work_in(folder) == work_in(copy):
        return
    (copy / IN_PROGRESS_NAME).unlink(missing_ok=True)
    if (copy / CHECKPOINTS_NAME).is_dir():
        (copy / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(copy / CHECKPOINTS_NAME)


def _copy_artifact(folder: Path, copy: Path, manifest: Manifest, before: Manifest | None) -> set[str]:
    """Gives the paths of the files that are kept; what the copy has already by its own manifest is not copied again."""
    there = {record.path: record for record in before.files} if before is not None else {}
    other = left_behind_by_a_copy(manifest)
    # The one to ship is in use first.
    files = sorted(manifest.files, key=lambda record: record.path != manifest.result.get("ship"))
    kept = [record for record in files if record.path not in other]
    if before is not None and before.fingerprint == manifest.fingerprint:
        # Without its manifest the copy is then what the artifact was continued from.
        mark_resumable(copy, before)
    (copy / MANIFEST_NAME).unlink(missing_ok=True)
    for record in kept:
        target = copy / record.path
        if there.get(record.path) != record or not target.is_file() or target.stat().st_size != record.size:
            copy_file(folder / record.path, target)
    # A training that has run out of time is an artifact, and is resumed from its checkpoints.
    if sealed_checkpoints(folder):
        _copy_checkpoints(folder / CHECKPOINTS_NAME, copy / CHECKPOINTS_NAME)
    copy_file(folder / MANIFEST_NAME, copy / MANIFEST_NAME)
    (copy / IN_PROGRESS_NAME).unlink(missing_ok=True)
    # Of a finished training they go last: they are what a copy without its manifest is resumed from.
    if not sealed_checkpoints(folder) and (copy / CHECKPOINTS_NAME).is_dir():
        shutil.rmtree(copy / CHECKPOINTS_NAME)
    return {record.path for record in kept}


def _copy_unfinished(folder: Path, copy: Path) -> set[str]:
    """What an interrupted stage is resumed from: its checkpoints and the small files next to them."""
    # First, because without it the rest of a copy that is cut off belongs to nothing.
    _copy_if_changed(folder / IN_PROGRESS_NAME, copy / IN_PROGRESS_NAME)
    _copy_checkpoints(folder / CHECKPOINTS_NAME, copy / CHECKPOINTS_NAME)
    small = [path for path in folder.iterdir() if path.is_file() and not path.name.endswith(WORKING_SUFFIXES)]
    for path in small:
        _copy_if_changed(path, copy / path.name)
    (copy / MANIFEST_NAME).unlink(missing_ok=True)
    return {path.name for path in small}


def _copy_checkpoints(checkpoints: Path, copy: Path) -> None:
    """Make the copy hold the sealed checkpoints, the newest first, and no others.

    A seal holds its checkpoint's hashes, so an equal seal says that the checkpoint is there; it is copied last.
    """
    sealed = sealed_checkpoints(checkpoints.parent)
    for checkpoint in sealed:
        target = copy / checkpoint.name
        if _same(checkpoint / SEAL_NAME, target / SEAL_NAME):
            continue
        (target / SEAL_NAME).unlink(missing_ok=True)
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL_NAME):
            copy_file(path, target / path.relative_to(checkpoint))
        copy_file(checkpoint / SEAL_NAME, target / SEAL_NAME)
    for former in newest_first(copy):
        if former.name not in {path.name for path in sealed}:
            shutil.rmtree(former)


def _copy_if_changed(path: Path, copy: Path) -> None:
    """A small file; what is replaced goes to Drive's bin."""
    if not _same(path, copy):
        copy_file(path, copy)


def _same(first: Path, second: Path) -> bool:
    """Whether two small files are equal; a missing one is not."""
    try:
        return first.read_bytes() == second.read_bytes()
    except FileNotFoundError:
        return False
