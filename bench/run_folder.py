"""What a run has measured so far: each stage's state and, where there is one, its result.

Only manifests are read, and the result that a stage wrote before its gate failed. A result counts while it is about
what the other stages hold now: a verification of an earlier GGUF says nothing of this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from export.verify import RESULT_NAME as VERIFICATION_NAME
from pipeline.artifacts import MANIFEST_NAME, Artifact, read_manifest
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.failure import read_failure
from pipeline.results import (
    Benchmark,
    Evaluation,
    ExportedModels,
    PreparedData,
    TrainedAdapter,
    Verification,
)
from pipeline.run import CONFIG_NAME, load_run_config, stage_inputs, stage_named

STAGES: dict[str, type[BaseModel]] = {name: stage_named(name).result for name in stage_named("report").inputs}
_WRITTEN_BEFORE_THE_GATE = {"verify": VERIFICATION_NAME, "evaluate": "evaluation.json"}


StateName = Literal["done", "gate failed", "failed", "unfinished", "outdated", "damaged", "not run"]


@dataclass(frozen=True)
class StageState:
    """``reason`` is a sentence without its full stop, empty where a stage is done."""

    name: StateName
    reason: str = ""

    @property
    def pending(self) -> bool:
        """Whether the next medcot run makes it as a matter of course."""
        return self.name in ("not run", "unfinished", "outdated")

    @property
    def failed(self) -> bool:
        return self.name in ("gate failed", "failed", "damaged")


class Run:
    """The stages of a run; ``artifacts`` has those that are done, ``states`` all."""

    def __init__(self, inputs: Mapping[str, Path]) -> None:
        self.artifacts: dict[str, Artifact[Any]] = {}
        self.states: dict[str, StageState] = {}
        self._results: dict[str, Any] = {}
        for stage, result_type in STAGES.items():
            self.states[stage] = self._load(stage, inputs.get(stage), result_type)
        self.prepared: PreparedData | None = self._results.get("prepare")
        self.trained: TrainedAdapter | None = self._results.get("train")
        self.exported: ExportedModels | None = self._results.get("export")
        self.verified: Verification | None = self._results.get("verify")
        self.evaluated: Evaluation | None = self._results.get("evaluate")
        self.benchmarked: Benchmark | None = self._results.get("bench")

    def _load(self, stage: str, folder: Path | None, result_type: type[BaseModel]) -> StageState:
        if folder is None or not folder.is_dir() or not any(folder.iterdir()):
            return StageState("not run")
        if read_manifest(folder) is None:
            return self._load_unfinished(stage, folder, result_type)
        try:
            artifact = Artifact.load(folder, result_type)
        except MedcotError as error:
            return StageState("damaged", str(error).rstrip("."))
        changed = self._changed_input(artifact)
        if changed is not None:
            return StageState("outdated", f"it was made from an earlier {changed}; medcot run makes it again")
        self.artifacts[stage] = artifact
        self._results[stage] = artifact.result
        return StageState("done")

    def _load_unfinished(self, stage: str, folder: Path, result_type: type[BaseModel]) -> StageState:
        if (folder / MANIFEST_NAME).exists():
            return StageState("damaged", f"{folder / MANIFEST_NAME} cannot be read; medcot run makes the stage again")
        failure = read_failure(folder)
        if failure is None:
            return StageState("unfinished", "it was interrupted or is at work; medcot run goes on with it")
        reason = failure.message.rstrip(".")
        if not failure.is_gate:
            return StageState("failed", reason)
        written = _WRITTEN_BEFORE_THE_GATE.get(stage)
        if written is not None:
            try:
                self._results[stage] = result_type.model_validate_json((folder / written).read_bytes())
            except (FileNotFoundError, ValidationError):
                reason += "; what it measured is not there"
        return StageState("gate failed", reason)

    def _changed_input(self, artifact: Artifact[Any]) -> str | None:
        """The stage whose artifact is another one now. One that was deleted proves nothing."""
        for name, digest in artifact.manifest.inputs.items():
            state = self.states.get(name)
            if state is None or state.name == "not run":
                continue
            if name not in self.artifacts or self.artifacts[name].manifest.digest != digest:
                return name
        return None


def open_run(run_dir: Path) -> tuple[Config, Run]:
    """The run in a folder; raises MedcotError when it is none."""
    if not (run_dir / CONFIG_NAME).is_file():
        found = "there is no such folder" if not run_dir.exists() else f"it has no {CONFIG_NAME}"
        raise MedcotError(f"{run_dir} is no run's folder ({found}): name one that medcot run made, such as runs/NAME.")
    return load_run_config(run_dir), Run(stage_inputs(stage_named("report"), run_dir))
