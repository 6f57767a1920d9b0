"""Several runs beside each other: what differs in their settings, and in what was measured.

    medcot report runs/a runs/b --out comparison

Evaluations are compared record by record with the first run's, where both were on the same records.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from bench.evaluation_summary import Measured, compare
from bench.loss_chart import describe_losses, loss_curves
from bench.page import Chart, Line, Page, Section, Table, Tone, byte_size, duration, percent
from bench.record_outcome import RecordOutcome
from bench.report import build_page, disclaimer
from bench.report_document import FORMAT, SCHEMA_NAME, RunReport, Sentence, run_report, sentences
from bench.run_folder import STAGES, Run, open_run
from bench.sections.decision import is_verified, shipped_file, speed_of
from bench.sections.evaluation import comparison_of, show, show_difference, show_verdict, tuned_model, value_of
from bench.sections.speed import seconds
from bench.stored_outcomes import stored_outcomes
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.metrics import METRIC_BY_KEY, METRICS
from pipeline.prepare import EVAL_FILE
from pipeline.results import Comparison, Measurement, ModelEvaluation, Verdict


class ComparisonReport(Measurement):
    """Several runs; ``differences`` are from the first."""

    model_config = ConfigDict(title="Comparison of several medcot runs", populate_by_name=True)
    schema_name: str = Field(default=SCHEMA_NAME, alias="$schema")
    format: int = FORMAT
    kind: Literal["comparison"] = "comparison"
    decision: list[Sentence]
    disclaimer: str
    settings: dict[str, list[Any]] = Field(description="Dotted key -> its value in each run, where they differ.")
    differences: list[Comparison] = Field(description="``model`` and ``reference`` are names of runs.")
    not_compared: dict[str, str] = Field(description="Run -> why its evaluation is not compared with the first's.")
    runs: list[RunReport]


_TONES: dict[Verdict, Tone] = {"better": "good", "worse": "bad"}


@dataclass(frozen=True)
class ComparedRun:
    name: str
    config: Config
    run: Run

    @property
    def tuned(self) -> ModelEvaluation | None:
        return None if self.run.evaluated is None else tuned_model(self.run.evaluated, self.run.exported)

    @cached_property  # a GGUF is hashed for them
    def outcomes(self) -> list[RecordOutcome]:
        """Of the held-out records, in order; raises MedcotError when they cannot be had."""
        stages = [self.run.artifacts.get(stage) for stage in ("prepare", "export", "evaluate")]
        prepared, exported, evaluated = stages
        if prepared is None or exported is None or evaluated is None or self.tuned is None:
            raise MedcotError(f"{self.name} has no finished evaluation")
        gguf = exported.path / self.tuned.model
        stored = stored_outcomes(self.config, prepared.path, gguf, evaluated.path, evaluated.result)
        if not stored:
            raise MedcotError(f"{self.name}'s evaluation ended before a record was answered")
        return [outcome for _, outcome in stored]

    @property
    def held_out(self) -> tuple[str, ...]:
        """What two evaluations must have in common to be compared: the held-out file and how it was used."""
        prepared, evaluation = self.run.artifacts.get("prepare"), self.config.evaluation
        files = [] if prepared is None else prepared.manifest.files
        hashes = [record.sha256 for record in files if record.path == EVAL_FILE]
        used = (evaluation.rows, evaluation.choice_rows, evaluation.max_new_tokens, self.config.truncated_at)
        return (*hashes, *map(str, used))


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
    differences, not_compared = _differences(runs)
    sections = [
        Section("Runs", tables=(_runs_table(runs),)),
        _settings_section(runs, settings),
        _training_section(runs),
        _evaluation_section(runs, differences, not_compared),
        _speed_section(runs),
        Section("Stages", tables=(_stages_table(runs),)),
    ]
    page = Page(
        name=" against ".join(each.name for each in runs),
        decision=tuple(_decide(runs, differences, not_compared)),
        disclaimer=disclaimer(*(each.config for each in runs)),
        sections=tuple(section for section in sections if section is not None),
    )
    document = ComparisonReport(
        decision=sentences(page),
        disclaimer=page.disclaimer,
        settings=settings,
        differences=differences,
        not_compared=not_compared,
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


def _differences(runs: Sequence[ComparedRun]) -> tuple[list[Comparison], dict[str, str]]:
    """Paired on the records that both models answered, and for each run that cannot be paired the reason."""
    first, *others = runs
    differences: list[Comparison] = []
    not_compared: dict[str, str] = {}
    for other in others:
        try:
            engines = {each.tuned.engine for each in (first, other) if each.tuned is not None}
            if other.held_out != first.held_out or len(engines) > 1:
                raise MedcotError(f"{first.name} was evaluated on other records or in another way")
            common = min(len(other.outcomes), len(first.outcomes))  # a time limit may have ended one earlier
            ours, theirs = (Measured(each.outcomes[:common], each.outcomes[:common]) for each in (other, first))
            differences += compare(other.name, ours, first.name, theirs, first.config.seed)
        except MedcotError as error:
            not_compared[other.name] = str(error)
    return differences, not_compared


def _decide(
    runs: Sequence[ComparedRun], differences: Sequence[Comparison], not_compared: dict[str, str]
) -> Iterator[Line]:
    for each in runs:
        failed = [f"{stage} {state.name}" for stage, state in each.run.states.items() if state.failed]
        shipped = shipped_file(each.run.exported)
        file = "no GGUF" if shipped is None else f"{shipped.name}, {byte_size(shipped.size_bytes)}"
        good = not failed and each.run.verified is not None and is_verified(each.run.verified)
        verified = "verified" if good else ", ".join(failed) or "not verified"
        yield Line(f"{each.name}: {file}; {verified}.", "good" if good else "bad")
    first = runs[0].name
    for other in runs[1:]:
        if other.name in not_compared:
            yield Line(f"No verdict on {other.name} against {first}: {not_compared[other.name].rstrip('.')}.")
            continue
        shown = False
        for verdict, tone in _TONES.items():
            named = [METRIC_BY_KEY[each.metric].name for each in differences
                     if each.model == other.name and each.verdict == verdict]  # fmt: skip
            if named:
                shown = True
                yield Line(f"{other.name} is {verdict} than {first}: {'; '.join(named)}.", tone)
        if not shown:
            yield Line(f"{other.name} against {first}: no difference shown in any measure.")


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
            "" if verified is None else percent(verified.top1_agreement),
            against_base,
        )

    header = (
        "Run", "Type", "Size", "Verification", "Same likeliest token as trained", "Answer's perplexity, to its base",
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
    charts = (Chart(lambda: loss_curves(curves, runs[0].name), describe_losses(curves)),) if curves else ()
    note = "Losses in nats a token; held-out ones can be compared where runs have the same held-out records."
    return Section("Training", tables=(Table(header, "lrrrrrr", rows, note),), charts=charts)


def _evaluation_section(
    runs: Sequence[ComparedRun], differences: Sequence[Comparison], not_compared: dict[str, str]
) -> Section | None:
    evaluated = [(each.name, tuned) for each in runs if (tuned := each.tuned) is not None]
    if not evaluated:
        return None
    names = tuple(name for name, _ in evaluated)
    rows = tuple(
        (metric.name, *(show(metric, value_of(model, metric.key)) for _, model in evaluated))
        for metric in METRICS
        if any(value_of(model, metric.key) is not None for _, model in evaluated)
    )
    values = Table(("Measure", *names), "l" + "r" * len(names), rows, "In brackets the 95 % interval.", "Tuned models")
    tables = [values]
    for name in names:
        found = [each for each in differences if each.model == name]
        if found:
            tables.append(_differences_table(name, runs[0].name, found))
    text = tuple(f"{name} is not compared: {reason.rstrip('.')}." for name, reason in not_compared.items())
    return Section("Evaluation", text, tuple(tables))


def _differences_table(name: str, first: str, differences: Sequence[Comparison]) -> Table:
    rows = tuple(
        (
            METRIC_BY_KEY[each.metric].name,
            show_difference(METRIC_BY_KEY[each.metric], each),
            each.verdict,
            f"{each.n:,}",
        )
        for each in differences
    )
    note = (
        f"{name} minus {first} on the same records; where the 95 % interval contains zero no difference is shown. Each "
        "run was trained once: the intervals tell what other records could change, not what another seed could."
    )
    header = ("Measure", "Difference", "Verdict", "Records")
    return Table(header, "lrlr", rows, note, f"{name} against {first}")


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
