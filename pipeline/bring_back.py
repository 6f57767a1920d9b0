"""What a run takes from its copy, which an earlier session has left on a mounted drive (pipeline/kept_copy.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.artifacts import (
    CHECKPOINTS_NAME,
    LEFT_BEHIND_NAME,
    MANIFEST_NAME,
    Manifest,
    copy_file,
    read_manifest,
    sha256_file,
    write_json,
)
from pipeline.errors import MedcotError
from pipeline.stage_progress import mark_resumable, stage_progress

CONFIG_NAME = "config.yaml"


def bring_back(copy: Path, run_dir: Path, announce: Callable[[str], None]) -> None:
    """Fill an empty run folder from its copy; into another one only what is farther there or missing here.

    The configuration comes last, so that a kill in between is repeated; a folder comes whole or not at all.
    """
    if not (copy / CONFIG_NAME).is_file():
        return
    empty = not (run_dir / CONFIG_NAME).exists()
    if empty:
        announce(f"keep: resumed from {copy}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        waiting = sorted(path for path in copy.iterdir() if path.is_dir())
        brought = True
        while brought:  # what a folder was made from comes before it
            brought = False
            for folder in [each for each in waiting if _is_wanted(each, run_dir, empty)]:
                waiting.remove(folder)
                brought = True
                if not empty:
                    announce(f"keep: {folder.name} is farther in {copy}: taken from there")
                if not _bring(folder, run_dir / folder.name, announce):
                    waiting.append(folder)  # its checkpoints or records may be wanted
        if empty:
            shutil.copyfile(copy / CONFIG_NAME, run_dir / CONFIG_NAME)
    except (OSError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or "some of its files fail"
        raise MedcotError(
            f"The copy of an earlier session in {copy} cannot be read ({reason}): mount it again, or run without "
            "--keep."
        ) from error


def _is_wanted(folder: Path, run_dir: Path, empty: bool) -> bool:
    """Whether the run lacks what the copy has in ``folder``."""
    theirs, target = stage_progress(folder), run_dir / folder.name
    if theirs is None:
        return False  # the machine went while its first files were copied
    ours = stage_progress(target) if target.is_dir() else None
    if ours is not None:
        return theirs.goes_beyond(ours) and ours.fingerprint == theirs.fingerprint
    if target.is_dir() and any(target.iterdir()):
        return False  # someone else's files
    manifest = read_manifest(folder)
    if empty or manifest is None:
        return True
    here = {each.stage: each.digest for path in stage_folders(run_dir) if (each := read_manifest(path))}
    return all(here.get(stage) == digest for stage, digest in manifest.inputs.items())


def _bring(folder: Path, target: Path, announce: Callable[[str], None]) -> bool:
    """Copy a stage's folder back, whole or not at all.

    False for an artifact whose files are not what it says: it is none any more, and made again from what is left.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    manifest = read_manifest(folder)
    if manifest is None:
        shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns("*.tmp"))
    else:
        temporary.mkdir()
        other = left_behind_by_a_copy(manifest)
        absent = [record.path for record in manifest.files if not (folder / record.path).exists()]
        damaged = [path for path in absent if path not in other]
        for record in (each for each in manifest.files if each.path not in absent and not damaged):
            copy_file(folder / record.path, temporary / record.path)
            if sha256_file(temporary / record.path) != record.sha256:
                damaged.append(record.path)
        if damaged:
            is_what = "resumed from what was kept on the way" if mark_resumable(folder, manifest) else "made again"
            announce(f"keep: {folder / damaged[0]} was not copied whole: {manifest.stage} is {is_what}")
            (folder / MANIFEST_NAME).unlink()  # it is wrong, and would spare the file from being copied again
            shutil.rmtree(temporary)
            return False
        if (folder / CHECKPOINTS_NAME).is_dir():
            shutil.copytree(folder / CHECKPOINTS_NAME, temporary / CHECKPOINTS_NAME)
        if absent:
            write_json(temporary / LEFT_BEHIND_NAME, absent)
        shutil.copyfile(folder / MANIFEST_NAME, temporary / MANIFEST_NAME)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    return True


def left_behind_by_a_copy(manifest: Manifest) -> set[str]:
    """The exported models that are neither shipped nor the base: together larger than a free Drive."""
    result = manifest.result
    models = {file["name"] for file in result.get("files", []) if "ship" in result}
    return models - {result.get("ship"), result.get("base")}


def stage_folders(run_dir: Path) -> list[Path]:
    return sorted(path for path in run_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
