from pathlib import Path

import pytest

from pipeline.artifacts import (
    Artifact,
    FileRecord,
    Manifest,
    artifact_files,
    atomic_path,
    changed_files,
    fingerprint,
    read_manifest,
    sha256_file,
    write_manifest,
    write_text,
)
from pipeline.errors import MedcotError
from pipeline.results import Report


def manifest_of(folder: Path, result: dict[str, object]) -> Manifest:
    files = [
        FileRecord(path=str(p.relative_to(folder)), size=p.stat().st_size, sha256=sha256_file(p))
        for p in artifact_files(folder)
    ]
    return Manifest(
        stage="report",
        fingerprint="f",
        config={},
        inputs={},
        versions={},
        created="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        peak_memory_bytes=1,
        files=files,
        result=result,
    )


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_manifest_round_trip_and_typed_load(tmp_path: Path) -> None:
    write_text(tmp_path / "report.md", "x")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state").write_text("working state")
    manifest = manifest_of(tmp_path, {"files": ["report.md"]})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [record.path for record in manifest.files] == ["report.md"]
    assert Artifact.load(tmp_path, Report).result.files == ["report.md"]


def test_unfinished_and_foreign_artifacts_are_told(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match="no finished artifact"):
        Artifact.load(tmp_path, Report)
    write_manifest(tmp_path, manifest_of(tmp_path, {"other": 1}))
    with pytest.raises(MedcotError, match="another version of medcot"):
        Artifact.load(tmp_path, Report)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}'])
def test_a_torn_manifest_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert read_manifest(tmp_path) is None


def test_missing_and_resized_files_are_noticed(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "1")
    write_text(tmp_path / "b", "22")
    manifest = manifest_of(tmp_path, {"files": []})
    assert changed_files(tmp_path, manifest) == []
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("2")
    assert changed_files(tmp_path, manifest) == ["a", "b"]


def test_fingerprint_depends_on_every_part() -> None:
    base = fingerprint("train", {"a": 1}, {"x": "1"}, {"torch": "2"})
    assert base == fingerprint("train", {"a": 1}, {"x": "1"}, {"torch": "2"})
    others = [
        fingerprint("export", {"a": 1}, {"x": "1"}, {"torch": "2"}),
        fingerprint("train", {"a": 2}, {"x": "1"}, {"torch": "2"}),
        fingerprint("train", {"a": 1}, {"x": "2"}, {"torch": "2"}),
        fingerprint("train", {"a": 1}, {"x": "1"}, {"torch": "3"}),
    ]
    assert len({base, *others}) == 5
