"""A base on the hub, shard by shard, from a server on this machine that also breaks, lies and refuses."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bitsandbytes.functional
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hub_server import Fault, HubServer
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from export import hub_files
from export.checkpoint_shards import INDEX_NAME
from export.hub_shards import HubShard, ShardFolder
from export.safetensors_file import SafetensorsFile
from export.weights import BaseWeights, open_base
from pipeline.errors import MedcotError

NAME = "someone/model"
FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


class Disk:
    """The scratch folder, and the most that ever lay in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.most = 0

    def files(self) -> list[str]:
        return sorted(path.name.rpartition("-model-")[2] for path in self.folder.rglob("*model-*") if path.is_file())

    def look(self, *arguments: object) -> None:
        self.most = max(self.most, sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()))


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "scratch")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A hub that is asked although the tests are offline otherwise; no cache, no token, no waiting."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub_files, "RETRY_WAITS", (0.0,) * 3)
    with HubServer() as server:
        yield server
    huggingface_hub.close_session()


def save_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    folder.mkdir(parents=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("A model")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of two tensors, 200 KB to 400 KB each."""
    torch.manual_seed(0)
    return save_shards(
        tmp_path_factory.mktemp("hub") / "model",
        {
            file: {f"layer.{number}.a": torch.randn(100 * number, 400), f"layer.{number}.b": torch.randn(50, 200)}
            for number, file in ((1, FIRST), (2, SECOND), (3, THIRD))
        },
    )


def read_all(weights: BaseWeights, names: list[str], disk: Disk) -> dict[str, np.ndarray]:
    """Read in this order as an export does: rows, then release."""
    weights.plan(names)
    values = {}
    for name in names:
        values[name] = weights.rows(name, slice(None))
        disk.look()
        weights.release(name)
    return values


def export_from(hub: HubServer, disk: Disk, names: list[str] | None = None) -> dict[str, np.ndarray]:
    with open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder, progress=disk.look) as weights:
        return read_all(weights, names or list(weights.names), disk)


def expected_of(folder: Path) -> dict[str, np.ndarray]:
    weights = BaseWeights(folder)
    return {name: weights.rows(name, slice(None)) for name in weights.names}


def assert_equal(found: dict[str, np.ndarray], folder: Path) -> None:
    expected = expected_of(folder)
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_headers_come_without_any_shard(hub: HubServer, folder: Path, disk: Disk) -> None:
    commit = hub.add(NAME, folder)
    with open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder) as weights:
        local = BaseWeights(folder)
        assert set(weights.names) == set(local.names)
        assert weights.stored("layer.3.a").shape == (300, 400)
        assert weights.stored("layer.3.a").path == f"{NAME}/{THIRD}"
        assert disk.files() == []
        assert all(request.byte_range for request in hub.content_requests("model"))
    assert all(commit in request.path for request in hub.requests if "/resolve/" in request.path)


def test_one_shard_at_a_time_and_nothing_left(hub: HubServer, folder: Path, disk: Disk) -> None:
    hub.add(NAME, folder)
    assert_equal(export_from(hub, disk), folder)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert disk.most == max(sizes) < sum(sizes) / 1.5
    assert [path.name for path in disk.folder.iterdir()] == ["someone--model.lock"]
    for file in (FIRST, SECOND, THIRD):
        fetched = [request for request in hub.content_requests(file) if request.byte_range.startswith("bytes=0-")]
        assert len(fetched) == 2, "one for the header, one for the shard"


def test_an_order_across_shards_needs_two_until_sorted_by_shard(hub: HubServer, folder: Path, disk: Disk) -> None:
    hub.add(NAME, folder)
    order = ["layer.1.a", "layer.2.a", "layer.1.b", "layer.2.b", "layer.3.b", "layer.3.a"]
    assert_equal(export_from(hub, disk, order), folder)
    sizes = {file: (folder / file).stat().st_size for file in (FIRST, SECOND, THIRD)}
    assert disk.most == max(sizes[FIRST] + sizes[SECOND], sizes[THIRD])
    disk.most = 0
    with open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder, progress=disk.look) as weights:
        by_shard = weights.by_shard(order)
        assert by_shard == ["layer.1.a", "layer.1.b", "layer.2.a", "layer.2.b", "layer.3.b", "layer.3.a"]
        assert_equal(read_all(weights, by_shard, disk), folder)
    assert disk.most == max(sizes.values())


def test_a_shard_without_planned_tensors_is_not_fetched(hub: HubServer, folder: Path, disk: Disk) -> None:
    hub.add(NAME, folder)
    found = export_from(hub, disk, ["layer.1.b", "layer.3.a"])
    assert set(found) == {"layer.1.b", "layer.3.a"}
    assert len(hub.content_requests(SECOND)) == 1, "its header"


def test_threads_that_need_one_shard_fetch_it_once(hub: HubServer, folder: Path, disk: Disk) -> None:
    hub.add(NAME, folder)
    with open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder) as weights, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: weights.rows("layer.2.a", slice(row, row + 1)), range(40)))
    assert np.array_equal(np.concatenate(found), expected_of(folder)["layer.2.a"][:40])
    assert len(hub.content_requests(SECOND)) == 2, "its header and its content"


@pytest.mark.parametrize("reset", [False, True], ids=["ended", "reset"])
def test_dropped_connections_go_on_where_they_ended(hub: HubServer, folder: Path, disk: Disk, reset: bool) -> None:
    hub.add(NAME, folder)
    with open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder) as weights:
        hub.misbehave(Fault(SECOND, drop_after=70_000, times=4, reset=reset))
        hub.requests.clear()
        found = weights.rows("layer.2.a", slice(None))
    assert np.array_equal(found, expected_of(folder)["layer.2.a"])
    starts = [int(request.byte_range[6:].split("-")[0]) for request in hub.content_requests(SECOND)]
    assert len(starts) == 5 and starts[0] == 0 and starts == sorted(set(starts)), starts
    # After a reset the client may lose what had not been read yet.
    assert reset or starts == [0, 70_000, 140_000, 210_000, 280_000]


def test_a_broken_run_is_gone_on_with_by_the_next(hub: HubServer, folder: Path, disk: Disk) -> None:
    hub.add(NAME, folder)
    with (
        pytest.raises(MedcotError, match=rf"{SECOND} cannot be fetched: the hub answers with status 500"),
        open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder) as weights,
    ):
        hub.misbehave(Fault(SECOND, from_byte=90_000, status=500), Fault(SECOND, drop_after=90_000))
        read_all(weights, list(weights.names), disk)
    assert disk.files() == [f"{SECOND.removeprefix('model-')}.partial"]
    hub.behave()
    hub.requests.clear()
    assert_equal(export_from(hub, disk, [f"layer.{number}.{part}" for number in (2, 1, 3) for part in "ab"]), folder)
    assert hub.content_requests(SECOND)[1].byte_range == f"bytes=90000-{(folder / SECOND).stat().st_size - 1}"
    assert disk.most <= max(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_a_killed_run_leaves_a_shard_that_the_next_takes(hub: HubServer, folder: Path, disk: Disk) -> None:
    hub.add(NAME, folder)
    code = (
        "import os, signal, sys; from export.weights import open_base\n"
        "weights = open_base(sys.argv[1], scratch=__import__('pathlib').Path(sys.argv[2]))\n"
        "weights.rows('layer.2.a', slice(0, 1)); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(disk.folder.parent / "home"),
        "PYTHONPATH": str(Path(hub_files.__file__).parent.parent),
    }  # fmt: skip
    command = [sys.executable, "-c", code, NAME, str(disk.folder)]
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    assert disk.files() == [SECOND.removeprefix("model-")]
    hub.requests.clear()
    with open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder, progress=disk.look) as weights:
        weights.rows("layer.2.a", slice(0, 1))
        assert len(hub.content_requests(SECOND)) == 1, "its header: the shard is here"
    # Another order of use: what is not needed yet makes room.
    subprocess.run(command, env=environment, check=False)
    assert_equal(export_from(hub, disk), folder)
    assert disk.most <= max(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_a_hub_that_is_busy_at_first(hub: HubServer, folder: Path, disk: Disk) -> None:
    hub.add(NAME, folder)
    hub.misbehave(Fault(api=True, status=503, times=1))
    hub.misbehave(*(Fault(file, status=503, times=2) for file in (INDEX_NAME, FIRST, SECOND)))
    assert_equal(export_from(hub, disk), folder)


def test_a_server_without_ranges_starts_again(hub: HubServer, folder: Path, disk: Disk) -> None:
    hub.add(NAME, folder)
    with open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder) as weights:
        hub.misbehave(Fault(FIRST, drop_after=50_000, times=2, ignore_ranges=True), Fault(ignore_ranges=True))
        assert np.array_equal(weights.rows("layer.1.a", slice(None)), expected_of(folder)["layer.1.a"])
    with pytest.raises(MedcotError, match="does not serve parts of files"):
        read_four_bit_from(hub, disk)


def read_four_bit_from(hub: HubServer, disk: Disk) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {FIRST: {}, SECOND: {}}
    for number in range(6):
        data, state = bitsandbytes.functional.quantize_4bit(
            torch.randn(64, 256 + 64 * number), quant_type="nf4", compress_statistics=True
        )
        parts = {f"layer.{number}.weight.{part}": value for part, value in state.as_dict(packed=True).items()}
        shards[FIRST if number < 3 else SECOND] |= {f"layer.{number}.weight": data, **parts}
    # The cut between two shards parts a weight from its scales.
    stray = "layer.2.weight.absmax"
    shards[SECOND][stray] = shards[FIRST].pop(stray)
    folder = save_shards(disk.folder.parent / "four_bit", shards)
    hub.add(NAME, folder)
    try:
        found = export_from(hub, disk)
        assert_equal(found, folder)
        return found
    finally:
        shutil.rmtree(folder)


def test_a_four_bit_base(hub: HubServer, disk: Disk) -> None:
    found = read_four_bit_from(hub, disk)
    assert [values.shape for values in found.values()] == [(64, 256 + 64 * number) for number in range(6)]
    assert disk.most < 64 * 1024, "one shard, although a weight's scales lie in the other"


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([Fault(FIRST, flip=100_000)], r"arrived damaged twice: its sha256 is \w{64}, the hub announces \w{64}"),
        ([Fault(FIRST, keep=100_000)], "cannot be fetched: the hub answers with status 416"),
        ([Fault(FIRST, keep=100_000, ignore_ranges=True)], r"does not answer \(the connection ended after 100000 of"),
        ([Fault(FIRST, status=404)], "cannot be fetched: the hub answers with status 404"),
        ([Fault(FIRST, status=401)], "answers with status 401. Log in with 'hf auth login'"),
        ([Fault(FIRST, drop_after=0)], "the hub does not answer"),
    ],
    ids=["wrong byte", "truncated", "truncated, no ranges", "404", "401", "no answer"],
)
def test_what_goes_wrong_with_a_shard(
    hub: HubServer, folder: Path, disk: Disk, faults: list[Fault], message: str
) -> None:
    hub.add(NAME, folder)
    with open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder) as weights:
        hub.misbehave(*faults)
        with pytest.raises(MedcotError, match=message) as caught:
            weights.rows("layer.1.a", slice(None))
        assert "\n" not in str(caught.value) and f"{NAME}/{FIRST}" in str(caught.value)


def test_a_damaged_leftover_is_fetched_again(hub: HubServer, folder: Path, disk: Disk) -> None:
    hub.add(NAME, folder)
    with (
        pytest.raises(MedcotError, match="status 404"),
        open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder) as weights,
    ):
        hub.misbehave(Fault(FIRST, from_byte=1, status=404), Fault(FIRST, drop_after=90_000, flip=60_000))
        weights.rows("layer.1.a", slice(None))
    assert disk.files() == [f"{FIRST.removeprefix('model-')}.partial"]
    hub.behave()
    hub.requests.clear()
    assert_equal(export_from(hub, disk), folder)
    starts = [request.byte_range.partition("-")[0] for request in hub.content_requests(FIRST)]
    assert starts == ["bytes=0", "bytes=90000", "bytes=0"], "the header, the rest, and all of it again"


def test_who_may_read(hub: HubServer, folder: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, folder, private=True)
    hub.add("someone/gated", folder, gated=True)
    for name, revision, message in (
        (NAME, None, f"{NAME} is not on the hub, or is private"),
        ("someone/absent", None, "someone/absent is not on the hub, or is private: check the name"),
        ("someone/gated", None, "is gated: accept its terms"),
        ("not a name/at all", None, "is no hub id: name it as owner/name"),
    ):
        with pytest.raises(MedcotError, match=message):
            open_base(name, revision, endpoint=hub.endpoint, scratch=disk.folder)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with pytest.raises(MedcotError, match="has no such revision on the hub"):
        open_base(NAME, "v2", endpoint=hub.endpoint, scratch=disk.folder)
    hub.requests.clear()
    assert_equal(export_from(hub, disk), folder)
    assert {request.token for request in hub.requests if request.host == "127.0.0.1"} >= {hub.token}
    assert {request.token for request in hub.content_requests("model")} == {None}, "the storage host sees no token"


def test_the_cache_is_used_and_kept(
    hub: HubServer, folder: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add(NAME, folder)
    snapshot_download(NAME, endpoint=hub.endpoint, allow_patterns=["*.json", FIRST])
    with open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder) as weights:
        assert_equal(read_all(weights, list(weights.names), disk), folder)
    assert len(hub.content_requests(FIRST)) == 1, "the snapshot's"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        MedcotError, match=r"offline mode is on .*The copy in the hub's cache does not serve: .*lacks mod"
    ):
        open_base(NAME, scratch=disk.folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # As training fetches it: not every file of the repository.
    snapshot_download(NAME, endpoint=hub.endpoint, allow_patterns=["*.json", "*.safetensors"])
    hub.requests.clear()
    assert_equal(export_from(hub, disk), folder)
    assert not hub.content_requests("model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with open_base(NAME, scratch=disk.folder) as weights:
        assert_equal(read_all(weights, list(weights.names), disk), folder)
    assert list((tmp_path / "cache").rglob(THIRD))
    with pytest.raises(MedcotError, match=r"someone/other cannot be fetched: offline mode is on"):
        open_base("someone/other", scratch=disk.folder)


def test_no_hub_at_all(hub: HubServer, disk: Disk) -> None:
    with pytest.raises(MedcotError, match=r"someone/model cannot be fetched, the hub does not answer \("):
        open_base(NAME, endpoint="http://127.0.0.1:9", scratch=disk.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pickles", r"PyTorch pickles \(pytorch_model-00001-of-00002.bin\) only"),
        ("missing", rf"lacks {SECOND} \(found "),
        ("promise", rf"{NAME}/{FIRST} lacks tensor layer.9.a, which"),
        ("no json", rf"{NAME}/{INDEX_NAME} is not valid JSON"),
        ("header", rf"{NAME}/{FIRST} is truncated or not a safetensors file"),
        ("size", rf"{NAME}/{FIRST} is truncated: it has \d+ bytes of"),
    ],
)
def test_repositories_that_do_not_fit(
    hub: HubServer, folder: Path, disk: Disk, change: str, message: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    first = broken / FIRST
    if change == "pickles":
        for path in broken.glob("model*"):
            path.unlink()
        (broken / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")
    elif change == "missing":
        (broken / SECOND).unlink()
    elif change == "promise":
        index = json.loads((broken / INDEX_NAME).read_text())
        index["weight_map"]["layer.9.a"] = FIRST
        (broken / INDEX_NAME).write_text(json.dumps(index))
    elif change == "no json":
        (broken / INDEX_NAME).write_text("{")
    elif change == "header":
        first.write_bytes(b"\xff" * 100)
    else:
        first.write_bytes(first.read_bytes()[:-1])
    hub.add(NAME, broken)
    with pytest.raises(MedcotError, match=message):
        open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder)
    assert disk.files() == []


def test_a_long_header_takes_a_second_request(hub: HubServer, disk: Disk, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    names = [f"layer.{number}.{'x' * 100}" for number in range(2000)]
    save_file(
        {name: torch.full((2,), float(number)) for number, name in enumerate(names)}, folder / "model.safetensors"
    )
    hub.add(NAME, folder)
    with open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder) as weights:
        assert len(hub.content_requests("model")) == 2
        assert weights.rows(names[1234], slice(None)).tolist() == [[1234.0], [1234.0]]


def test_a_full_disk_is_said_before_the_download(
    hub: HubServer, folder: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, folder)
    with open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder) as weights:
        usage = shutil.disk_usage(disk.folder)
        monkeypatch.setattr(hub_files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        hub.requests.clear()
        with pytest.raises(MedcotError, match=r"has 0.00 GB free and someone/model/.* needs 0.00 GB: free"):
            weights.rows("layer.1.a", slice(None))
        assert not hub.requests


def test_two_exports_do_not_share_a_scratch_folder(hub: HubServer, folder: Path, disk: Disk) -> None:
    hub.add(NAME, folder)
    with (
        open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder),
        pytest.raises(MedcotError, match="Another export is reading this base"),
    ):
        open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder)
    open_base(NAME, endpoint=hub.endpoint, scratch=disk.folder).__exit__(None, None, None)


def test_a_shard_asked_for_after_its_release_comes_again(hub: HubServer, folder: Path, disk: Disk) -> None:
    hub.add(NAME, folder)
    repository = hub_files.HubRepository(NAME, endpoint=hub.endpoint)
    shards = ShardFolder(disk.folder)
    shard = HubShard(repository.files[FIRST], repository.commit, shards)
    first = shard.file()
    shard.discard()
    assert disk.files() == []
    again = shard.file()
    assert isinstance(again, SafetensorsFile) and again is not first
    assert np.array_equal(again.rows("layer.1.b", slice(None)), expected_of(folder)["layer.1.b"])
    shard.close()
    shards.close(keep=False)
