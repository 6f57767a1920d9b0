"""One stage in a process of its own: ``python -m pipeline.stage_process STAGE RUN_DIR [--partial]`` (from run.py).

Or in each of several, which train together: then the first alone writes the artifact.
"""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from pipeline import ranks
from pipeline.artifacts import (
    IN_PROGRESS_NAME,
    FileRecord,
    Manifest,
    artifact_files,
    sha256_file,
    write_manifest,
)
from pipeline.common_ground import copy_from_first, require_same_identity
from pipeline.hardware import hide_gpu
from pipeline.hub_commit import commits_used
from pipeline.memory import peak_memory_bytes
from pipeline.processes import run_as_child
from pipeline.run import (
    CONFIG_NAME,
    PARTIAL,
    Stage,
    identify,
    load_run_config,
    stage_inputs,
    stage_named,
)


def perform(stage_name: str, run_dir: Path) -> None:
    """Run the stage in this process; a finished artifact is then in its folder."""
    stage = _begin(stage_name)
    ranks.join_group()
    if ranks.from_first((run_dir / stage.folder / IN_PROGRESS_NAME).is_file()):
        if ranks.on_several_machines():
            _copy_what_is_needed(stage, run_dir)
        _make_artifact(stage, run_dir)
    # Else run.py has found the artifact up to date, and started this for the other machines to hear of it.
    ranks.leave_group()


def perform_partly(stage_name: str, run_dir: Path) -> None:
    """Run the stage with whatever inputs are finished; what it writes is no artifact."""
    stage = _begin(stage_name)
    stage.load()(load_run_config(run_dir), stage_inputs(stage, run_dir), run_dir / stage.folder)


def _begin(stage_name: str) -> Stage:
    stage = stage_named(stage_name)
    if not stage.on_gpu:
        hide_gpu()
    return stage


def _make_artifact(stage: Stage, run_dir: Path) -> None:
    config = load_run_config(run_dir)
    inputs = stage_inputs(stage, run_dir)
    out_dir = run_dir / stage.folder
    # Before the work: an input that is changed meanwhile must not look up to date afterwards.
    identity = identify(stage, config, run_dir)
    require_same_identity(identity)
    started = time.monotonic()
    result = stage.load()(config, inputs, out_dir)
    if not ranks.is_first():
        return
    files = [
        FileRecord(path=str(path.relative_to(out_dir)), size=path.stat().st_size, sha256=sha256_file(path))
        for path in artifact_files(out_dir)
    ]
    manifest = Manifest(
        stage=stage.name,
        fingerprint=identity.fingerprint,
        config=identity.config,
        inputs=identity.inputs,
        versions=identity.versions,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=peak_memory_bytes(),
        files=files,
        result=result.model_dump(mode="json"),
        commits=commits_used(identity.config),
    )
    write_manifest(out_dir, manifest)
    (out_dir / IN_PROGRESS_NAME).unlink(missing_ok=True)


def _copy_what_is_needed(stage: Stage, run_dir: Path) -> None:
    """The configuration, the inputs and what an interrupted attempt left, where this machine's storage lacks them."""
    copy_from_first(run_dir / CONFIG_NAME)
    for folder in (*stage_inputs(stage, run_dir).values(), run_dir / stage.folder):
        copy_from_first(folder)


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    work = perform_partly if sys.argv[3:] == [PARTIAL] else perform
    sys.exit(run_as_child(name, folder, lambda: work(name, folder)))
