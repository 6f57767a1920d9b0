"""Wheels that took long to compile, kept for the next session: in the cache, and where files outlive the machine.

    <folder>/<key of the recipe>/llama_cpp_python-….whl
    <folder>/<key of the recipe>/recipe.json             what it was made of, its size and SHA-256; written last

Google Drive's folder ``medcot`` is such a place, and /kaggle/working, whose files a later session has under
/kaggle/input when this version is attached to it. From there a wheel is offered, and only taken when MEDCOT_WHEELS
names its folder: a wheel is code, and a data set may be anyone's.

Standard library only: set-up asks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pipeline import platforms
from pipeline.cache import cache_dir
from pipeline.llama_build import Recipe

VARIABLE = "MEDCOT_WHEELS"
_RECORD = "recipe.json"


def folders() -> list[Path]:
    """Where wheels are kept; the nearest first."""
    kept = [cache_dir() / "wheels"]
    if (lasting := platforms.here().wheels) is not None:
        kept.append(lasting)
    return kept


def find(recipe: Recipe, places: Sequence[Path] | None = None) -> Path | None:
    """A whole wheel of exactly this recipe; one that is damaged, or made of something else, is none."""
    if places is None:
        places = [*folders(), *map(Path, filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)))]
    for place in places:
        folder = place / recipe.key
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            wheel = folder / Path(record["file"]).name
            if record["recipe"] != _plain(recipe) or wheel.stat().st_size != record["bytes"]:
                continue
            if _sha256(wheel) == record["sha256"]:
                return wheel
    return None


def offered(recipe: Recipe) -> Path | None:
    """A folder among what is attached to this session that has such a wheel; whose it is only the user knows."""
    attached = platforms.here().attached
    if attached is None:
        return None
    # Not every file of a large data set is looked at: Kaggle has outputs one to three folders deep.
    for depth in ("*", "*/*", "*/*/*"):
        for record in sorted(attached.glob(f"{depth}/wheels/{recipe.key}/{_RECORD}")):
            if find(recipe, [record.parents[1]]):
                return record.parents[1]
    return None


def keep(wheel: Path, recipe: Recipe, places: Sequence[Path] | None = None) -> list[str]:
    """Copy a wheel to every place; the sentences about those that could not take it."""
    problems = []
    for place in folders() if places is None else places:
        folder, partial = place / recipe.key, place / f"{recipe.key}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            shutil.copy(wheel, partial / wheel.name)
            record = {
                "recipe": _plain(recipe),
                "file": wheel.name,
                "bytes": wheel.stat().st_size,
                "sha256": _sha256(wheel),
            }
            (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except OSError as error:
            problems.append(f"the wheel cannot be kept in {place} ({error.strerror or error}): it is compiled again")
    return problems


def forget(recipe: Recipe) -> None:
    """Remove a wheel that does not run from the places that are this machine's to write."""
    for place in folders():
        shutil.rmtree(place / recipe.key, ignore_errors=True)


def _plain(recipe: Recipe) -> object:
    return json.loads(json.dumps(asdict(recipe)))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
