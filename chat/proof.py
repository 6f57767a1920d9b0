"""Prove, in a process of its own, that a GGUF loads, tokenizes and decodes a token.

    python -m chat.proof FILE.gguf

libllama ends the whole process on some files (a vocabulary of a wrong type aborts the first ``tokenize``),
and a build for another CPU dies on its first instruction. A child that dies becomes one sentence here. A
proven file is remembered by path, size, time of change and llama-cpp-python version.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.artifacts import write_text
from pipeline.errors import MedcotError

# Letters, accents, another script, an emoji, digits and white space: every branch of a tokenizer.
PROBE = "Fièvre 39,5 °C?\n\tκαρδία 心臓 🫀"


class Proof(BaseModel):
    """What the child found out; ``context_length`` is what the model was trained for (tokens)."""

    model_config = ConfigDict(frozen=True)
    context_length: int | None


class _Outcome(BaseModel):
    """The child's one line of standard output: a proof, or the sentence for the user."""

    proof: Proof | None = None
    error: str | None = None


class _Identity(BaseModel):
    """What a proof holds for: this file, unchanged, under this llama-cpp-python."""

    model_config = ConfigDict(frozen=True)
    size: int
    mtime_ns: int
    llama_cpp_python: str


class _Proven(BaseModel):
    identity: _Identity
    proof: Proof


class _ProvenFiles(BaseModel):
    """The cache: a file's path -> what was proven of it."""

    files: dict[str, _Proven] = {}


def prove(path: Path) -> Proof:
    """Return the proof for ``path``, remembered or fresh; raises MedcotError when the file does not pass."""
    remembered = known_proof(path)
    if remembered is not None:
        return remembered
    identity = _identity(path)
    proof = _prove_in_child(path)
    if identity is not None:
        _remember(path, _Proven(identity=identity, proof=proof))
    return proof


def known_proof(path: Path) -> Proof | None:
    """The remembered proof, if the file is still the same."""
    proven = _read_cache().files.get(str(path.resolve()))
    return proven.proof if proven is not None and proven.identity == _identity(path) else None


def _prove_in_child(path: Path) -> Proof:
    project = str(Path(__file__).resolve().parent.parent)
    search_path = os.pathsep.join(filter(None, [project, os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-m", "chat.proof", str(path)],
        env={**os.environ, "PYTHONPATH": search_path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    try:
        outcome = _Outcome.model_validate_json(child.stdout.strip().rpartition("\n")[2])
    except ValidationError:
        outcome = _Outcome()
    if outcome.proof is not None and child.returncode == 0:
        return outcome.proof
    raise MedcotError(outcome.error or _explain_death(path, child.returncode, child.stderr))


def _explain_death(path: Path, status: int, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    told = next((line for line in lines if "what():" in line), lines[-1] if lines else "it said nothing")
    if status >= 0:
        return f"The trial run of {path} failed ({told:.200}): check the installation of llama-cpp-python."
    died = f"llama.cpp died with {_signal_name(-status)} in a trial run of {path}"
    if status == -signal.SIGILL:
        return (
            f"{died}: it was built for another CPU; reinstall llama-cpp-python "
            "with --no-binary llama-cpp-python --no-cache-dir."
        )
    if status == -signal.SIGKILL:
        return f"{died}: most likely the machine has too little free memory for this file."
    return f"{died} ({told:.200}): the file is damaged or its vocabulary is wrong; download or export it again."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _identity(path: Path) -> _Identity | None:
    """None when there is no such file: then the child says what is wrong."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _Identity(
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        llama_cpp_python=importlib.metadata.version("llama_cpp_python"),
    )


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path("~/.cache").expanduser()) / "medcot" / "proven.json"


def _read_cache() -> _ProvenFiles:
    try:
        return _ProvenFiles.model_validate_json(_cache_file().read_bytes())
    except (OSError, RuntimeError, ValidationError):  # RuntimeError: no home folder
        return _ProvenFiles()


def _remember(path: Path, proven: _Proven) -> None:
    known = _ProvenFiles(files={**_read_cache().files, str(path.resolve()): proven})
    # Without a writable cache the file is proven again next time.
    with suppress(OSError, RuntimeError):
        write_text(_cache_file(), known.model_dump_json(indent=2) + "\n")


def _try_model(path: Path) -> Proof:
    import numpy as np

    from export.gguf_model import GgufModel

    with GgufModel(path, n_ctx=512, n_batch=64) as model:
        ids = model.chat_format.question_ids(PROBE)
        model.text(ids)
        if not np.isfinite(next(model.logits(ids[-1:]))).all():
            raise MedcotError(f"{path} computes numbers that are not finite: its weights are damaged; export it again.")
        length = model.metadata.get(f"{model.metadata.get('general.architecture')}.context_length")
        return Proof(context_length=int(length) if length and length.isdecimal() else None)


def main() -> None:
    """The child: one JSON line on standard output, exit status 0 or 1."""
    try:
        outcome = _Outcome(proof=_try_model(Path(sys.argv[1])))
    except MedcotError as error:
        outcome = _Outcome(error=str(error))
    print(json.dumps(outcome.model_dump()), flush=True)
    sys.exit(outcome.proof is None)


if __name__ == "__main__":
    main()
