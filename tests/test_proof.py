"""A GGUF is tried in a child process: what kills libllama ends in a sentence, what works is remembered."""

import json
import struct
import subprocess
from pathlib import Path

import pytest
from chat_models import small_model

from chat import proof
from pipeline.errors import MedcotError


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def forbid_children(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("a child process was started")

    monkeypatch.setattr(subprocess, "run", run)


def with_string(gguf: bytes, key: bytes, change: dict[bytes, bytes] | slice) -> bytes:
    """Replace the string value behind ``key`` (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""
    length_at = gguf.index(key) + len(key) + 4
    (length,) = struct.unpack_from("<Q", gguf, length_at)
    start = length_at + 8
    old = gguf[start : start + length]
    new = old[change] if isinstance(change, slice) else change[old]
    return gguf[:length_at] + struct.pack("<Q", len(new)) + new + gguf[start + length :]


def test_a_good_file_is_tried_once(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    path = small_model()
    assert proof.known_proof(path) is None
    assert proof.prove(path).context_length == 8192
    assert list(json.loads((cache_folder / "medcot" / "proven.json").read_text())["files"]) == [str(path.resolve())]
    forbid_children(monkeypatch)
    assert proof.prove(path).context_length == 8192


def test_a_vocabulary_that_aborts_libllama_ends_in_one_sentence(tmp_path: Path) -> None:
    gguf = small_model().read_bytes()
    # A BPE vocabulary declared as SentencePiece has no byte tokens; the name gives the letter back, so that
    # the tensors keep their alignment.
    gguf = with_string(gguf, b"tokenizer.ggml.model", {b"gpt2": b"llama"})
    path = tmp_path / "aborts.gguf"
    path.write_bytes(with_string(gguf, b"general.name", slice(1, None)))
    with pytest.raises(MedcotError, match=r"died with SIGABRT .*aborts\.gguf .* vocabulary is wrong"):
        proof.prove(path)
    assert proof.known_proof(path) is None


def test_a_truncated_file_ends_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(small_model().read_bytes()[:4_000_000])
    with pytest.raises(MedcotError, match=r"cut\.gguf cannot be loaded .*truncated"):
        proof.prove(path)


def test_a_missing_file_ends_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match=r"none\.gguf does not exist"):
        proof.prove(tmp_path / "none.gguf")


def remembered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_prove_in_child", lambda _: proof.Proof(context_length=7))
    proof.prove(path)


def test_a_changed_file_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    remembered(path, monkeypatch)
    assert proof.known_proof(path) == proof.Proof(context_length=7)
    path.write_bytes(b"other")
    assert proof.known_proof(path) is None


def test_no_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    remembered(path, monkeypatch)
    assert proof.known_proof(path) is None


def test_a_damaged_cache_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    (cache_folder / "medcot").mkdir(parents=True)
    (cache_folder / "medcot" / "proven.json").write_text("{")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    remembered(path, monkeypatch)
    assert proof.known_proof(path) == proof.Proof(context_length=7)
