"""The train stage on two gloo processes on the CPU: what one process trains, through kills, and on two machines."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import save_model

from pipeline.artifacts import Artifact
from pipeline.checkpoints import SEAL_NAME
from pipeline.results import TrainedAdapter

pytestmark = pytest.mark.e2e
STEPS = 6
ONE = ("training.batch_size=4", "training.gradient_accumulation=1", "training.processes=1")
TWO = ("training.batch_size=2", "training.gradient_accumulation=2", "training.processes=2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("base"), hidden=128, feed_forward=256, layers=2)
    # Of different lengths, so that a mean over batches is not the mean over tokens.
    rows = [
        {"Question": f"Is {n} even?", "Complex_CoT": f"I halve {n}. " * (1 + n % 4), "Response": "Yes." * (1 + n % 3)}
        for n in range(30)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(base: Path, run_dir: Path, *settings: str, stages: tuple[str, str] = ("--until", "train")) -> list[str]:
    """``-m pipeline.cli run ...``, in 32 bit: in bfloat16 the order of a sum shows in the third digit."""
    common = (
        f"model.base={base}", "name=tiny", f"data.source={base / 'rows.jsonl'}", "data.eval_rows=5",
        "data.duplicates=keep", "data.leakage=keep", "model.dtype=float32", "model.load_in_4bit=false",
        f"training.max_steps={STEPS}", "training.checkpoint_steps=2", "training.logging_steps=1",
    )  # fmt: skip
    flags = [part for setting in (*common, *settings) for part in ("--set", setting)]
    return ["-m", "pipeline.cli", "run", *flags, *stages, "--no-plan", "--run-dir", str(run_dir)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def finished(run_dir: Path) -> TrainedAdapter:
    return Artifact.load(run_dir / "adapter", TrainedAdapter).result


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "adapter" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def processes_of(run_dir: Path) -> list[int]:
    """Every process with this folder on its command line."""
    return [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and str(run_dir).encode() in _command_line(path)
    ]


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def wait_for_a_checkpoint(run_dir: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not list((run_dir / "adapter" / "checkpoints").glob(f"*/{SEAL_NAME}")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was sealed"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one")
    assert run(*command(base, run_dir, *ONE)).returncode == 0
    return run_dir


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's folder, and what it said."""
    run_dir = tmp_path_factory.mktemp("two")
    outcome = run(*command(base, run_dir, *TWO))
    assert outcome.returncode == 0, outcome.stderr
    return run_dir, outcome.stderr


def test_two_processes_train_what_one_trains(one: Path, two: tuple[Path, str]) -> None:
    alone, together = finished(one), finished(two[0])
    assert losses(two[0]) == pytest.approx(losses(one), abs=1e-3) and len(losses(one)) == STEPS
    assert losses(one)[0] - losses(one)[-1] > 0.1  # a training that stands still would be the same as well
    assert together.eval_loss_before == pytest.approx(alone.eval_loss_before, abs=1e-4)
    assert together.eval_loss_after == pytest.approx(alone.eval_loss_after, abs=1e-3)
    found, expected = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (two[0], one))
    for name, matrix in expected.items():
        np.testing.assert_allclose(found[name], matrix, atol=2e-3, err_msg=name)


def test_one_process_writes_and_speaks(one: Path, two: tuple[Path, str]) -> None:
    assert "train: on 2 processes" in two[1]
    assert two[1].count(f"step {STEPS}/{STEPS}") == 1
    files = [{path.name for path in (run_dir / "adapter").iterdir()} for run_dir in (one, two[0])]
    assert files[0] == files[1]


@pytest.mark.parametrize("victim", ["driver", "rank"])
def test_a_killed_training_goes_on(victim: str, base: Path, two: tuple[Path, str], tmp_path: Path) -> None:
    arguments = command(base, tmp_path, *TWO)
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True)
    wait_for_a_checkpoint(tmp_path, process)
    if victim == "driver":
        process.kill()
    else:
        ranks = [
            pid for pid in processes_of(tmp_path) if b"pipeline.stage_process" in _command_line(Path(f"/proc/{pid}"))
        ]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
    told = process.communicate(timeout=120)[1]
    deadline = time.monotonic() + 10
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(tmp_path) == []
    if victim == "rank":
        assert process.returncode == 1 and "of train was ended by SIGKILL" in told and "Traceback" not in told
    outcome = run(*arguments)
    assert outcome.returncode == 0 and "train: resumed" in outcome.stderr
    assert finished(tmp_path).resumed_from_step in (2, 4, 6)
    assert losses(tmp_path) == pytest.approx(losses(two[0]), abs=1e-4)


def test_interrupting_ends_all_of_them(base: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, *command(base, tmp_path, *TWO)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_a_checkpoint(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in told
    assert processes_of(tmp_path) == []


def test_what_all_processes_cannot_do_is_told_once(base: Path, two: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(two[0] / "data", tmp_path / "run" / "data")
    (tmp_path / "run" / "data" / "train.jsonl").write_text("{torn\n")
    outcome = run(*command(base, tmp_path / "run", *TWO, stages=("--only", "train")))
    assert outcome.returncode == 1 and outcome.stderr.count("Error in train: ") == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("shared", [True, False], ids=["shared storage", "own storage"])
def test_two_machines(shared: bool, base: Path, two: tuple[Path, str], tmp_path: Path) -> None:
    """torchrun on each, with one process each: the same training, and nothing to do the second time."""
    folders = [tmp_path / "first", tmp_path / ("first" if shared else "second")]
    shutil.copytree(two[0] / "data", folders[0] / "data")
    for attempt in ("made", "up to date"):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        machines = []
        for number, folder in enumerate(folders):
            torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}"]
            torchrun += ["--master-addr=localhost", f"--master-port={port}"]
            arguments = command(base, folder, *TWO[:2], stages=("--only", "train"))
            machines.append(
                subprocess.Popen(
                    [sys.executable, *torchrun, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        said, told = zip(*[machine.communicate(timeout=900) for machine in machines], strict=True)
        assert [machine.returncode for machine in machines] == [0, 0], "\n".join(told)
        assert ("train: up to date" in told[0]) == (attempt == "up to date")
        # A table's title is folded at 80 columns.
        assert f"Run{folders[0]}" in "".join(said[0].split()) and said[1] == ""
    assert losses(folders[0]) == pytest.approx(losses(two[0]), abs=1e-4)
    assert finished(folders[0]).eval_loss_after == pytest.approx(finished(two[0]).eval_loss_after, abs=1e-4)
    assert shared or not (folders[1] / "adapter" / "manifest.json").exists()
