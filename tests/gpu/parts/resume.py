"""A training that is killed (-9) after a checkpoint and started again, next to one that was not disturbed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from part import Recorder, last_line, medcot, perform, run, settings, start
from synthetic import random_base, write_rows

from pipeline.artifacts import Artifact
from pipeline.checkpoints import SEAL_NAME
from pipeline.config import load_config
from pipeline.errors import MedcotError
from pipeline.results import TrainedAdapter
from pipeline.run import stage_named

_TOLERANCE = 0.02  # of each logged loss: a GPU does not add in the same order twice
_SETTINGS: dict[str, object] = {
    "data.eval_rows": 4,
    "training.batch_size": 4,
    "training.learning_rate": 1e-3,
    "training.max_steps": 60,
    "training.checkpoint_steps": 10,
    "training.logging_steps": 2,
    "training.report_to": "none",
}
_REHEARSAL: dict[str, object] = {
    "training.max_steps": 12,
    "training.checkpoint_steps": 2,
    "data.duplicates": "keep",
    "data.leakage": "keep",
}


def measure(recorder: Recorder) -> None:
    request = recorder.request
    overrides = dict(_SETTINGS)
    if request.rehearse:
        base = random_base(request.work, rehearse=True)
        rows = write_rows(request.work / "resume-rows.jsonl", load_config("smollm2-cpu"), base, [120] * 40)
        overrides |= {**_REHEARSAL, "model.base": base, "data.source": rows}
    alone, killed = request.work / "resume-alone", request.work / "resume-killed"
    undisturbed = start(_command(alone, overrides), request.work / "resume-alone.log")
    begun = time.monotonic()
    at = _kill_after_a_checkpoint(_command(killed, overrides), killed, request.work / "resume-killed.log")
    recorder.figure("killed after", time.monotonic() - begun, "s")
    begun = time.monotonic()
    status = run(_command(killed, overrides))
    recorder.figure("the same command again took", time.monotonic() - begun, "s")
    recorder.check("the same command resumes", status == 0, f"exit status {status}")
    if undisturbed.wait() != 0:
        raise MedcotError(f"The undisturbed training failed: {last_line(request.work / 'resume-alone.log')}")
    resumed = Artifact.load(killed / stage_named("train").folder, TrainedAdapter).result.resumed_from_step
    recorder.check("from a checkpoint", (resumed or 0) >= at, f"killed after step {at}, resumed from {resumed}")
    expected, found = _losses(alone), _losses(killed)
    recorder.check(
        "every step is logged once", list(expected) == list(found), f"{len(expected)} and {len(found)} logged losses"
    )
    apart = max(abs(found[step] / expected[step] - 1) for step in expected.keys() & found.keys())
    recorder.figure("largest difference of a logged loss", apart)
    recorder.check("the same loss curve", apart <= _TOLERANCE, f"at most {apart:.2%} apart ({_TOLERANCE:.0%})")


def _command(run_dir: Path, overrides: dict[str, object]) -> list[str]:
    return medcot("run", "smollm2-cpu", "--until", "train", "--run-dir", str(run_dir), *settings(overrides))


def _kill_after_a_checkpoint(command: list[str], run_dir: Path, log: Path) -> int:
    """The step of the newest checkpoint when the training was killed."""
    process = start(command, log)
    checkpoints = run_dir / stage_named("train").folder / "checkpoints"
    while not (sealed := list(checkpoints.glob(f"*/{SEAL_NAME}"))):
        if process.poll() is not None:
            raise MedcotError(f"The training ended before its first checkpoint: {last_line(log)}")
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)  # the stage's process goes with it
    process.wait()
    return max(int(path.parent.name.rpartition("-")[2]) for path in sealed)


def _losses(run_dir: Path) -> dict[int, float]:
    lines = (run_dir / stage_named("train").folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


if __name__ == "__main__":
    perform(measure)
