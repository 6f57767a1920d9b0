"""A GGUF is tried in a child process: what kills libllama ends in a sentence, what works is remembered."""

import os
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
    announced: list[str] = []
    assert proof.prove(path, lambda: announced.append("trial")).context_length == 8192
    assert announced == ["trial"]
    forbid_children(monkeypatch)
    assert proof.prove(path, lambda: announced.append("trial")).context_length == 8192
    assert announced == ["trial"] and len(list(cache_folder.rglob("*.json"))) == 1


def known(path: Path) -> bool:
    """Whether ``path`` would pass without a trial."""
    trials: list[Path] = []

    def trial(tried: Path) -> proof.Proof:
        trials.append(tried)
        raise MedcotError("a trial")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "_prove_in_child", trial)
        try:
            proof.prove(path)
        except MedcotError:
            assert trials == [path]
    return not trials


def test_a_vocabulary_that_aborts_libllama_ends_in_one_sentence(tmp_path: Path) -> None:
    gguf = small_model().read_bytes()
    # A BPE vocabulary declared as SentencePiece has no byte tokens; the name gives the letter back, so that
    # the tensors keep their alignment.
    gguf = with_string(gguf, b"tokenizer.ggml.model", {b"gpt2": b"llama"})
    path = tmp_path / "aborts.gguf"
    path.write_bytes(with_string(gguf, b"general.name", slice(1, None)))
    with pytest.raises(MedcotError, match=r"died with SIGABRT .*aborts\.gguf .* vocabulary is wrong"):
        proof.prove(path)
    assert not known(path)


def test_a_truncated_file_ends_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(small_model().read_bytes()[:4_000_000])
    with pytest.raises(MedcotError, match=r"cut\.gguf cannot be loaded .*truncated"):
        proof.prove(path)


def test_a_file_without_a_chat_template_ends_in_one_sentence(tmp_path: Path) -> None:
    gguf = small_model().read_bytes()
    path = tmp_path / "bare.gguf"
    path.write_bytes(gguf.replace(b"tokenizer.chat_template", b"tokenizer.chat_tempXate"))
    with pytest.raises(MedcotError, match=r"bare\.gguf holds no chat template"):
        proof.prove(path)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64])
def test_what_is_no_gguf_ends_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(MedcotError, match=r"x\.gguf (is not a GGUF|cannot be loaded)") as told:
        proof.prove(path)
    assert "\n" not in str(told.value)


def test_a_folder_ends_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match="is a folder: name the GGUF file inside it"):
        proof.prove(tmp_path)


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
    assert known(path)
    copied = tmp_path / "renamed.gguf"
    copied.write_bytes(b"one")
    assert known(copied)
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not known(path)


@pytest.mark.parametrize("size", [0, 1, proof._HEAD - 1, proof._HEAD, proof._HEAD + proof._TAIL, 23_000_001])
def test_the_hash_sees_size_head_tail_and_samples(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.gguf"
    with path.open("wb") as stream:
        stream.truncate(size)  # a sparse file
    sampled = [proof._HEAD] if size > proof._HEAD + proof._TAIL else []
    changed = [place for place in sorted({0, size - 1, *sampled}) if 0 <= place < size]
    hashes = {proof.content_hash(path)}
    with path.open("r+b") as stream:
        for place in changed:
            stream.seek(place)
            stream.write(b"x")
            stream.flush()
            hashes.add(proof.content_hash(path))
        stream.truncate(size + 1)
    hashes.add(proof.content_hash(path))
    assert len(hashes) == len(changed) + 2


def test_no_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    remembered(path, monkeypatch)
    assert not known(path)


def test_a_damaged_cache_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    (cache_folder / "medcot").mkdir(parents=True)
    (cache_folder / "medcot" / "proven.json").write_text("{")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    remembered(path, monkeypatch)
    assert known(path)
