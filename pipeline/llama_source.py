"""The source distribution of llama-cpp-python, fetched by pip and unpacked once for several builds."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

from pipeline.errors import MedcotError
from pipeline.llama_build import PACKAGE


def fetch_source(version: str, folder: Path) -> Path:
    """Its unpacked folder, inside ``folder``. Raises MedcotError with pip's last words when it cannot be fetched."""
    unpacked = folder / f"{PACKAGE}-{version}"
    if unpacked.is_dir():
        return unpacked
    folder.mkdir(parents=True, exist_ok=True)
    # Without a build's isolation pip could not even ask it for its name: scikit-build-core is fetched with it.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    told = subprocess.run(
        [*command, "--dest", str(folder), f"{PACKAGE}=={version}"], capture_output=True, text=True, check=False
    )
    archive = next(folder.glob(f"{PACKAGE}-{version}.tar.gz"), None)
    if told.returncode != 0 or archive is None:
        words = told.stderr.strip().splitlines() or ["pip said nothing"]
        raise MedcotError(f"its source distribution cannot be fetched ({words[-1][:200]})")
    partial = folder / "unpacking"
    with tarfile.open(archive) as packed:
        packed.extractall(partial, filter="data")
    (partial / unpacked.name).rename(unpacked)
    archive.unlink()
    return unpacked
