"""Several runs beside each other: what differs in their settings, and in what was measured.

medcot report runs/a runs/b --out comparison
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from bench.loss_chart import describe_losses, loss_curves
from bench.page import Chart, Line, Page, Section, Table, Tone, byte_size, duration
from bench.report import build_page, disclaimer
from bench.report_document import FORMAT, SCHEMA_NAME, RunReport, Sentence, run_report, sentences
from bench.run_folder import STAGES, Run, open_run
from bench.sections.decision import is_verified, shipped_file, speed_of
from bench.sections.evaluation import by_role, comparison_of, show, show_verdict, value_of
from bench.sections.speed import seconds
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.metrics import METRICS, Metric
from pipeline.prepare import EVAL_FILE
from pipeline.results import Measurement, ModelEvaluation


class RunDifference(Measurement):
    """A metric of ``run``'s model beside that of the first run's, where both answered the same records."""

    run: str
    metric: str
    verdict: Literal["better", "worse", "higher", "lower", "no difference shown"]


class ComparisonReport(Measurement):
    """Several runs; ``differences`` are from the first."""

    model_config = ConfigDict(title="Comparison of several medcot runs", populate_by_name=True)
    schema_name: str = Field(default=SCHEMA_NAME, alias="$schema")
    format: int = FORMAT
    kind: Literal["comparison"] = "comparison"
    decision: list[Sentence]
    disclaimer: str
    settings: dict[str, list[Any]] = Field(description="Dotted key -> its value in each run, where they differ.")
    differences: list[RunDifference]
    runs: list[RunReport]


@dataclass(frozen=True)
class ComparedRun:
    name: str
    config: Config
    run: Run

    @property
    def tuned(self) -> ModelEvaluation | None:
        """The evaluated model that ships, else the first tuned one."""
        if self.run.evaluated is None:
            return None
        _, models = by_role(self.run.evaluated)
        shipped = shipped_file(self.run.exported)
        ships = [model for model in models if shipped is not None and model.model == shipped.name]
        return next(iter([*ships, *models]), None)

    @property
    def evaluated_on(self) -> tuple[str, Any] | None:
        """What two evaluations must have in common to be compared: the held-out file and how it was used."""
        prepared, evaluated = self.run.artifacts.get("prepare"), self.run.artifacts.get("evaluate")
        if prepared is None or evaluated is None:
            return None
        hashes = [record.sha256 for record in prepared.manifest.files if record.path == EVAL_FILE]
        return ("".join(hashes), evaluated.manifest.config.get("evaluation"))


def open_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Raises MedcotError when one of them is no run, or two are the same."""
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise MedcotError(f"{folders[index]} is named twice: compare different runs.")
    opened = [open_run(folder) for folder in folders]
    names = [config.name for config, _ in opened]
    return [
        ComparedRun(config.name if names.count(config.name) == 1 else str(folder), config, run)
        for folder, (config, run) in zip(folders, opened, strict=True)
    ]


def comparison(runs: Sequence[ComparedRun]) -> tuple[Page, ComparisonReport]:
    settings = differing_settings([each.config for each in runs])
    differences = list(_differences(runs))
    sections = [
        Section("Runs", tables=(_runs_table(runs),)),
        _settings_section(runs, settings),
        _training_section(runs),
        _evaluation_section(runs, differences),
        _speed_section(runs),
        Section("Stages", tables=(_stages_table(runs),)),
    ]
    page = Page(
        name=" against ".join(each.name for each in runs),
        decision=tuple(_decide(runs, differences)),
        disclaimer=disclaimer(runs[0].config),
        sections=tuple(section for section in sections if section is not None),
    )
    document = ComparisonReport(
        decision=sentences(page),
        disclaimer=page.disclaimer,
        settings=settings,
        differences=differences,
        runs=[run_report(each.config, each.run, build_page(each.config, each.run)) for each in runs],
    )
    return page, document


def differing_settings(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """Dotted keys whose values are not the same everywhere, but for the name."""
    flat = [dict(_flatten(config.model_dump(mode="json"))) for config in configs]
    keys = dict.fromkeys(key for each in flat for key in each if key != "name")
    values = {key: [each.get(key) for each in flat] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _differences(runs: Sequence[ComparedRun]) -> Iterator[RunDifference]:
    """A verdict needs intervals that are apart, which is stricter than a paired test of the records."""
    first = runs[0]
    for other in runs[1:]:
        theirs, ours = first.tuned, other.tuned
        if theirs is None or ours is None or first.evaluated_on is None or first.evaluated_on != other.evaluated_on:
            continue
        for metric in METRICS:
            before, after = value_of(theirs, metric.key), value_of(ours, metric.key)
            if before is None or after is None:
                continue
            above, below = after.low > before.high, after.high < before.low
            verdict: Literal["better", "worse", "higher", "lower", "no difference shown"] = "no difference shown"
            if above or below:
                way: Literal["higher", "lower"] = "higher" if above else "lower"
                verdict = way if metric.better is None else "better" if way == metric.better else "worse"
            yield RunDifference(run=other.name, metric=metric.key, verdict=verdict)


def _decide(runs: Sequence[ComparedRun], differences: Sequence[RunDifference]) -> Iterator[Line]:
    for each in runs:
        failed = [f"{stage} {state.name}" for stage, state in each.run.states.items() if state.failed]
        shipped = shipped_file(each.run.exported)
        file = "no GGUF" if shipped is None else f"{shipped.name}, {byte_size(shipped.size_bytes)}"
        good = not failed and each.run.verified is not None and is_verified(each.run.verified)
        verified = "verified" if good else ", ".join(failed) or "not verified"
        yield Line(f"{each.name}: {file}; {verified}.", "good" if good else "bad")
    first = runs[0]
    for other in runs[1:]:
        found = [each for each in differences if each.run == other.name]
        if not found:
            yield Line(f"{other.name} and {first.name} were not evaluated on the same records: no verdict.")
            continue
        tones: dict[str, Tone] = {"better": "good", "worse": "bad"}
        for verdict, tone in tones.items():
            named = [metric.name for metric in METRICS for each in found if each.metric == metric.key
                     if each.verdict == verdict]  # fmt: skip
            if named:
                yield Line(f"{other.name} is {verdict} than {first.name}: {'; '.join(named)}.", tone)
        if not any(each.verdict in ("better", "worse") for each in found):
            yield Line(f"{other.name} against {first.name}: no difference shown in any measure.")


def _runs_table(runs: Sequence[ComparedRun]) -> Table:
    def row(each: ComparedRun) -> tuple[str, ...]:
        shipped, verified, tuned = shipped_file(each.run.exported), each.run.verified, each.tuned
        against_base = ""
        if tuned is not None and each.run.evaluated is not None:
            against_base = show_verdict(comparison_of(each.run.evaluated, tuned.model, "answer_perplexity"))
        return (
            each.name,
            "" if shipped is None else shipped.quantization,
            "" if shipped is None else byte_size(shipped.size_bytes),
            "not verified" if verified is None else "passed" if is_verified(verified) else "FAILED",
            "" if verified is None else f"{verified.top1_agreement:.2%}",
            against_base,
        )

    header = (
        "Run", "Type", "Size", "Verification", "Same likeliest token as trained", "Perplexity of the answer",
    )  # fmt: skip
    return Table(header, "llrlrl", tuple(map(row, runs)))


def _settings_section(runs: Sequence[ComparedRun], settings: dict[str, list[Any]]) -> Section:
    title = "What differs in the configuration"
    if not settings:
        return Section(title, ("Nothing but the name.",))
    rows = tuple((key, *("" if value is None else str(value) for value in values)) for key, values in settings.items())
    return Section(title, tables=(Table(("Setting", *_names(runs)), "l" * (len(runs) + 1), rows),))


def _training_section(runs: Sequence[ComparedRun]) -> Section | None:
    trained = [(each.name, each.run.trained) for each in runs if each.run.trained is not None]
    if not trained:
        return None
    rows = tuple(
        (
            name,
            str(result.steps),
            f"{result.train_loss[-1].loss:.3f}" if result.train_loss else "",
            f"{result.eval_loss_before:.3f}",
            f"{result.eval_loss_after:.3f}",
            duration(result.train_seconds),
            f"{result.trainable_parameters:,}",
        )
        for name, result in trained
    )
    header = (
        "Run", "Steps", "Last training loss", "Held-out loss before", "After", "Time", "Trainable parameters",
    )  # fmt: skip
    curves = {name: result.train_loss for name, result in trained if result.train_loss}
    charts = (Chart(loss_curves(curves, runs[0].name), describe_losses(curves)),) if curves else ()
    note = "Losses in nats a token; held-out ones can be compared where runs have the same held-out records."
    return Section("Training", tables=(Table(header, "lrrrrrr", rows, note),), charts=charts)


def _evaluation_section(runs: Sequence[ComparedRun], differences: Sequence[RunDifference]) -> Section | None:
    evaluated = [(each.name, each.tuned) for each in runs if each.tuned is not None]
    if not evaluated:
        return None
    verdicts = {(each.run, each.metric): each.verdict for each in differences}

    def cell(metric: Metric, name: str, model: ModelEvaluation) -> str:
        verdict = verdicts.get((name, metric.key))
        return show(metric, value_of(model, metric.key)) + (f": {verdict}" if verdict else "")

    rows = tuple(
        (metric.name, *(cell(metric, name, model) for name, model in evaluated if model is not None))
        for metric in METRICS
        if any(model is not None and value_of(model, metric.key) is not None for _, model in evaluated)
    )
    note = (
        f"The tuned models; in brackets the 95 % interval. Verdicts are against {runs[0].name} and need the same "
        "held-out records and intervals that do not overlap, which is stricter than a paired test."
    )
    names = tuple(name for name, _ in evaluated)
    return Section("Evaluation", tables=(Table(("Measure", *names), "l" + "r" * len(names), rows, note),))


def _speed_section(runs: Sequence[ComparedRun]) -> Section | None:
    measured = [
        (each.name, speed, each.run.benchmarked.machine)
        for each in runs
        if each.run.benchmarked is not None
        and (speed := speed_of(each.run.benchmarked, shipped_file(each.run.exported))) is not None
    ]
    if not measured:
        return None
    rows = tuple(
        (
            name,
            speed.model,
            f"{statistics.fmean(speed.prompt_tokens_per_second):,.0f}",
            f"{statistics.fmean(speed.generated_tokens_per_second):,.1f}",
            seconds(statistics.median(speed.time_to_first_token_seconds)),
            byte_size(speed.peak_memory_bytes),
            machine,
        )
        for name, speed, machine in measured
    )
    header = (
        "Run", "File", "Prompt, tokens/s", "Generation, tokens/s", "First token", "Peak memory", "Machine",
    )  # fmt: skip
    several = len({machine for *_, machine in measured}) > 1
    note = "Measured on different machines: the files' speeds cannot be compared." if several else ""
    return Section("Speed and memory", tables=(Table(header, "llrrrrl", rows, note),))


def _stages_table(runs: Sequence[ComparedRun]) -> Table:
    def row(stage: str) -> tuple[str, ...]:
        states = [each.run.states[stage] for each in runs]
        return (stage, *(f"{state.name}: {state.reason}" if state.reason else state.name for state in states))

    return Table(("Stage", *_names(runs)), "l" * (len(runs) + 1), tuple(map(row, STAGES)))


def _names(runs: Sequence[ComparedRun]) -> tuple[str, ...]:
    return tuple(each.name for each in runs)
