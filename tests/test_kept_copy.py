"""A run's copy in another folder: complete when it is read, never ahead of what is finished."""

import json
import shutil
import time
from pathlib import Path

import pytest
from bench_models import FakeEngine

from bench import engines
from bench.evaluation_processes import evaluate_one
from bench.evaluation_task import EvaluationTask
from bench.held_out import HeldOutRecord
from bench.record_outcome import EvaluationSettings, record_keys
from pipeline import kept_copy as kept
from pipeline.artifacts import (
    FileRecord,
    Manifest,
    artifact_files,
    changed_files,
    left_behind,
    read_in_progress,
    read_manifest,
    sha256_file,
    write_manifest,
)
from pipeline.checkpoints import TrainingProgress, latest_whole, seal
from pipeline.errors import MedcotError
from pipeline.kept_copy import bring_back, copy_finished, kept_copy
from pipeline.prompts import Example


def artifact(folder: Path, files: dict[str, str], result: dict[str, object] | None = None) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    records = [FileRecord(path=name, size=len(text), sha256=sha256_file(folder / name)) for name, text in files.items()]
    manifest = Manifest(
        stage="x", fingerprint="f", config={}, inputs={}, versions={}, created="now", seconds=1.0,
        peak_memory_bytes=1, files=records, result=result or {},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


def exported(run_dir: Path) -> Path:
    models = {"r-F16.gguf": "large", "r-Q4_K_M.gguf": "small", "r-base-Q4_K_M.gguf": "base"}
    result = {"ship": "r-Q4_K_M.gguf", "base": "r-base-Q4_K_M.gguf", "files": [{"name": name} for name in models]}
    return artifact(run_dir / "gguf", {**models, "r.imatrix.gguf": "squares", "Modelfile": "F"}, result)


def evaluation(run_dir: Path, lines: str, fingerprint: str = "e") -> Path:
    """One at work: no manifest, records of two models."""
    folder = run_dir / "eval"
    folder.mkdir(exist_ok=True)
    (folder / "in_progress.json").write_text(json.dumps({"fingerprint": fingerprint}))
    (folder / "records-r-Q4_K_M.gguf.jsonl").write_text(lines)
    return folder


def checkpoint(folder: Path, step: int, text: str = "weights") -> Path:
    made = folder / "checkpoints" / f"checkpoint-{step}"
    (made / "deep").mkdir(parents=True)
    (made / "deep" / "adapter.safetensors").write_text(f"{text} {step}")
    seal(made, TrainingProgress(step, 1.0, 1))
    (folder / "in_progress.json").write_text(json.dumps({"fingerprint": "f"}))
    return made


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = tmp_path / "here" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("name: run\n")
    (run_dir / ".lock").touch()
    return run_dir


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "drive" / "run"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_finished_artifacts_are_copied_and_of_the_ggufs_the_one_to_ship_and_the_base(run_dir: Path, copy: Path) -> None:
    artifact(run_dir / "data", {"train.jsonl": "{}"})
    exported(run_dir)
    (run_dir / "verify").mkdir()
    (run_dir / "verify" / "half").write_text("under way")
    sentences = copy_finished(run_dir, copy)
    assert names(copy) == {
        "config.yaml", "data/train.jsonl", "data/manifest.json",
        "gguf/r-Q4_K_M.gguf", "gguf/r-base-Q4_K_M.gguf", "gguf/r.imatrix.gguf", "gguf/Modelfile", "gguf/manifest.json",
    }  # fmt: skip
    assert sentences == [f"{copy / 'gguf/r-Q4_K_M.gguf'} is whole"]
    assert read_manifest(copy / "data") == read_manifest(run_dir / "data")


def test_what_has_not_changed_is_not_copied_again(run_dir: Path, copy: Path) -> None:
    artifact(run_dir / "data", {"train.jsonl": "{}"})
    copy_finished(run_dir, copy)
    before = (copy / "data/train.jsonl").stat().st_mtime_ns
    copy_finished(run_dir, copy)
    assert (copy / "data/train.jsonl").stat().st_mtime_ns == before
    artifact(run_dir / "data", {"train.jsonl": "{...}"})
    copy_finished(run_dir, copy)
    assert (copy / "data/train.jsonl").read_text() == "{...}"


def test_whole_checkpoints_are_copied_torn_ones_are_not(run_dir: Path, copy: Path) -> None:
    adapter = run_dir / "adapter"
    checkpoint(adapter, 10)
    (adapter / "metrics.jsonl").write_text("{}\n")
    (adapter / "scratch").mkdir()
    (adapter / "scratch" / "rows.arrow").write_text("again in seconds")
    torn = adapter / "checkpoints" / "checkpoint-20"
    torn.mkdir()
    (torn / "adapter.safetensors").write_text("half")
    copy_finished(run_dir, copy)
    assert names(copy / "adapter") == {
        "in_progress.json", "metrics.jsonl",
        "checkpoints/checkpoint-10/deep/adapter.safetensors", "checkpoints/checkpoint-10/medcot_seal.json",
    }  # fmt: skip
    found = latest_whole(copy / "adapter" / "checkpoints")
    assert found is not None and found[1].step == 10


def test_replaced_checkpoints_go_and_those_of_another_training_are_not_taken_for_ours(
    run_dir: Path, copy: Path
) -> None:
    first = checkpoint(run_dir / "adapter", 10)
    copy_finished(run_dir, copy)
    shutil.rmtree(first)
    checkpoint(run_dir / "adapter", 10, "other weights")
    checkpoint(run_dir / "adapter", 20)
    copy_finished(run_dir, copy)
    kept = copy / "adapter" / "checkpoints"
    assert (kept / "checkpoint-10/deep/adapter.safetensors").read_text() == "other weights 10"
    shutil.rmtree(run_dir / "adapter" / "checkpoints" / "checkpoint-10")
    copy_finished(run_dir, copy)
    assert [path.name for path in kept.iterdir()] == ["checkpoint-20"]


def test_a_finished_training_leaves_no_checkpoints_in_the_copy(run_dir: Path, copy: Path) -> None:
    checkpoint(run_dir / "adapter", 10)
    copy_finished(run_dir, copy)
    shutil.rmtree(run_dir / "adapter")
    artifact(run_dir / "adapter", {"adapter_model.safetensors": "trained"})
    copy_finished(run_dir, copy)
    assert names(copy / "adapter") == {"adapter_model.safetensors", "manifest.json"}


def test_a_new_machine_goes_on_from_the_copy(run_dir: Path, copy: Path, tmp_path: Path) -> None:
    artifact(run_dir / "data", {"train.jsonl": "{}"})
    checkpoint(run_dir / "adapter", 10)
    said: list[str] = []
    with kept_copy(run_dir, copy.parent, said.append):
        pass
    assert said == []  # an existing run is not replaced by its copy
    shutil.rmtree(run_dir)
    run_dir.mkdir()
    with kept_copy(run_dir, copy.parent, said.append):
        assert names(run_dir) == names(copy)
        found = latest_whole(run_dir / "adapter" / "checkpoints")
        assert found is not None and found[1].step == 10
    assert said == [f"keep: resumed from {copy}"]


def test_the_copy_is_made_on_the_way_and_at_the_end_however_it_ends(run_dir: Path, copy: Path) -> None:
    with pytest.raises(MedcotError, match="killed"), kept_copy(run_dir, copy.parent, print, seconds_between=0.01):
        artifact(run_dir / "data", {"train.jsonl": "{}"})
        for _ in range(500):
            if read_manifest(copy / "data"):
                break
            time.sleep(0.01)
        assert read_manifest(copy / "data") is not None
        artifact(run_dir / "eval", {"samples.jsonl": "{}"})
        raise MedcotError("killed")
    assert read_manifest(copy / "eval") is not None


def test_a_copy_that_cannot_be_written_does_not_stop_the_run(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "full").write_text("not a folder")
    said: list[str] = []
    with kept_copy(run_dir, tmp_path / "full", said.append):
        artifact(run_dir / "data", {"train.jsonl": "{}"})
    assert len(said) == 1 and said[0].startswith("keep: ") and "cannot be copied" in said[0]


def test_the_records_of_an_evaluation_at_work_are_copied_within_seconds(run_dir: Path, copy: Path) -> None:
    with kept_copy(run_dir, copy.parent, print, seconds_between=600):
        evaluation(run_dir, '{"key": 1}\n{"key": 2}\n{"ke')
        target = copy / "eval/records-r-Q4_K_M.gguf.jsonl"
        for _ in range(500):
            if target.is_file():
                break
            time.sleep(0.01)
        assert target.read_text() == '{"key": 1}\n{"key": 2}\n{"ke'  # whoever reads records drops a torn one
        shutil.rmtree(run_dir / "eval")  # the machine goes
        run_dir.joinpath("config.yaml").unlink()


def test_of_an_evaluation_at_work_only_what_has_grown_is_copied_again(run_dir: Path, copy: Path) -> None:
    evaluation(run_dir, '{"key": 1}\n')
    (run_dir / "eval/records-r-base-Q4_K_M.gguf.jsonl").write_text('{"key": 2}\n')
    copy_finished(run_dir, copy)
    before = {path.name: path.stat().st_mtime_ns for path in (copy / "eval").iterdir()}
    evaluation(run_dir, '{"key": 1}\n{"key": 3}\n')
    copy_finished(run_dir, copy)
    changed = [path.name for path in (copy / "eval").iterdir() if path.stat().st_mtime_ns != before[path.name]]
    assert changed == ["records-r-Q4_K_M.gguf.jsonl"]


def test_a_new_machine_resumes_an_evaluation_and_misses_only_what_stayed_behind(run_dir: Path, copy: Path) -> None:
    exported(run_dir)
    evaluation(run_dir, "{}\n")
    copy_finished(run_dir, copy)
    shutil.rmtree(run_dir)
    bring_back(copy, run_dir, print)
    assert (run_dir / "eval/records-r-Q4_K_M.gguf.jsonl").read_text() == "{}\n"
    assert (run_dir / "eval/in_progress.json").is_file()
    assert left_behind(run_dir / "gguf") == {"r-F16.gguf"}
    manifest = read_manifest(run_dir / "gguf")
    assert manifest is not None and changed_files(run_dir / "gguf", manifest) == ["r-F16.gguf"]
    assert "left_behind.json" not in {path.name for path in artifact_files(run_dir / "gguf")}


def test_on_a_new_machine_no_record_is_answered_twice(
    run_dir: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/e2e/test_two_sessions.py does the same with a whole run, real models and kill -9."""
    gguf, settings = exported(run_dir) / "r-Q4_K_M.gguf", EvaluationSettings(max_new_tokens=60)
    records = [HeldOutRecord(Example(f"Question {n}?", "So.", "Yes.")) for n in range(5)]
    fake = FakeEngine()
    monkeypatch.setattr(engines, "open_engine", lambda *_: fake)
    evaluation(run_dir, "")
    task = EvaluationTask(gguf, records, record_keys(gguf, records, settings), run_dir / "eval", settings)
    evaluate_one(task, range(3))
    with (run_dir / "eval/records-r-Q4_K_M.gguf.jsonl").open("a") as stream:
        stream.write('{"key": "cut o')
    copy_finished(run_dir, copy)
    shutil.rmtree(run_dir)
    fake.asked.clear()
    bring_back(copy, run_dir, print)
    evaluate_one(task, range(5))
    assert [n for n in range(5) if any(f"Question {n}?" in asked for asked in fake.asked)] == [3, 4]


@pytest.mark.parametrize("harm", ["cut short", "missing", "other bytes"])
def test_a_half_copied_artifact_is_never_taken_up(harm: str, run_dir: Path, copy: Path) -> None:
    """As a drive leaves it that had uploaded the manifest, and not yet the GGUF."""
    exported(run_dir)
    copy_finished(run_dir, copy)
    gguf = copy / "gguf/r-base-Q4_K_M.gguf"
    gguf.unlink()
    if harm != "missing":
        gguf.write_text("bas" if harm == "cut short" else "BASE")
    shutil.rmtree(run_dir)
    said: list[str] = []
    bring_back(copy, run_dir, said.append)
    assert said[1:] == [f"keep: {gguf} was not copied whole: x is made again"]
    assert not (run_dir / "gguf").exists() and (run_dir / "config.yaml").is_file()
    exported(run_dir)
    copy_finished(run_dir, copy)
    assert gguf.read_text() == "base"


def test_an_evaluation_never_replaces_one_that_knows_more(run_dir: Path, copy: Path) -> None:
    folder = evaluation(run_dir, '{"key": "a"}\n{"key": "b"}\n')
    (folder / "likelihoods-r-Q4_K_M.gguf.jsonl").write_text('{"key": "c"}\n')
    copy_finished(run_dir, copy)
    assert (copy / "eval/likelihoods-r-Q4_K_M.gguf.jsonl").is_file()
    evaluation(run_dir, '{"key": "a"}\n')  # begun without its copy
    [sentence] = copy_finished(run_dir, copy)
    assert sentence.startswith(f"{copy / 'eval'} has more records and stays until this run's eval is as far")
    (folder / "likelihoods-r-Q4_K_M.gguf.jsonl").unlink()  # its records are all done
    evaluation(run_dir, '{"key": "a"}\n{"key": "b"}\n{"key": "c"}\n')
    assert copy_finished(run_dir, copy) == []
    assert (copy / "eval/records-r-Q4_K_M.gguf.jsonl").read_text().count("key") == 3
    manifest = read_manifest(artifact(copy / "eval", {"evaluation.json": "{}"}, {"ended_early": {"minutes": 1.0}}))
    assert manifest is not None
    write_manifest(copy / "eval", manifest.model_copy(update={"fingerprint": "e"}))  # its time was up
    evaluation(run_dir, '{"key": "a"}\n{"key": "b"}\n{"key": "c"}\n')
    assert copy_finished(run_dir, copy) == [] and read_manifest(copy / "eval") is None
    evaluation(run_dir, '{"key": "d"}\n', fingerprint="of another model")
    assert copy_finished(run_dir, copy) == []
    assert (copy / "eval/records-r-Q4_K_M.gguf.jsonl").read_text() == '{"key": "d"}\n'


def test_a_gguf_is_copied_once(run_dir: Path, copy: Path) -> None:
    exported(run_dir)
    copy_finished(run_dir, copy)
    gguf = copy / "gguf/r-Q4_K_M.gguf"
    before = gguf.stat().st_mtime_ns
    manifest = read_manifest(run_dir / "gguf")
    assert manifest is not None
    write_manifest(run_dir / "gguf", manifest.model_copy(update={"created": "later"}))  # made again, the same bytes
    copy_finished(run_dir, copy)
    assert read_manifest(copy / "gguf") == read_manifest(run_dir / "gguf")
    assert gguf.stat().st_mtime_ns == before


def test_files_under_former_names_leave_the_copy(run_dir: Path, copy: Path) -> None:
    exported(run_dir)
    copy_finished(run_dir, copy)
    (copy / "gguf/notes.txt").write_text("someone's")
    shutil.rmtree(run_dir / "gguf")
    artifact(run_dir / "gguf", {"r-Q8_0.gguf": "eight"}, {"ship": "r-Q8_0.gguf", "files": [{"name": "r-Q8_0.gguf"}]})
    copy_finished(run_dir, copy)
    assert names(copy / "gguf") == {"r-Q8_0.gguf", "manifest.json", "notes.txt"}


@pytest.mark.parametrize("farther", ["a later checkpoint", "finished", "finished with other settings"])
def test_a_training_never_replaces_one_that_is_farther(farther: str, run_dir: Path, copy: Path) -> None:
    there = copy / "adapter"
    if farther == "a later checkpoint":
        checkpoint(there, 50)
    else:
        artifact(there, {"adapter_model.safetensors": "trained"})
        manifest = read_manifest(there)
        assert manifest is not None
        write_manifest(there, manifest.model_copy(update={"stage": "train"}))
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    checkpoint(run_dir / "adapter", 10)
    if "other" in farther:
        (run_dir / "adapter/in_progress.json").write_text('{"fingerprint": "other"}')
    [sentence] = copy_finished(run_dir, copy)
    is_at = "is at step 50" if farther == "a later checkpoint" else "is finished"
    assert sentence.startswith(f"{there} {is_at} and stays until this run's adapter is as far")
    assert {path: path.read_bytes() for path in there.rglob("*") if path.is_file()} == before
    shutil.rmtree(run_dir / "adapter")
    artifact(run_dir / "adapter", {"adapter_model.safetensors": "mine"})
    assert copy_finished(run_dir, copy) == []
    assert (there / "adapter_model.safetensors").read_text() == "mine"


def test_a_run_that_began_without_its_copy_takes_up_what_is_farther_there(run_dir: Path, copy: Path) -> None:
    """Drive was mounted after the first stages, or after a few steps of a training that had come further before."""
    artifact(run_dir / "data", {"train.jsonl": "{}"})
    checkpoint(run_dir / "adapter", 50)
    evaluation(run_dir, "{}\n")
    copy_finished(run_dir, copy)
    for name in ("adapter", "eval"):
        shutil.rmtree(run_dir / name)
    checkpoint(run_dir / "adapter", 10)
    said: list[str] = []
    with kept_copy(run_dir, copy.parent, said.append):
        found = latest_whole(run_dir / "adapter" / "checkpoints")
        assert found is not None and found[1].step == 50
        assert (run_dir / "eval/records-r-Q4_K_M.gguf.jsonl").is_file()
    assert said == [f"keep: {name} is farther in {copy}: taken from there" for name in ("adapter", "eval")]


def test_an_artifact_of_other_inputs_is_not_taken_into_a_run(run_dir: Path, copy: Path) -> None:
    artifact(run_dir / "data", {"train.jsonl": "{}"})
    exported(run_dir)
    manifest = read_manifest(run_dir / "gguf")
    assert manifest is not None
    write_manifest(run_dir / "gguf", manifest.model_copy(update={"stage": "export", "inputs": {"x": "another digest"}}))
    copy_finished(run_dir, copy)
    shutil.rmtree(run_dir / "gguf")
    bring_back(copy, run_dir, print)
    assert not (run_dir / "gguf").exists()


def test_a_copy_that_cannot_be_read_is_told(copy: Path, tmp_path: Path) -> None:
    artifact(copy / "data", {"train.jsonl": "{}"})
    (copy / "config.yaml").write_text("name: run\n")
    (copy / "data" / "train.jsonl").unlink()
    (copy / "data" / "train.jsonl").mkdir()  # in the place of a drive that answers with errors
    with pytest.raises(MedcotError, match=r"cannot be read \(Is a directory\): mount it again"):
        bring_back(copy, tmp_path / "new", print)
    assert not (tmp_path / "new" / "config.yaml").exists()


def cut_off_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The machine goes when the first file of that name is copied."""
    real = kept.copy_file

    def copy_file(source: Path, target: Path) -> None:
        if source.name == name:
            raise MedcotError("the machine is gone")
        real(source, target)

    monkeypatch.setattr(kept, "copy_file", copy_file)


def test_a_copy_that_is_cut_off_is_not_resumed_from_the_checkpoints_of_another_training(
    run_dir: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(run_dir / "adapter", 50)
    copy_finished(run_dir, copy)
    shutil.rmtree(run_dir / "adapter")
    checkpoint(run_dir / "adapter", 60, "other weights")
    (run_dir / "adapter/in_progress.json").write_text('{"fingerprint": "other"}')
    cut_off_at(monkeypatch, "adapter.safetensors")
    with pytest.raises(MedcotError, match="gone"):
        copy_finished(run_dir, copy)
    assert read_in_progress(copy / "adapter") == {"fingerprint": "other"}
    assert latest_whole(copy / "adapter/checkpoints") is None


@pytest.mark.parametrize("cut_off", ["adapter_model.safetensors", "manifest.json"])
def test_a_training_that_ends_while_it_is_copied_is_resumed_from_its_last_checkpoint(
    cut_off: str, run_dir: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time had run out in an earlier session, whose artifact the copy had."""
    checkpoint(run_dir / "adapter", 50)
    artifact(run_dir / "adapter", {"adapter_model.safetensors": "half trained"}, {"finished": False})
    copy_finished(run_dir, copy)
    assert not (copy / "adapter/in_progress.json").exists()
    shutil.rmtree(run_dir / "adapter")
    artifact(run_dir / "adapter", {"adapter_model.safetensors": "trained"})
    cut_off_at(monkeypatch, cut_off)
    with pytest.raises(MedcotError, match="gone"):
        copy_finished(run_dir, copy)
    bring_back(copy, tmp_path / "new", print)
    assert read_in_progress(tmp_path / "new/adapter")["fingerprint"] == "f"
    found = latest_whole(tmp_path / "new/adapter/checkpoints")
    assert found is not None and found[1].step == 50


def test_an_artifact_that_was_not_copied_whole_is_resumed_from_its_records(run_dir: Path, copy: Path) -> None:
    artifact(run_dir / "eval", {"records-r.gguf.jsonl": '{"key": "a"}\n', "evaluation.json": "{}"})
    copy_finished(run_dir, copy)
    (copy / "eval/evaluation.json").unlink()
    shutil.rmtree(run_dir)
    said: list[str] = []
    bring_back(copy, run_dir, said.append)
    assert said[1:] == [
        f"keep: {copy / 'eval/evaluation.json'} was not copied whole: x is resumed from what was kept on the way"
    ]
    assert names(run_dir / "eval") == {"records-r.gguf.jsonl", "in_progress.json"}
    assert read_in_progress(run_dir / "eval")["fingerprint"] == "f"
