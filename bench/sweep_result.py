"""What a sweep's runs measured, side by side. Only artifacts are read; ``sweep.json`` is a ``SweepResult``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bench.statistics import total
from bench.stored_outcomes import stored_outcomes
from bench.sweep_comparison import JOINT_ERROR, MEASURES, Difference, MeasureKey, ScoredRecord, compare, measured
from bench.text_metrics import bleu_signature
from pipeline.artifacts import Artifact
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.prepare import EVAL_FILE
from pipeline.results import Evaluation, ExportedModels, LossPoint, Measurement, PreparedData, TrainedAdapter
from pipeline.run import stage_named
from pipeline.sweep import ExperimentOutcome
from pipeline.sweep_file import Sweep

_LAST_SHARE = 10  # the training loss is the mean of the last tenth of what was logged: one step's says little


class Figures(Measurement):
    """What one finished experiment measured; losses in nats per token."""

    steps: int
    epochs: float = Field(description="Passes over the training records that were made.")
    train_loss: float | None = Field(description="Mean of the last tenth of the logged steps; None without any.")
    held_out_loss: float = Field(description="Of the exported file, on the evaluated records' thoughts and answers.")
    held_out_loss_in_training: float = Field(description="Of base and adapter, on all held-out records.")
    rouge_l: float = Field(description="Mean F-measure of the answers, 0 to 1.")
    bleu_4: float = Field(description="Over all answers together, 0 to 1.")
    trainable_parameters: int
    train_seconds: float
    peak_memory_bytes: int = Field(description="Of the training process, in the machine's memory.")
    loss_curve: list[LossPoint]


class ExperimentRow(Measurement):
    """One experiment; ``differences`` are against the primary on the same held-out records."""

    name: str
    state: Literal["done", "failed"]
    failure: str | None
    changes: dict[str, Any] = Field(description="Its own overrides: dotted key -> value.")
    learning_rate: float
    rank: int
    alpha: int
    effective_batch: int = Field(description="Examples per optimizer step.")
    figures: Figures | None
    differences: dict[MeasureKey, Difference]
    not_compared: str | None = Field(description="Why there are no differences.")


class SweepResult(Measurement):
    """``best`` names the experiment with the best value of each measure, among those that can be compared."""

    name: str
    primary: str
    held_out_records: int | None
    quantization: str | None = Field(description="Of the files that answered.")
    comparisons: int = Field(description="Intervals that hold together with the joint confidence.")
    joint_confidence: float = 1 - JOINT_ERROR
    bleu_signature: str
    best: dict[MeasureKey, str]
    experiments: list[ExperimentRow]


class _Finished:
    """A finished experiment's artifacts and its scored held-out records."""

    def __init__(self, outcome: ExperimentOutcome) -> None:
        def load(stage: str, result: Any) -> Artifact[Any]:
            return Artifact.load(outcome.run_dir / stage_named(stage).folder, result)

        config = outcome.experiment.config
        self.prepared = load("prepare", PreparedData)
        self.trained = load("train", TrainedAdapter)
        self.exported = load("export", ExportedModels)
        evaluated = load("evaluate", Evaluation)
        shipped = self.exported.path / self.exported.result.ship
        self.records = _scored_records(config, self.prepared.path, shipped, evaluated)
        if not self.records:
            raise MedcotError("its evaluation ended before a record was answered: raise evaluation.max_minutes")
        self.parts = {measure.key: measured(measure, self.records) for measure in MEASURES}
        held_out = next(record for record in self.prepared.manifest.files if record.path == EVAL_FILE)
        # Records that are paired must be the same: their content, and how many of them.
        self.held_out_identity = (held_out.sha256, len(self.records))
        self.quantization = config.export.ship

    def figures(self, effective_batch: int) -> Figures:
        trained: TrainedAdapter = self.trained.result
        last = [point.loss for point in trained.train_loss[-max(1, len(trained.train_loss) // _LAST_SHARE) :]]
        totals = {measure.key: total(measure.value, self.parts[measure.key]) for measure in MEASURES}
        return Figures(
            steps=trained.steps,
            epochs=trained.steps * effective_batch / self.prepared.result.train_rows,
            train_loss=sum(last) / len(last) if last else None,
            held_out_loss_in_training=trained.eval_loss_after,
            trainable_parameters=trained.trainable_parameters,
            train_seconds=trained.train_seconds,
            peak_memory_bytes=self.trained.manifest.peak_memory_bytes,
            loss_curve=trained.train_loss,
            **totals,
        )


def collect(sweep: Sweep, outcomes: Sequence[ExperimentOutcome]) -> SweepResult:
    """One row an experiment, compared with the primary; a failed one has its reason and no figures."""
    finished: dict[str, _Finished] = {}
    failures: dict[str, str] = {}
    for outcome in outcomes:
        try:
            if outcome.failure is not None:
                raise MedcotError(outcome.failure)
            finished[outcome.experiment.name] = _Finished(outcome)
        except MedcotError as error:  # artifacts that cannot be read are that experiment's failure alone
            failures[outcome.experiment.name] = str(error)
    primary = finished.get(sweep.primary)
    comparable = [name for name, each in finished.items() if primary and _alike(each, primary)]
    comparable.sort(key=lambda name: name != sweep.primary)  # of equal values the primary's is the best
    comparisons = max(1, (len(comparable) - 1) * len(MEASURES))
    rows = []
    for outcome in outcomes:
        experiment = outcome.experiment
        config, name = experiment.config, experiment.name
        batch = config.training.effective_batch
        differences: dict[MeasureKey, Difference] = {}
        if primary is not None and name in comparable and name != sweep.primary:
            differences = {
                measure.key: compare(
                    measure, finished[name].parts[measure.key], primary.parts[measure.key], comparisons, config.seed
                )
                for measure in MEASURES
            }
        rows.append(
            ExperimentRow(
                name=name,
                state="failed" if name in failures else "done",
                failure=failures.get(name),
                changes=dict(experiment.changes),
                learning_rate=config.training.learning_rate,
                rank=config.lora.r,
                alpha=config.lora.alpha,
                effective_batch=batch,
                figures=finished[name].figures(batch) if name in finished else None,
                differences=differences,
                not_compared=None if differences else _why_not_compared(name, sweep.primary, finished),
            )
        )
    return SweepResult(
        name=sweep.name,
        primary=sweep.primary,
        held_out_records=len(primary.records) if primary else None,
        quantization=primary.quantization if primary else None,
        comparisons=comparisons,
        bleu_signature=bleu_signature(),
        best=_best(rows, comparable),
        experiments=rows,
    )


def _alike(one: _Finished, other: _Finished) -> bool:
    return one.held_out_identity == other.held_out_identity


def _why_not_compared(name: str, primary: str, finished: Mapping[str, _Finished]) -> str:
    if name not in finished:
        return "it failed"
    if name == primary:
        return "it is the primary experiment"
    if primary not in finished:
        return f"the primary experiment, {primary}, failed"
    return "its held-out records are not those of the primary experiment"


def _best(rows: Sequence[ExperimentRow], comparable: Sequence[str]) -> dict[MeasureKey, str]:
    figures = {row.name: row.figures for row in rows}
    best: dict[MeasureKey, str] = {}
    for measure in MEASURES:
        values = {name: getattr(figures[name], measure.key) for name in comparable}
        if len(values) > 1:
            best[measure.key] = (max if measure.higher_is_better else min)(values, key=lambda name: values[name])
    return best


def _scored_records(config: Config, data: Path, model: Path, evaluated: Artifact[Evaluation]) -> list[ScoredRecord]:
    """The evaluated records in order, with the answer that follows the thought."""
    return [
        ScoredRecord(
            nll=outcome.reasoning_nll + outcome.answer_nll,
            tokens=outcome.reasoning_tokens + outcome.answer_tokens,
            answer=outcome.answer,
            reference=record.example.answer,
        )
        for record, outcome in stored_outcomes(config, data, model, evaluated.path, evaluated.result)
    ]
