"""What each stage took, and why there is nothing of it where there is nothing."""

from __future__ import annotations

from bench.page import Section, Table, byte_size, duration
from bench.run_folder import STAGES, Run


def stages_section(run: Run) -> Section:
    def row(stage: str) -> tuple[str, ...]:
        state, artifact = run.states[stage], run.artifacts.get(stage)
        if artifact is None:
            return (stage, state.name, "", "", state.reason)
        manifest = artifact.manifest
        size = sum(record.size for record in manifest.files)
        left = f"{len(manifest.files)} {'file' if len(manifest.files) == 1 else 'files'}, {byte_size(size)}"
        return (stage, state.name, duration(manifest.seconds), byte_size(manifest.peak_memory_bytes), left)

    header = ("Stage", "State", "Time", "Peak memory", "What it left")
    return Section("Stages", tables=(Table(header, "llrrl", tuple(row(stage) for stage in STAGES)),))
