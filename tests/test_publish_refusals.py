"""What is not published, and what becomes of an upload that goes wrong: one sentence, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, WriteFault
from published_runs import F16, MODEL_BYTES, PART_BYTES, TOKEN, finished_run, writable_hub
from test_report import TUNED, measurements
from test_run_folder import fail

from bench.publish import publish as publish_all
from pipeline.artifacts import sha256_file
from pipeline.errors import GateFailed, MedcotError
from pipeline.results import Verification

publish = partial(publish_all, report=False)  # its charts take a second to draw


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "run")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with writable_hub(tmp_path, monkeypatch) as server:
        yield server


def model_id(run_dir: Path, name: str = TUNED) -> str:
    return sha256_file(run_dir / "gguf" / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gout", "'gout' names no owner: write OWNER/NAME"),
        ("ann/go out", "is no name of a repository"),
        ("ann/gout/x", "is no name of a repository"),
        ("ann/go--ut", "is no name of a repository"),
        ("bob/gout", "cannot write under bob: it is for ann, clinic"),
    ],
)
def test_a_name_that_cannot_be(hub: HubServer, run_dir: Path, name: str, message: str) -> None:
    with pytest.raises(MedcotError, match=message):
        publish(name, run_dir)
    assert not hub.repositories


def test_a_token_is_needed_and_must_be_known(hub: HubServer, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(MedcotError, match=r"does not accept the token \(401\).+HF_TOKEN.+hf auth login"):
        publish("ann/gout", run_dir)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(MedcotError, match=r"no token of the hub: set HF_TOKEN .+ or run 'hf auth login'"):
        publish("ann/gout", run_dir)


@pytest.mark.parametrize(
    ("account", "message"),
    [
        ({"role": "read"}, "The token of ann may only read"),
        ({"role": "fineGrained", "writes": False}, r"may not write to ann/gout \(403\). It says: You don't have"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_token_without_the_right_to_write(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, account: dict[str, Any], message: str, there: bool
) -> None:
    with writable_hub(tmp_path, monkeypatch, **account) as hub:
        if there:
            hub.create("ann/gout", private=True)
        with pytest.raises(MedcotError, match=message):
            publish("ann/gout", run_dir)
        assert not hub.received and not hub.commits


def test_visibility_is_never_changed(hub: HubServer, run_dir: Path) -> None:
    hub.create("ann/open", private=False)
    hub.create("ann/closed", private=True)
    with pytest.raises(MedcotError, match=r"ann/open is public, everyone would see .+ add --public"):
        publish("ann/open", run_dir)
    with pytest.raises(MedcotError, match="ann/closed is private, and medcot does not change that"):
        publish("ann/closed", run_dir, public=True)
    assert not hub.received and not hub.commits
    publish("ann/open", run_dir, public=True)
    publish("ann/new", run_dir, public=True)
    assert not hub.repositories["ann/open"].private and not hub.repositories["ann/new"].private


def test_a_repository_that_was_opened_meanwhile_gets_nothing(hub: HubServer, run_dir: Path) -> None:
    def open_it() -> None:
        hub.add("ann/gout", hub.repositories["ann/gout"].folder, private=False)

    hub.misbehave_in_writing(WriteFault("complete", before=open_it))
    with pytest.raises(MedcotError, match="ann/gout is public"):
        publish("ann/gout", run_dir)
    assert not hub.commits


def test_a_gguf_that_stayed_on_another_machine_is_told(hub: HubServer, run_dir: Path) -> None:
    (run_dir / "gguf" / F16).unlink()
    (run_dir / "gguf" / "left_behind.json").write_text(f'["{F16}"]')
    with pytest.raises(MedcotError, match=r"is not in the copy .+: medcot run --force export makes it again"):
        publish("ann/gout", run_dir, all_ggufs=True)
    publish("ann/gout", run_dir)
    assert len(hub.commits) == 1


def failed_verification(tmp_path: Path) -> Path:
    verified = measurements()["verify"]
    assert isinstance(verified, Verification)
    return finished_run(
        tmp_path / "bad", results=measurements() | {"verify": verified.model_copy(update={"passed": False})}
    )


@pytest.mark.parametrize("stage", ["verify", "evaluate"])
def test_a_failed_gate_stops_it_unless_it_is_meant(hub: HubServer, run_dir: Path, stage: str) -> None:
    fail(run_dir, stage, "The gate failed: well_formed must be >= 0.95, it is 0.9.", 3)
    with pytest.raises(GateFailed, match=rf"{stage}: gate failed. The gate failed: well_formed .+ --unverified"):
        publish("ann/gout", run_dir)
    assert not hub.repositories
    publish("ann/gout", run_dir, unverified=True)
    card = hub.repositories["ann/gout"].files()["README.md"].read_text()
    assert f"{stage}: gate failed. The gate failed: well\\_formed" in card


def test_a_failed_verification_is_a_failed_gate(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match="The verification failed"):
        publish("ann/gout", failed_verification(tmp_path))


def test_an_unfinished_run_is_refused(hub: HubServer, tmp_path: Path, run_dir: Path) -> None:
    results = {name: each for name, each in measurements().items() if name not in ("verify", "evaluate", "bench")}
    with pytest.raises(MedcotError, match=r"\(verify: not run\)"):
        publish("ann/gout", finished_run(tmp_path / "early", results=results))
    fail(run_dir, "bench", "Out of memory.", 1)
    with pytest.raises(MedcotError, match=r"bench: failed. Out of memory. Run medcot run first"):
        publish("ann/gout", run_dir)
    (run_dir / "gguf/manifest.json").unlink()
    with pytest.raises(MedcotError, match="export: unfinished"):
        publish("ann/gout", run_dir, unverified=True)
    (run_dir / "adapter/manifest.json").write_text("{")
    with pytest.raises(MedcotError, match="train: damaged"):
        publish("ann/gout", run_dir, unverified=True)
    with pytest.raises(MedcotError, match="is no run's folder"):
        publish("ann/gout", tmp_path / "nowhere")
    assert not hub.repositories


def test_a_changed_file_is_not_published(hub: HubServer, run_dir: Path) -> None:
    gguf = run_dir / "gguf" / TUNED
    whole = gguf.read_bytes()
    gguf.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(MedcotError, match=f"{TUNED} was changed since the run made it"):
        publish("ann/gout", run_dir)
    gguf.write_bytes(whole[:-1])
    with pytest.raises(MedcotError, match=f"{TUNED} is missing or was changed"):
        publish("ann/gout", run_dir)
    gguf.write_bytes(whole)
    adapter = run_dir / "adapter" / "adapter_config.json"
    adapter.write_text(adapter.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(MedcotError, match=r"adapter_config\.json is missing or was changed"):
        publish("ann/gout", run_dir)
    assert not hub.repositories


def test_a_file_that_changes_while_it_is_sent(hub: HubServer, run_dir: Path) -> None:
    gguf = run_dir / "gguf" / TUNED
    whole = gguf.read_bytes()
    hub.misbehave_in_writing(WriteFault("complete", before=lambda: gguf.write_bytes(whole[::-1])))
    with pytest.raises(MedcotError, match=f"{TUNED} was changed while it was sent"):
        publish("ann/gout", run_dir)
    gguf.write_bytes(whole)
    # In the middle: the hub gets another content than it was told of, and does not take it.
    other = run_dir / "gguf" / F16
    hub.misbehave_in_writing(
        WriteFault("batch", times=2), WriteFault("batch", before=lambda: other.write_bytes(other.read_bytes()[::-1]))
    )
    with pytest.raises(MedcotError, match=f"{F16} was changed while it was sent"):
        publish("ann/gout", run_dir, ggufs=[F16])
    assert not hub.commits


def broad(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.broad)


@pytest.mark.parametrize(
    "fault",
    [
        WriteFault("create", status=500),
        WriteFault("batch", status=429, retry_after=0),
        WriteFault("part", drop_after=PART_BYTES // 2),
        WriteFault("commit", status=500),
        WriteFault("commit", lost=True),
        broad(WriteFault("whoami", status=503)),
        broad(WriteFault("preupload", status=503)),
        broad(WriteFault("part", status=500)),
        broad(WriteFault("complete", status=504)),
        broad(WriteFault("verify", status=502)),
        broad(WriteFault("validate", lost=True)),
    ],
    ids=lambda fault: f"{fault.step}-{fault.status or 'connection'}",
)
def test_trouble_that_passes_is_not_seen(hub: HubServer, run_dir: Path, fault: WriteFault) -> None:
    hub.misbehave_in_writing(WriteFault(**vars(fault)))
    published = publish("ann/gout", run_dir)
    assert [commit.files for commit in hub.commits] == [frozenset(hub.repositories["ann/gout"].files())]
    assert published.commit == hub.repositories["ann/gout"].commit
    # Of a file in parts only the part that broke is sent again.
    assert hub.received[model_id(run_dir)] <= MODEL_BYTES + PART_BYTES


def test_a_commit_of_someone_else_in_between_is_kept(hub: HubServer, run_dir: Path) -> None:
    def someone_else() -> None:
        hub.change("ann/gout", "by hand", {"notes.md": b"mine"})

    hub.misbehave_in_writing(WriteFault("commit", before=someone_else))
    publish("ann/gout", run_dir)
    assert len(hub.commits) == 2 and {"notes.md", TUNED, "README.md"} <= hub.commits[-1].files
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        hub.change("ann/gout", "by hand", {"notes.md": b"x" * count})

    hub.misbehave_in_writing(WriteFault("commit", times=None, before=again))
    with pytest.raises(MedcotError, match=r"Someone else writes to ann/gout all the time \(412\)"):
        publish("ann/gout", run_dir, all_ggufs=True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            WriteFault("batch", status=403, message="Private repository storage limit reached, please upgrade"),
            r"no room for this \(403\). It says: Private repository storage limit reached",
        ),
        broad(WriteFault("part", status=507), r"no room for this \(507\)"),
        (WriteFault("part", times=None, status=403), r"signed address may have run out"),
        (WriteFault("commit", status=413, message="too much"), r"no room for this \(413\). It says: too much"),
        (WriteFault("part", times=None, status=500), r"has trouble of its own \(500\).+the same command goes on"),
        broad(
            WriteFault("commit", times=None, status=500), r"has trouble of its own \(500\).+the same command goes on"
        ),
        broad(WriteFault("batch", times=None, status=429), r"asks for a pause \(429\).+the same command goes on"),
        (WriteFault("part", times=None, drop_after=100), "does not answer .+ the same command goes on"),
        broad(WriteFault("commit", status=400, message="bad card"), r"refuses to write .+ \(400\). It says: bad card"),
    ],
)
def test_trouble_that_stays_is_one_sentence(hub: HubServer, run_dir: Path, fault: WriteFault, message: str) -> None:
    hub.misbehave_in_writing(WriteFault(**vars(fault)))
    with pytest.raises(MedcotError, match=message) as caught:
        publish("ann/gout", run_dir)
    assert "\n" not in str(caught.value) and "signature" not in str(caught.value)
    assert not hub.commits, "readers see nothing of it"
    hub.behave()
    publish("ann/gout", run_dir)
    assert len(hub.commits) == 1


def test_an_upload_that_broke_off_goes_on(hub: HubServer, run_dir: Path) -> None:
    hub.misbehave_in_writing(WriteFault("part", times=5), WriteFault("part", times=None, drop_after=100))
    with pytest.raises(MedcotError, match="the same command goes on"):
        publish("ann/gout", run_dir, all_ggufs=True)
    stored = {path.name: path.stat().st_size for path in (hub.root / ".storage").iterdir()}  # type: ignore[operator]
    assert len(stored) == 2 and stored[model_id(run_dir)] == MODEL_BYTES and not hub.commits
    before = dict(hub.received)
    hub.behave()
    publish("ann/gout", run_dir, all_ggufs=True)
    assert len(hub.commits) == 1
    assert {oid: hub.received[oid] for oid in stored} == {oid: before[oid] for oid in stored} == stored


@pytest.mark.broad
def test_a_killed_upload_goes_on_where_it_was(hub: HubServer, run_dir: Path, tmp_path: Path) -> None:
    """The adapter is there whole, the GGUF is at its second part when the process is killed."""
    reached, killed = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        killed.wait(60)

    hub.misbehave_in_writing(WriteFault("part", times=2), WriteFault("part", drop_after=1000, then=wait))
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "pipeline.cli", "publish", "ann/gout", "--run-dir", str(run_dir), "--no-report"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reached.wait(120), process.communicate(timeout=10)
    process.send_signal(signal.SIGKILL)
    killed.set()
    process.communicate()
    stored = {path.name: path.stat().st_size for path in (hub.root / ".storage").iterdir()}  # type: ignore[operator]
    assert len(stored) == 1 and not hub.commits and model_id(run_dir) not in stored
    assert hub.received[model_id(run_dir)] == PART_BYTES + 1000
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(hub.commits) == 1
    assert {oid: hub.received[oid] for oid in stored} == stored, "the adapter was not sent again"
    assert hub.received[model_id(run_dir)] == PART_BYTES + 1000 + MODEL_BYTES
