"""Prove, in a process of its own, that a GGUF loads, tokenizes and decodes a token.

    python -m chat.proof FILE.gguf            on the CPU
    python -m chat.proof FILE.gguf --gpu      with all layers on the GPU

libllama ends the whole process on some files (a vocabulary of a wrong type aborts the first ``tokenize``),
and a build for another CPU dies on its first instruction. A child that dies becomes one sentence here.

A proven file is remembered by a hash of its content, with the llama-cpp-python version: a copied or renamed file needs
no new proof, a file written over does, whatever its time of change says. The hash covers the size, the first 8 MiB
(metadata, the vocabulary and the table of tensors, which are what libllama dies of), the last MiB (that all is there)
and 16 KiB at each of 64 places between. A hash of all would take as long as proving: 5 GB are seconds even from memory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.artifacts import write_text
from pipeline.errors import MedcotError
from pipeline.processes import with_our_packages

# Letters, accents, another script, an emoji, digits and white space: every branch of a tokenizer.
PROBE = "Fièvre 39,5 °C?\n\tκαρδία 心臓 🫀"

_HEAD, _TAIL, _SAMPLE, _SAMPLES = 8 << 20, 1 << 20, 16 << 10, 64  # bytes, bytes, bytes, places


class Proof(BaseModel):
    """What the child found out; ``context_length`` is what the model was trained for (tokens)."""

    model_config = ConfigDict(frozen=True)
    context_length: int | None


class _Outcome(BaseModel):
    """The child's one line of standard output: a proof, or the sentence for the user."""

    proof: Proof | None = None
    error: str | None = None


class _ProvenFiles(BaseModel):
    """The cache: what was proven of a content, under which llama-cpp-python (``_key``)."""

    contents: dict[str, Proof] = {}


def prove(path: Path, announce: Callable[[], None] = lambda: None) -> Proof:
    """Return the proof for ``path``, remembered or fresh; raises MedcotError when the file does not pass.

    ``announce`` is called before a trial, which takes as long as loading the model.
    """
    key = _key(path)
    remembered = _read_cache().contents.get(key)
    if remembered is not None:
        return remembered
    announce()
    proof = _prove_in_child(path)
    if key:
        _remember(key, proof)
    return proof


def known_proof(path: Path) -> Proof | None:
    """The remembered proof, if there is one of this content."""
    return _read_cache().contents.get(_key(path))


def _prove_in_child(path: Path) -> Proof:
    child = subprocess.run(
        [sys.executable, "-m", "chat.proof", str(path)],
        env=with_our_packages(),
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


def _key(path: Path) -> str:
    """What a proof holds for; empty when the file cannot be read: then the child says what is wrong."""
    try:
        return f"{content_hash(path)} llama-cpp-python {importlib.metadata.version('llama_cpp_python')}"
    except OSError:
        return ""


def content_hash(path: Path) -> str:
    """SHA-256 of a file's size, beginning, end, and samples between; all of a file up to 9 MiB. Raises OSError."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    between = range(_HEAD, max(_HEAD, size - _TAIL), max(1, (size - _TAIL - _HEAD) // _SAMPLES))
    with path.open("rb") as stream:
        digest.update(stream.read(_HEAD))
        for place in between[:_SAMPLES]:
            stream.seek(place)
            digest.update(stream.read(_SAMPLE))
        stream.seek(max(_HEAD, size - _TAIL))
        digest.update(stream.read())
    return digest.hexdigest()


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path("~/.cache").expanduser()) / "medcot" / "proven.json"


def _read_cache() -> _ProvenFiles:
    try:
        return _ProvenFiles.model_validate_json(_cache_file().read_bytes())
    except (OSError, RuntimeError, ValidationError):  # RuntimeError: no home folder
        return _ProvenFiles()


def _remember(key: str, proof: Proof) -> None:
    known = _ProvenFiles(contents={**_read_cache().contents, key: proof})
    # Without a writable cache the file is proven again next time.
    with suppress(OSError, RuntimeError):
        write_text(_cache_file(), known.model_dump_json(indent=2) + "\n")


def _try_model(path: Path, on_gpu: bool = False) -> Proof:
    import numpy as np

    from export.gguf_model import GgufModel, supports_gpu

    if on_gpu and not supports_gpu():
        raise MedcotError("this llama-cpp-python finds no GPU: it was built without CUDA, or the driver is too old.")
    with GgufModel(path, n_ctx=512, n_batch=64, n_gpu_layers=-1 if on_gpu else 0) as model:
        ids = model.chat_format.question_ids(PROBE)
        model.text(ids)
        if not np.isfinite(next(model.logits(ids[-1:]))).all():
            raise MedcotError(f"{path} computes numbers that are not finite: its weights are damaged; export it again.")
        length = model.metadata.get(f"{model.metadata.get('general.architecture')}.context_length")
        return Proof(context_length=int(length) if length and length.isdecimal() else None)


def main() -> None:
    """The child: one JSON line on standard output, exit status 0 or 1."""
    try:
        outcome = _Outcome(proof=_try_model(Path(sys.argv[1]), on_gpu=sys.argv[2:] == ["--gpu"]))
    except MedcotError as error:
        outcome = _Outcome(error=str(error))
    print(json.dumps(outcome.model_dump()), flush=True)
    sys.exit(outcome.proof is None)


if __name__ == "__main__":
    main()
