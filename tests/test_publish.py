"""A run on the hub: what is there afterwards, what is sent again, and what is left alone."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hub_server import HubServer, WriteFault
from huggingface_hub import constants, snapshot_download
from published_runs import F16, MODEL_BYTES, adapter_files, finished_run, writable_hub
from test_report import BASE, TUNED, measurements

from bench.private_paths import PrivatePaths
from bench.publish import RECORD_PATH, publish
from chat import space_app
from chat.space import write_space
from chat.space_app import read_settings
from pipeline.cli import cli
from pipeline.config import Config
from pipeline.errors import MedcotError

REPORTS = ["report.html", "report.json", "report.md", "report.schema.json"]
EXPECTED = sorted([
    ".gitattributes", "Modelfile", "README.md", RECORD_PATH, TUNED, "params", "system", "template",
    *(f"adapter/{name}" for name in adapter_files() if name != "metrics.jsonl"),
    *(f"report/{name}" for name in REPORTS),
])  # fmt: skip
WITHOUT_REPORT = [name for name in EXPECTED if not name.startswith("report/")]  # its charts take a second to draw


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "run")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with writable_hub(tmp_path, monkeypatch) as server:
        yield server


def names(hub: HubServer, repository: str = "ann/gout") -> list[str]:
    return sorted(hub.repositories[repository].files())


def text(hub: HubServer, path: str) -> str:
    return hub.repositories["ann/gout"].files()[path].read_text()


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_run_is_published_in_one_commit_and_reads_back(hub: HubServer, run_dir: Path, tmp_path: Path) -> None:
    before = content(run_dir)
    published = publish("ann/gout", run_dir)
    assert hub.repositories["ann/gout"].private
    assert [commit.files for commit in hub.commits] == [frozenset(EXPECTED)]
    assert published.commit == hub.repositories["ann/gout"].commit and published.existed is False
    assert published.left_alone == published.deleted == [] and published.bytes_to_send == published.total_bytes
    read = Path(snapshot_download("ann/gout", local_dir=tmp_path / "read"))
    assert (read / TUNED).read_bytes() == (run_dir / "gguf" / TUNED).read_bytes()
    for name in adapter_files().keys() - {"metrics.jsonl"}:
        assert (read / "adapter" / name).read_bytes() == (run_dir / "adapter" / name).read_bytes(), name
    for file in published.files:
        assert hashlib.sha256((read / file.path).read_bytes()).hexdigest() == file.sha256
        assert file.size_bytes == (read / file.path).stat().st_size and file.state == "sent"
    assert content(run_dir) == before
    uploads = [request for request in hub.requests if request.path.startswith("/storage-upload/")]
    assert len(uploads) > 4 and {request.host for request in uploads} == {"localhost"}
    assert {request.token for request in uploads} == {None}, "the token stays with the hub"


def test_the_card_says_how_to_use_the_repository(hub: HubServer, run_dir: Path) -> None:
    publish("ann/gout", run_dir, report=False)
    card = text(hub, "README.md")
    assert "gguf" in yaml.safe_load(card.split("---\n")[1])["tags"]
    assert f"\nhf download ann/gout {TUNED} --local-dir .\n" in card and f"\nmedcot chat {TUNED}\n" in card
    assert f"\nollama run hf.co/ann/gout:{TUNED}\n" in card
    assert "hf download ann/gout --include 'adapter/*' --local-dir .\nmedcot export --base " in card
    assert "and not published" in card
    publish("ann/gout", run_dir, report=False, all_ggufs=True, adapter=False)
    assert "and not published" not in text(hub, "README.md") and "medcot export" not in text(hub, "README.md")


def test_ollama_finds_what_the_modelfile_says(hub: HubServer, run_dir: Path) -> None:
    publish("ann/gout", run_dir, report=False)
    assert text(hub, "Modelfile") == (run_dir / "gguf/Modelfile").read_text()
    assert text(hub, "template").startswith("{{ if .System }}<|im_start|>system\n") and '"""' not in text(
        hub, "template"
    )
    assert text(hub, "system") == "Think first."
    assert json.loads(text(hub, "params")) == {"stop": ["<|im_end|>"], "num_ctx": 8192, "temperature": 0.6}


def test_a_second_call_sends_nothing(hub: HubServer, run_dir: Path) -> None:
    first = publish("ann/gout", run_dir, report=False)
    received = dict(hub.received)
    again = publish("ann/gout", run_dir, report=False)
    assert {file.state for file in again.files} == {"there already"} and again.bytes_to_send == 0
    assert again.commit == first.commit and again.existed and len(hub.commits) == 1 and hub.received == received


@pytest.mark.parametrize("evaluation", ["not run", "unfinished"])
def test_a_gguf_is_published_before_it_is_evaluated_and_its_figures_by_the_same_command(
    hub: HubServer, tmp_path: Path, evaluation: str
) -> None:
    """As from a notebook whose later cell evaluates, and may be at work or was interrupted."""
    verified = {name: each for name, each in measurements().items() if name not in ("evaluate", "bench", "report")}
    run_dir = finished_run(tmp_path / "run", results=verified)
    if evaluation == "unfinished":
        (run_dir / "eval").mkdir()
        (run_dir / "eval" / "in_progress.json").write_text('{"fingerprint": "x"}')
    told = publish("ann/gout", run_dir, report=False, dry_run=True)
    first = publish("ann/gout", run_dir, report=False)
    assert [note.split(",")[0] for note in told.notes] == [
        "This model is not evaluated yet"
    ] and first.notes == told.notes
    card = text(hub, "README.md")
    assert "Not evaluated yet: whether the tuned model beats its base is not known." in card
    assert "Speed is not measured yet." in card
    assert f"Use {TUNED} (" in card.replace("\\_", "_")

    evaluated = finished_run(tmp_path / "evaluated" / "run")
    for name in ("eval", "bench"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
        shutil.copytree(evaluated / name, run_dir / name)
    second = publish("ann/gout", run_dir, report=False)
    assert len(hub.commits) == 2 and second.notes == []
    assert {file.path for file in second.files if file.state == "sent"} == {"README.md", RECORD_PATH}
    assert "evaluated yet" not in text(hub, "README.md") and "tuned is better" in text(hub, "README.md")


def test_another_gguf_is_added_and_the_rest_not_sent_again(hub: HubServer, run_dir: Path) -> None:
    publish("ann/gout", run_dir, report=False)
    received = dict(hub.received)
    more = publish("ann/gout", run_dir, report=False, ggufs=[str(run_dir / "gguf" / F16)])
    assert {file.path for file in more.files if file.state == "sent"} == {F16, "README.md", RECORD_PATH}
    assert sum(hub.received.values()) - sum(received.values()) == MODEL_BYTES
    with pytest.raises(MedcotError, match=rf"--gguf Q8.gguf: the run has no such file; it has {F16}, {TUNED}, {BASE}"):
        publish("ann/gout", run_dir, report=False, ggufs=["Q8.gguf"])


def test_only_unchanged_files_of_an_earlier_call_are_deleted(hub: HubServer, run_dir: Path) -> None:
    publish("ann/gout", run_dir, all_ggufs=True)
    hub.change("ann/gout", "by hand", {"notes.md": b"mine", "report/report.md": b"my version"})
    told = publish("ann/gout", run_dir, report=False, dry_run=True)
    assert names(hub) == sorted([*EXPECTED, F16, BASE, "notes.md"])
    less = publish("ann/gout", run_dir, report=False)
    gone = [F16, BASE, "report/report.html", "report/report.json", "report/report.schema.json"]
    assert less.deleted == told.deleted == sorted(gone)
    assert less.left_alone == told.left_alone == ["notes.md", "report/report.md"]
    assert text(hub, "notes.md") == "mine" and text(hub, "report/report.md") == "my version"
    assert set(gone).isdisjoint(names(hub)) and TUNED in names(hub)
    assert len(hub.commits) == 3


def test_a_repository_of_others_files_keeps_them(hub: HubServer, run_dir: Path) -> None:
    hub.create("clinic/gout", private=True)
    hub.change("clinic/gout", "by hand", {"notes.md": b"mine", RECORD_PATH: b"no record"})
    published = publish("clinic/gout", run_dir, report=False)
    assert published.left_alone == ["notes.md"] and published.deleted == [] and published.existed
    assert set(names(hub, "clinic/gout")) == {*WITHOUT_REPORT, "notes.md"}


def test_a_dry_run_lists_and_writes_nothing(hub: HubServer, run_dir: Path, tmp_path: Path) -> None:
    before = content(tmp_path)
    told = publish("ann/gout", run_dir, dry_run=True)
    assert told.dry_run and told.existed is False and told.commit is None and told.notes == []
    assert sorted(file.path for file in told.files) == [name for name in EXPECTED if name != ".gitattributes"]
    assert {file.state for file in told.files} == {"to send"} and told.bytes_to_send == told.total_bytes
    assert sorted(file.path for file in told.files if file.holds_data) == [
        "report/report.html", "report/report.json", "report/report.md"
    ]  # fmt: skip
    assert not hub.repositories and content(tmp_path) == before
    assert {request.method for request in hub.requests} == {"GET"}
    publish("ann/gout", run_dir)
    assert publish("ann/gout", run_dir, dry_run=True).bytes_to_send == 0


def test_a_dry_run_without_hub_or_token_lists_all_the_same(
    hub: HubServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    told = publish("ann/gout", run_dir, report=False, dry_run=True)
    assert told.existed is None and len(told.files) == len(WITHOUT_REPORT) - 1 and told.bytes_to_send is None
    assert {file.state for file in told.files} == {"not known"} and "set HF_TOKEN" in told.notes[0]
    hub.create("ann/gout", private=False)
    told = publish("ann/gout", run_dir, report=False, public=True, dry_run=True)
    assert told.existed and {file.state for file in told.files} == {"to send"} and "set HF_TOKEN" in told.notes[0]
    told = publish("ann/gout", run_dir, report=False, dry_run=True)
    assert "is public, everyone would see" in told.notes[0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = publish("ann/gout", run_dir, report=False, dry_run=True)
    assert told.existed is None and told.notes[0].startswith("Offline mode is on") and told.total_bytes > MODEL_BYTES


def test_the_command_prints_one_document(hub: HubServer, run_dir: Path) -> None:
    done = CliRunner().invoke(cli, ["publish", "ann/gout", "--run-dir", str(run_dir), "--no-report", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["visibility"] == "private"
    assert "Making one commit" in done.stderr
    done = CliRunner().invoke(cli, ["publish", "ann/gout", "--run-dir", str(run_dir), "--dry-run", "--all-ggufs"])
    assert done.exit_code == 0 and "word for word: report/report.html" in done.stdout
    for state, name in (("to send", F16), ("there already", TUNED)):
        assert re.search(rf"^{state} +{MODEL_BYTES / 1e3:.0f} kB  {name} +model$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1].startswith("Nothing was sent. 18 files")


def test_the_only_run_need_not_be_named(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(cli, ["publish", "ann/gout", "--dry-run", "--no-report"]).exception
    assert isinstance(error, MedcotError) and "--run-dir: there is none in runs/" in str(error)
    finished_run(tmp_path / "runs" / "one")
    assert CliRunner().invoke(cli, ["publish", "ann/gout", "--dry-run", "--no-report"]).exit_code == 0
    finished_run(tmp_path / "runs" / "two")
    error = CliRunner().invoke(cli, ["publish", "ann/gout", "--dry-run", "--no-report"]).exception
    assert isinstance(error, MedcotError) and "there are runs/one, runs/two" in str(error)


def test_nothing_of_this_machine_is_published(hub: HubServer, tmp_path: Path) -> None:
    private = tmp_path / "some_secret place"
    base, data = f"{private}/my_base", f"{private}/cases.jsonl"
    config = Config.model_validate(
        {"name": "run", "model": {"base": base}, "data": {"source": data}, "export": {"imatrix": f"{private}/x.dat"}}
    )
    results = measurements()
    results["prepare"] = results["prepare"].model_copy(update={"source": data})
    results["train"] = results["train"].model_copy(update={"base": base})
    results["export"] = results["export"].model_copy(
        update={
            "warnings": [f"{base} lacks a tensor; see:/home/bea/notes, file:///home/bea/it and {private}/run/gguf."]
        }
    )
    run_dir = finished_run(private / "run", config, results, base=base)
    publish("ann/gout", run_dir)
    for name, path in hub.repositories["ann/gout"].files().items():
        found = path.read_bytes().replace(b"\\", b"")
        assert not [secret for secret in (b"secret", b"/home/", str(tmp_path).encode()) if secret in found], name
    for name in ("adapter/adapter_config.json", "adapter/medcot.json", "report/report.json"):
        assert "my_base" in text(hub, name)
    assert (
        "my_base lacks a tensor; see:notes, it and gguf"
        in json.loads(text(hub, "report/report.json"))["exported"]["warnings"][0]
    )
    assert '"/root"' in text(hub, "adapter/tokenizer.json")


@pytest.mark.parametrize("plain", ["Put it in <content></content>.", "</root></tmp>", "https://x.org/home/bea/page"])
def test_what_only_looks_like_a_folder_stays(tmp_path: Path, plain: str) -> None:
    assert PrivatePaths(Config.model_validate({"name": "run"}), tmp_path / "run").shortened(plain) == plain


def test_a_gguf_that_names_a_folder_is_refused(hub: HubServer, tmp_path: Path) -> None:
    base = str(tmp_path / "my-base")
    config = Config.model_validate({"name": "run", "model": {"base": base}})
    run_dir = finished_run(tmp_path / "run", config)
    gguf = run_dir / "gguf" / TUNED
    gguf.write_bytes(base.encode() + gguf.read_bytes()[len(base) :])
    with pytest.raises(MedcotError, match=f"{TUNED} names a folder of this machine"):
        publish("ann/gout", run_dir, report=False)
    assert not hub.repositories


def test_a_space_fetches_the_published_file(hub: HubServer, tmp_path: Path) -> None:
    from tiny_models import save_gguf  # imports PyTorch, which no other test here needs

    model = save_gguf(tmp_path / "model").read_bytes()
    run_dir = finished_run(tmp_path / "run", shipped=model)
    publish("ann/gout", run_dir, report=False)
    write_space(tmp_path / "space", run_dir / "gguf" / TUNED, model_repo="ann/gout")
    (wanted,) = read_settings(tmp_path / "space").models
    assert space_app.local_file(tmp_path / "space", wanted).read_bytes() == model


def test_large_files_go_by_lfs_unless_xet_is_asked_for(
    hub: HubServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    hub.misbehave_in_writing(WriteFault("batch", before=lambda: seen.append(constants.HF_HUB_DISABLE_XET)))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    publish("ann/gout", run_dir, report=False)
    assert seen == [True] and constants.HF_HUB_DISABLE_XET is False
