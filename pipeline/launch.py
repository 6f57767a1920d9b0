"""Start a stage on as many processes of this machine as it is to take: ``python -m pipeline.launch STAGE RUN_DIR``.

run.py starts the stages that can use several this way. One process becomes the stage itself. Several are torchrun's:
when one fails, the others are ended, and of what they say the cause is told. Where torchrun has started medcot
itself, on one machine or many, this process is one of its.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipeline import ranks
from pipeline.batch_shares import processes_for
from pipeline.hardware import may_have_gpu, usable_cores
from pipeline.processes import (
    PARENT_VARIABLE,
    TOLD_BY_PARENT_VARIABLE,
    ended_by_signal,
    run_as_child,
    tell_failure,
)
from pipeline.run import load_run_config

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_SECONDS_TO_END = "5"  # for the other processes, when one has failed; then they are killed


def launch(stage_name: str, run_dir: Path) -> int:
    """Returns the exit status; does not return when one process is enough."""
    if ranks.world_size() > 1:
        _become_the_stage(stage_name, run_dir)
    training = load_run_config(run_dir).training
    processes = int(processes_for(training, _count_gpus()).value)
    if processes == 1:
        _become_the_stage(stage_name, run_dir)
    print(f"{stage_name}: on {processes} processes", file=sys.stderr)
    return _run_together(processes, stage_name, run_dir)


def _become_the_stage(stage_name: str, run_dir: Path) -> NoReturn:
    os.execv(sys.executable, [sys.executable, *_stage_arguments(stage_name, run_dir)])


def _stage_arguments(stage_name: str, run_dir: Path) -> list[str]:
    return ["-m", "pipeline.stage_process", stage_name, str(run_dir)]


def _run_together(processes: int, stage_name: str, run_dir: Path) -> int:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not os.environ.get("MEDCOT_DEBUG"):
        logging.disable(logging.CRITICAL)  # torchrun tells of each failure in thirty lines
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    os.environ[TOLD_BY_PARENT_VARIABLE] = "1"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = _SECONDS_TO_END
    # More threads than cores wait for each other in busy loops.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    with tempfile.TemporaryDirectory(prefix="medcot-launch-") as logs:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=f"medcot-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(settings, sys.executable)(*_stage_arguments(stage_name, run_dir))
        except ChildFailedError as error:
            return _tell(stage_name, error.failures)
        except SignalException as error:
            return 128 + error.sigval
    return 0


def _tell(stage_name: str, failures: Mapping[int, ProcessFailure]) -> int:
    """Tell why they failed, on standard error; the exit status is the cause's."""
    rank = cause(failures)
    failure = failures[rank]
    if failure.exitcode < 0:
        sentence, status = ended_by_signal(f"process {rank} of {stage_name}", -failure.exitcode), 1
    elif isinstance(failure.message, dict):
        sentence, status = failure.message["message"], failure.exitcode
    else:
        sentence = f"process {rank} ended with status {failure.exitcode} and said nothing; --debug shows more"
        status = failure.exitcode
    tell_failure(stage_name, sentence, status)
    return status


def cause(failures: Mapping[int, ProcessFailure]) -> int:
    """The rank whose failure made the others fail: they lost their connection to it, or torchrun ended them (SIGTERM).

    What a process could not do (MedcotError) is no consequence of another's end. One that a signal has ended could
    not write when that was, but those that lost it came later.
    """

    def order(rank: int) -> tuple[int, float]:
        failure = failures[rank]
        if isinstance(failure.message, dict):
            told = failure.message["extraInfo"]
            return 0 if told["foreseen"] else 2, told["time"]
        if failure.exitcode == -signal.SIGTERM:
            return 4, 0.0
        return 1 if failure.exitcode < 0 else 3, 0.0

    return min(failures, key=order)


def _count_gpus() -> int:
    """Without a context on any of them, which would take memory from the training."""
    if not may_have_gpu():
        return 0
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    sys.exit(run_as_child(name, folder, lambda: launch(name, folder)))
