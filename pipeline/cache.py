"""Folders that are expensive to make and safe to delete: each is made once, and is whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import MedcotError


def cache_dir() -> Path:
    """Folder for things that are expensive to make and safe to delete ($MEDCOT_CACHE, else the user's cache)."""
    if "MEDCOT_CACHE" in os.environ:
        return Path(os.environ["MEDCOT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "medcot"


def made_once(folder: Path, proof: str, make: Callable[[Path], None]) -> Path:
    """``folder``, made by ``make`` in a temporary place unless its file ``proof`` is there already.

    Raises MedcotError where the cache cannot be written; what ``make`` raises is passed on, and leaves nothing.
    """
    if (folder / proof).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise MedcotError(f"{folder.parent} cannot be written ({error.strerror}): set MEDCOT_CACHE.") from error
    try:
        make(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process finished the same work first; its folder is as good.
            if not (folder / proof).is_file():
                raise
    except OSError as error:
        raise MedcotError(f"{folder.name} cannot be written into {folder.parent}: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
