"""``report.json``: every figure of a report for programs, documented by ``report.schema.json`` beside it.

The schema is made from the types below and from ``pipeline/results.py``, so it cannot fall behind them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from bench.page import Page, Tone
from bench.run_folder import Run, StateName
from pipeline.artifacts import FileRecord
from pipeline.config import Config
from pipeline.results import (
    Benchmark,
    Evaluation,
    ExportedModels,
    Measurement,
    PreparedData,
    TrainedAdapter,
    Verification,
)

SCHEMA_NAME = "report.schema.json"
FORMAT = 1


class Sentence(Measurement):
    """A sentence of the decision and how it is meant."""

    text: str
    tone: Tone


class Provenance(Measurement):
    """What a finished artifact is made of and what making it took."""

    fingerprint: str = Field(description="SHA-256 over settings, inputs and versions that the stage depends on.")
    versions: dict[str, str]
    created: str = Field(description="UTC, ISO 8601.")
    seconds: float
    peak_memory_bytes: int
    files: list[FileRecord]


class StageRecord(Measurement):
    stage: str
    state: StateName
    reason: str = Field(description="Why there is no artifact; empty when the stage is done.")
    artifact: Provenance | None


class RunReport(Measurement):
    """One run. A stage without a result has None; one whose gate failed has the result that failed."""

    model_config = ConfigDict(title="Report of one medcot run", populate_by_name=True)
    schema_name: str = Field(default=SCHEMA_NAME, alias="$schema")
    format: int = FORMAT
    kind: Literal["run"] = "run"
    name: str
    decision: list[Sentence]
    disclaimer: str
    stages: list[StageRecord]
    configuration: dict[str, Any] = Field(description="The run's config.yaml in full.")
    prepared: PreparedData | None
    trained: TrainedAdapter | None
    exported: ExportedModels | None
    verified: Verification | None
    evaluated: Evaluation | None
    benchmarked: Benchmark | None


def sentences(page: Page) -> list[Sentence]:
    return [Sentence(text=line.text, tone=line.tone) for line in page.decision]


def run_report(config: Config, run: Run, page: Page) -> RunReport:
    return RunReport(
        name=page.name,
        decision=sentences(page),
        disclaimer=page.disclaimer,
        stages=[_stage_record(run, stage) for stage in run.states],
        configuration=config.model_dump(mode="json"),
        prepared=run.prepared,
        trained=run.trained,
        exported=run.exported,
        verified=run.verified,
        evaluated=run.evaluated,
        benchmarked=run.benchmarked,
    )


def _stage_record(run: Run, stage: str) -> StageRecord:
    state, artifact = run.states[stage], run.artifacts.get(stage)
    if artifact is None:
        return StageRecord(stage=stage, state=state.name, reason=state.reason, artifact=None)
    kept = {name: getattr(artifact.manifest, name) for name in Provenance.model_fields}
    return StageRecord(stage=stage, state=state.name, reason="", artifact=Provenance(**kept))
