"""A sweep's experiments on this machine: one after another, or one on each GPU at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.platforms import nvidia_smi
from pipeline.sweep_process import ExperimentProcess

_POLL_SECONDS = 0.2
Environment = Mapping[str, str]


def gpu_slots() -> list[Environment]:
    """What an experiment's process finds set, one for each that may run at the same time.

    Asked of the driver, not of PyTorch: a CUDA context in this process would keep the memory that they need.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = [device for device in visible.split(",") if device.strip()]
    else:
        devices = (nvidia_smi("--query-gpu=uuid", "--format=csv,noheader") or "").split()
    return [{"CUDA_VISIBLE_DEVICES": device} for device in devices] if len(devices) > 1 else [{}]


def run_here(
    run_dirs: Sequence[Path], until: str, slots: Sequence[Environment], announce: Callable[[str], None]
) -> dict[Path, str | None]:
    """Run all folders' configurations, one in each slot at a time; gives why each failed, or None.

    What a run says is announced with the name of its folder before it.
    """
    waiting = list(run_dirs)
    free = list(slots)
    running: dict[ExperimentProcess, Environment] = {}
    failures: dict[Path, str | None] = {}
    try:
        while waiting or running:
            while waiting and free:
                slot = free.pop(0)
                running[ExperimentProcess(waiting.pop(0), until, slot)] = slot
            time.sleep(_POLL_SECONDS)
            for process, slot in list(running.items()):
                ended = process.ended()  # before its last lines are read
                for line in process.new_lines():
                    announce(f"{process.run_dir.name}: {line}")
                if ended:
                    del running[process]
                    free.append(slot)
                    failures[process.run_dir] = process.failure()
    finally:
        for process in running:
            process.stop()
    return failures
