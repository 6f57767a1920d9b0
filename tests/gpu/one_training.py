"""The train stage of a prepared run, in a process of its own, on an emulated GPU or as several ranks on one GPU.

    python -m one_training < request.json

The stage's own function does the work. Beside it stands what ``medcot plan`` expected of it on the same GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from part import last_line
from pydantic import BaseModel, ConfigDict, Field
from smaller_card import Card, confine_to, report_as

from pipeline import ranks
from pipeline.errors import MedcotError
from pipeline.memory import peak_memory_bytes
from pipeline.plan import make_plan
from pipeline.processes import run_as_child, with_our_packages
from pipeline.results import TrainedAdapter
from pipeline.run import load_run_config, stage_inputs, stage_named
from pipeline.training.lora_model import import_unsloth

_LOG, _RESULT, _MEETING = "log.txt", "result.json", "meeting"


class OneTraining(BaseModel):
    """``run_dir`` holds a finished prepare stage; ``out_dir``, a new folder, is where this training writes.

    Without ``card`` it is the GPU that is here; ``processes`` ranks share that GPU.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    run_dir: Path
    out_dir: Path
    card: Card | None = None
    processes: int = 1


class LoggedStep(BaseModel):
    """A line of metrics.jsonl: loss in nats per token, tokens and seconds since training began."""

    model_config = ConfigDict(frozen=True)
    step: int
    loss: float
    tokens: int
    seconds: float


class TrainedOnce(BaseModel):
    """``seconds`` is the whole stage's, imports, loading and held-out loss included; GPU bytes are PyTorch's peaks."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    trained: TrainedAdapter
    steps: list[LoggedStep]
    seconds: float
    planned_seconds: float | None
    gpu_allocated_bytes: int
    gpu_reserved_bytes: int
    planned_gpu_bytes: int
    memory_bytes: int = Field(description="Largest resident set of the process.")
    planned_memory_bytes: int
    plan_problems: list[str]


def train_together(requests: Sequence[OneTraining]) -> list[TrainedOnce | MedcotError]:
    """All at the same time; of each its result, or why it failed."""
    running = [(request, _start(request)) for request in requests]
    return [_result(request, processes) for request, processes in running]


def _result(request: OneTraining, processes: Sequence[subprocess.Popen[str]]) -> TrainedOnce | MedcotError:
    statuses = [process.wait() for process in processes]
    if any(statuses):
        return MedcotError(f"status {statuses}: {last_line(request.out_dir / _LOG)}")
    return TrainedOnce.model_validate_json((request.out_dir / _RESULT).read_bytes())


def _start(request: OneTraining) -> list[subprocess.Popen[str]]:
    request.out_dir.mkdir(parents=True)
    processes = []
    for rank in range(request.processes):
        # torchrun's names; both ranks are number 0 of their machine's GPUs, because there is one.
        group = {"RANK": rank, "WORLD_SIZE": request.processes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": request.processes}
        names = {name: str(value) for name, value in group.items()} if request.processes > 1 else {}
        log = request.out_dir / (_LOG if rank == 0 else f"rank{rank}.log")
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "one_training"],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                text=True,
                env={**stage_named("train").environment, **with_our_packages(), **names, "GLOO_SOCKET_IFNAME": "lo"},
            )
        assert process.stdin is not None
        process.stdin.write(request.model_dump_json())
        process.stdin.close()
        processes.append(process)
    return processes


def _train(request: OneTraining) -> None:
    begun = time.monotonic()
    config, stage = load_run_config(request.run_dir), stage_named("train")
    if request.card is not None:
        report_as(request.card)
    import_unsloth(request.out_dir / "unsloth")
    import torch

    if request.card is not None:
        confine_to(request.card)
    if ranks.world_size() > 1:
        # NCCL refuses two ranks on one GPU; gloo takes their tensors through main memory.
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:gloo" if torch.cuda.is_available() else "gloo",
            init_method=f"file://{request.out_dir / _MEETING}",
            rank=ranks.rank(),
            world_size=ranks.world_size(),
        )
    before_plan = time.monotonic()
    plan = make_plan(config, request.run_dir, stages=(stage.name,))
    begun += time.monotonic() - before_plan
    trained = stage.load()(config, stage_inputs(stage, request.run_dir), request.out_dir)
    seconds = time.monotonic() - begun
    on_gpu = torch.cuda.is_available()
    if ranks.is_first():
        assert isinstance(trained, TrainedAdapter)
        lines = (request.out_dir / "metrics.jsonl").read_text().splitlines()
        (estimate,) = plan.stages
        result = TrainedOnce(
            trained=trained,
            steps=[LoggedStep.model_validate(row) for row in map(json.loads, lines) if "loss" in row],
            seconds=seconds,
            planned_seconds=estimate.seconds,
            gpu_allocated_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
            gpu_reserved_bytes=torch.cuda.max_memory_reserved() if on_gpu else 0,
            planned_gpu_bytes=estimate.gpu_memory_bytes,
            memory_bytes=peak_memory_bytes(),
            planned_memory_bytes=estimate.memory_bytes,
            plan_problems=plan.problems,
        )
        (request.out_dir / _RESULT).write_text(result.model_dump_json(indent=2))
    ranks.leave_group()


if __name__ == "__main__":
    os.environ["MEDCOT_DEBUG"] = "1"
    asked = OneTraining.model_validate_json(sys.stdin.read())
    sys.exit(run_as_child(asked.name, asked.out_dir, lambda: _train(asked)))
