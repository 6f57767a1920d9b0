"""Triton beside the CPU build of PyTorch, which comes without it: 198 MB, fetched once into the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "3.9.0"
_SECONDS = 300


class NotFetched(Exception):
    """Why there is no Triton here."""


def triton_folder() -> Path:
    """The folder to put on PYTHONPATH; raises NotFetched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medcot"
    folder = cache / f"triton-{VERSION}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"triton-{VERSION}-", dir=cache))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
    try:
        subprocess.run([*install, f"triton=={VERSION}"], check=True, capture_output=True, text=True, timeout=_SECONDS)
        partial.rename(folder)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
        if not folder.is_dir():  # else another process was faster
            told = getattr(error, "stderr", None) or str(error)
            raise NotFetched(f"triton {VERSION} cannot be installed: {str(told).strip().splitlines()[-1]}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
