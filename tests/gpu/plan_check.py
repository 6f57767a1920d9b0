"""A finished run's stages next to what the plan of the same run expected: time, memory, GPU memory."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from gpu_watch import memory_used
from part import Recorder

from bench.gpu_results import PLANNED
from pipeline.artifacts import read_manifest
from pipeline.plan import Plan
from pipeline.plan_process import PLAN_NAME
from pipeline.run import STAGES


def record_plan(recorder: Recorder, run_dir: Path, *, gpu_to_itself: bool = False) -> None:
    """Figures of every stage that is finished; ``gpu_to_itself`` says that nobody else was on the GPU meanwhile."""
    plan = Plan.model_validate_json((run_dir / PLAN_NAME).read_bytes())
    estimates = {estimate.stage: estimate for estimate in plan.stages}
    for stage in STAGES:
        manifest, estimate = read_manifest(run_dir / stage.folder), estimates.get(stage.name)
        if manifest is None or estimate is None:
            continue
        recorder.figure(stage.name, manifest.seconds, "s")
        if estimate.seconds is not None:
            recorder.figure(f"{stage.name}{PLANNED}", estimate.seconds, "s")
        recorder.figure(f"{stage.name}: memory", manifest.peak_memory_bytes / 1e9, "GB")
        recorder.figure(f"{stage.name}: memory{PLANNED}", estimate.memory_bytes / 1e9, "GB")
        if not gpu_to_itself:
            continue
        end = datetime.fromisoformat(manifest.created).timestamp()
        used = memory_used(recorder.request.work, end - manifest.seconds, end + 1)  # written in whole seconds
        if used is not None:
            recorder.figure(f"{stage.name}: GPU memory", used / 1e9, "GB")
            recorder.figure(f"{stage.name}: GPU memory{PLANNED}", estimate.gpu_memory_bytes / 1e9, "GB")
