"""Trains in forks of one process that has imported Unsloth: seconds for each training instead of a quarter of a minute.

Reads one job a line, answers with the process id and, when it has ended, with its wait status; ``Trainings`` is the
tests' side of it. A job is killed like any process, and nothing of it reaches the next one.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ended:
    """How a training ended: exit status (negative: the signal) and what it said."""

    status: int
    messages: str


class Trainings:
    """Starts trainings of one base on one data folder, as the train stage does."""

    def __init__(self, base: Path, data: Path) -> None:
        self._base, self._data = base, data
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
        )

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def run(
        self,
        out: Path,
        settings: Sequence[str] = (),
        *,
        memory_bytes: int | None = None,
        full_at: tuple[int, int] | None = None,
        meanwhile: Callable[[int], None] = lambda pid: None,
    ) -> Ended:
        """Train into ``out``; ``memory_bytes`` is what it may map beyond what it has when it starts.

        ``full_at`` (step, rows) makes the held-out evaluation at that step find no memory for more than so many rows.
        ``meanwhile`` is called with its process id as soon as it is running.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        out.mkdir(parents=True, exist_ok=True)
        job = {
            "settings": [f"model.base={self._base}", "name=tiny", "training.report_to=none", *settings],
            "data": str(self._data),
            "out": str(out),
            "memory_bytes": memory_bytes,
            "full_at": full_at,
        }
        print(json.dumps(job), file=self._server.stdin, flush=True)
        pid = int(self._server.stdout.readline())
        meanwhile(pid)
        status = os.waitstatus_to_exitcode(int(self._server.stdout.readline()))
        return Ended(status, messages_of(out).read_text())


def messages_of(out: Path) -> Path:
    return out.parent / f"{out.name}.log"


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Unsloth greets on standard output
    import unsloth  # noqa: F401, I001  (before the others)
    import pipeline.train
    import pipeline.training.trainer  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_perform(job))
        print(pid, file=answers, flush=True)
        print(os.waitpid(pid, 0)[1], file=answers, flush=True)


def _perform(job: dict[str, object]) -> int:
    from pipeline.artifacts import write_json
    from pipeline.config import load_config
    from pipeline.processes import run_as_child
    from pipeline.train import train

    out = Path(str(job["out"]))
    log = os.open(messages_of(out), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    if job["memory_bytes"] is not None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = mapped + int(str(job["memory_bytes"]))
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    if job["full_at"] is not None:
        _fill_memory_at(*job["full_at"])  # type: ignore[misc]

    def work() -> None:
        config = load_config(None, job["settings"])  # type: ignore[arg-type]
        result = train(config, {"prepare": Path(str(job["data"]))}, out)
        write_json(out / "result.json", result.model_dump(mode="json"))

    return run_as_child("train", out, work)


def _fill_memory_at(step: int, rows: int) -> None:
    import torch

    from pipeline.training import held_out, trainer

    evaluate, summed_loss = trainer.held_out_loss, held_out.summed_loss

    def evaluate_in_little_memory(training: trainer.AdapterTrainer) -> float:
        def summed(model: object, input_ids: torch.Tensor, *others: torch.Tensor) -> tuple[float, int]:
            if training.state.global_step == step and len(input_ids) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return summed_loss(model, input_ids, *others)

        held_out.summed_loss = summed
        return evaluate(training)

    trainer.held_out_loss = evaluate_in_little_memory


if __name__ == "__main__":
    _serve()
