"""Two machines that share no storage: the second gets what the first has. Real processes, a real gloo group."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.broad

SCRIPT = """
import sys
from pathlib import Path
from pipeline import common_ground, ranks
from pipeline.errors import MedcotError
from pipeline.run import StageIdentity
common_ground._PIECE_BYTES = 1000
ranks.join_group()
version, *folders = sys.argv[1:]
for folder in map(Path, folders):
    common_ground.copy_from_first(folder / "config.yaml")
    common_ground.copy_from_first(folder / "adapter")
assert ranks.from_all(ranks.rank()) == [0, 1] and ranks.total(ranks.rank() + 1) == 3
assert list(ranks.own_share(range(5))) == [[0, 2, 4], [1, 3]][ranks.rank()]
try:
    common_ground.require_same_identity(StageIdentity("train", {}, {}, {"torch": "2.13", "trl": version}))
except MedcotError as error:
    print(error)
ranks.leave_group()
"""
FIRST = {
    "config.yaml": b"seed: 1\n",
    "adapter/in_progress.json": b"{}",
    "adapter/checkpoints/checkpoint-2/weights": bytes(range(256)) * 10,
    "adapter/checkpoints/checkpoint-2/empty": b"",
    "adapter/checkpoints/checkpoint-2/rng_state_0.pth": b"0",
}
OWN = "adapter/checkpoints/checkpoint-2/rng_state_1.pth"
SECOND = {
    "adapter/in_progress.json": b"{...}",
    OWN: b"1",
    "adapter/checkpoints/checkpoint-4/weights": b"torn",
    "adapter/checkpoints/checkpoint-4/rng_state_1.pth": b"1",
}
SHARED = {"config.yaml": b"seed: 1\n", "adapter/in_progress.json": b"{}", "adapter/mine.txt": b"a thesis"}


@dataclass(frozen=True)
class Met:
    """What two processes have left in their folders and printed; ``times`` of the shared folder, before and after."""

    first: dict[str, bytes]
    second: dict[str, bytes]
    shared: dict[str, bytes]
    times: tuple[dict[str, int], dict[str, int]]
    printed: list[str]


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Met:
    first, second, shared = (tmp_path_factory.mktemp(name) for name in ("first", "second", "shared"))
    for folder, files in ((first, FIRST), (second, SECOND), (shared, SHARED)):
        write(folder, files)
    before = times(shared)
    printed = run_on_two_machines(["1.15.0", first, shared], ["1.14.0", second, shared])
    return Met(content(first), content(second), content(shared), (before, times(shared)), printed)


def run_on_two_machines(*arguments: Sequence[object]) -> list[str]:
    """What each of them prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, own in enumerate(arguments):
        place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, "-c", SCRIPT, *map(str, own)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return outputs


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_the_second_machine_gets_what_the_first_has(met: Met) -> None:
    """A later checkpoint goes, the random state that only this machine has stays."""
    assert met.first == FIRST
    assert met.second == {**FIRST, OWN: SECOND[OWN]}


def test_shared_storage_is_left_as_it_is(met: Met) -> None:
    assert met.shared == SHARED
    assert met.times[0] == met.times[1]


def test_both_say_what_differs(met: Met) -> None:
    assert met.printed[0] == met.printed[1]
    assert "has other trl (1.14.0, there 1.15.0) than the first machine" in met.printed[0]
