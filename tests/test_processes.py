"""Processes that run.py starts: one sentence and the right status, whatever happens; an end with their parent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.batch_shares import most_processes, processes_for, share_of_step
from pipeline.config import TrainingConfig, load_config
from pipeline.errors import MedcotError
from pipeline.launch import cause

FAILING = """
import errno, sys
from pathlib import Path
from pipeline.errors import GateFailed, MedcotError
from pipeline.processes import run_as_child
def work():
    print("a library's banner")
    if sys.argv[1]:
        raise eval(sys.argv[1])
sys.exit(run_as_child("train", Path("runs/x"), work))
"""


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        ("MedcotError('The data are empty: name others.')", 1, "The data are empty: name others."),
        ("GateFailed('0.9 is below 0.995.')", 3, "0.9 is below 0.995."),
        ("OSError(errno.ENOSPC, 'No space', 'a.bin')", 1, "The disk is full (a.bin): free some space"),
        ("PermissionError(errno.EACCES, 'Permission denied', 'b.bin')", 1, "b.bin: Permission denied"),
        ("MemoryError()", 1, "Out of memory: lower training.batch_size"),
        ("KeyError('a\\nb')", 1, "KeyError: 'a\\nb' (an error of medcot or a library; --debug shows where)"),
    ],
)
def test_every_error_is_one_sentence(error: str, status: int, sentence: str) -> None:
    outcome = subprocess.run([sys.executable, "-c", FAILING, error], capture_output=True, text=True, check=False)
    told = outcome.stderr.splitlines()
    assert (outcome.returncode, outcome.stdout, len(told)) == (status, "", 2)
    assert told[0] == "a library's banner" and told[1].startswith(f"Error in train: {sentence}")


def test_debug_shows_where(tmp_path: Path) -> None:
    environment = {**os.environ, "MEDCOT_DEBUG": "1", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    command = [sys.executable, "-c", FAILING, "ValueError('odd')"]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" in outcome.stderr and outcome.returncode == 1
    left = json.loads((tmp_path / "error.json").read_text())["message"]
    assert left["message"].startswith("ValueError: odd") and abs(left["extraInfo"]["time"] - time.time()) < 60


def test_a_plan_that_fails_in_an_odd_way_is_a_sentence_too(tmp_path: Path) -> None:
    """What is wrong here no part of medcot has foreseen: the run's configuration is a folder."""
    (tmp_path / "config.yaml").mkdir()
    command = [sys.executable, "-m", "pipeline.plan_process", str(tmp_path), "train"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 1 and outcome.stdout == ""
    assert outcome.stderr.startswith("Error in plan: ") and len(outcome.stderr.splitlines()) == 1


def test_a_child_whose_parent_is_gone_before_it_looks_ends() -> None:
    environment = {**os.environ, "MEDCOT_PARENT": "1234567890"}
    command = [sys.executable, "-c", FAILING, ""]
    outcome = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert outcome.returncode == -signal.SIGKILL and outcome.stderr == b""


@pytest.mark.parametrize("examples", [1, 2, 6, 8, 12, 16])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_a_step_sees_as_many_examples_on_any_number_of_processes(
    examples: int, batch_size: int, processes: int
) -> None:
    if examples % processes:
        least = most_processes(examples, processes)
        with pytest.raises(MedcotError, match=f"cannot share the {examples} examples .* or take {least} processes"):
            share_of_step(examples, batch_size, processes)
        assert examples % least == 0
        return
    size, passes = share_of_step(examples, batch_size, processes)
    assert size * passes * processes == examples
    assert size <= batch_size
    assert not any(examples // processes % larger == 0 for larger in range(size + 1, batch_size + 1))


def training(**settings: object) -> TrainingConfig:
    return TrainingConfig.model_validate(settings)


def test_the_reference_run_keeps_its_batch_on_two_t4() -> None:
    reference = load_config("deepseek-r1-8b").training
    assert (reference.batch_size, reference.gradient_accumulation) == (2, 4)
    assert processes_for(reference, gpus=2).value == "2"
    assert share_of_step(reference.effective_batch, 2, 2) == (2, 2)


def test_how_many_processes() -> None:
    assert processes_for(training(), gpus=0).value == "1"
    assert processes_for(training(), gpus=1).value == "1"
    assert processes_for(training(batch_size=2, gradient_accumulation=3), gpus=4).value == "3"
    assert processes_for(training(batch_size=1, gradient_accumulation=1), gpus=2).value == "1"
    assert processes_for(training(processes=2), gpus=0).value == "2"  # on a CPU
    with pytest.raises(MedcotError, match=r"training\.processes=4 and this machine has 2"):
        processes_for(training(processes=4), gpus=2)
    with pytest.raises(MedcotError, match="3 processes cannot share the 8 examples"):
        processes_for(training(processes=3), gpus=0)


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "many", "true"])
def test_a_number_of_processes_that_is_none(wrong: str) -> None:
    with pytest.raises(MedcotError, match=r"training\.processes: .*a whole number from 1 on, or auto"):
        load_config(None, [f"training.processes={wrong}"])


def failure(exitcode: int, time: float | None = None, foreseen: bool = False) -> SimpleNamespace:
    """As torchrun tells of a process that has failed, with or without the file in which it says why."""
    told = {"message": "m", "extraInfo": {"time": time, "foreseen": foreseen}}
    return SimpleNamespace(exitcode=exitcode, message="" if time is None else told)


def test_the_cause_is_who_failed_first() -> None:
    assert cause({0: failure(1, 10.2), 1: failure(3, 10.1)}) == 1
    assert cause({0: failure(1, 10.2), 1: failure(-signal.SIGKILL)}) == 1
    assert cause({0: failure(-signal.SIGTERM), 1: failure(1, 10.2)}) == 1
    assert cause({0: failure(-signal.SIGKILL), 1: failure(3, 10.2, foreseen=True)}) == 1
    assert cause({0: failure(-signal.SIGTERM), 1: failure(7)}) == 1
    assert cause({2: failure(1, 10.2)}) == 2


TOGETHER = """
import sys
from pathlib import Path
from pipeline import launch
launch._stage_arguments = lambda stage_name, run_dir: ["-c", sys.argv[1]]
sys.exit(launch._run_together(2, "train", Path("runs/x")))
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
from pipeline import ranks
from pipeline.errors import GateFailed
from pipeline.processes import run_as_child
def work():
    print("a library's banner")
    if ranks.rank() == 1:
        {failure}
    time.sleep(3600)
sys.exit(run_as_child("train", Path("runs/x"), work))
"""


@pytest.mark.broad
@pytest.mark.parametrize(
    ("failure", "status", "sentence"),
    [
        ("raise GateFailed('Not this one.')", 3, "Not this one."),
        ("os.kill(os.getpid(), 9)", 1, "process 1 of train was ended by SIGKILL (often: out of memory): the same"),
        ("os._exit(7)", 7, "process 1 ended with status 7 and said nothing; --debug shows more"),
    ],
)
def test_one_process_that_fails_ends_all_and_is_told_once(failure: str, status: int, sentence: str) -> None:
    command = [sys.executable, "-c", TOGETHER, RANK.format(failure=failure)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert (outcome.returncode, outcome.stdout) == (status, "")
    assert outcome.stderr.splitlines()[-1].startswith(f"Error in train: {sentence}")
    assert outcome.stderr.count("Error") == 1 and outcome.stderr.count("banner") <= 1
