"""A sweep's table as Markdown, self-contained HTML and JSON: ``sweep.md``, ``sweep.html``, ``sweep.json``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table as ConsoleTable

from bench.loss_chart import describe_losses, loss_curves
from bench.page import Chart, Line, Page, Section, Table, byte_size, duration, render
from bench.statistics import LEAST_RECORDS
from bench.sweep_charts import compared, describe_differences, differences_chart, loss_points
from bench.sweep_comparison import MEASURES, Difference, Measure
from bench.sweep_result import ExperimentRow, SweepResult
from pipeline.artifacts import write_json, write_text
from pipeline.sweep_file import RESULT_STEM

_BEST = " (best)"
_DISCLAIMER = "A research tool, not medical advice: nothing here may guide the care of a patient."


def write_result(result: SweepResult, out: Path) -> list[Path]:
    """The three files in ``out``; gives their paths."""
    page = build_page(result)
    paths = [out / f"{RESULT_STEM}.{ending}" for ending in ("html", "md", "json")]
    write_text(paths[0], render("report.html.j2", page=page))
    write_text(paths[1], render("report.md.j2", page=page))
    write_json(paths[2], result.model_dump(mode="json"))
    return paths


def print_result(result: SweepResult) -> None:
    """What was measured, for a terminal's width, and the decision, on standard output."""
    shown = ConsoleTable("experiment")
    for name in ("train loss", *(measure.name for measure in MEASURES), "time", "peak memory"):
        shown.add_column(name, justify="right")
    for row in result.experiments:
        figures = row.figures
        if figures is None:
            shown.add_row(row.name, "failed")
        else:
            measures = (_value(row, measure) for measure in MEASURES)
            time, memory = duration(figures.train_seconds), byte_size(figures.peak_memory_bytes)
            shown.add_row(row.name, _loss(figures.train_loss), *measures, time, memory)
    console = Console()
    console.print(shown)
    for line in decide(result):
        console.print(line.text, highlight=False, markup=False, soft_wrap=True)


def build_page(result: SweepResult) -> Page:
    sections = [
        Section("Experiments", tables=(experiments_table(result), cost_table(result))),
        _differences_section(result),
        _losses_section(result),
    ]
    return Page(
        name=f"sweep {result.name}",
        decision=tuple(decide(result)),
        disclaimer=_DISCLAIMER,
        sections=tuple(section for section in sections if section is not None),
    )


def decide(result: SweepResult) -> list[Line]:
    """Whether all is there, and for each measure the best experiment and whether it is shown to be better."""
    failed = [row.name for row in result.experiments if row.state == "failed"]
    done = f"{len(result.experiments) - len(failed)} of {len(result.experiments)} experiments are done"
    lines = [Line(f"{done}; failed: {', '.join(failed)}.", "bad") if failed else Line(f"{done}.", "good")]
    by_name = {row.name: row for row in result.experiments}
    for measure in MEASURES:
        if measure.key not in result.best:
            continue
        best = by_name[result.best[measure.key]]
        value = _value(best, measure)
        if best.name == result.primary:
            lines.append(Line(f"{measure.name}: {_named(best, result)} has the best value, {value}."))
        else:
            difference = best.differences[measure.key]
            lines.append(
                Line(
                    f"{measure.name}: {best.name} has the best value, {value}; against {result.primary}: "
                    f"{difference.verdict}, {_interval(difference)}.",
                    "good" if difference.verdict == "better" else "neutral",
                )
            )
    return lines


def experiments_table(result: SweepResult) -> Table:
    header = (
        "Experiment", "Learning rate", "Rank and alpha", "Epochs made", "Effective batch", "Train loss",
        "Held-out loss", "ROUGE-L", "BLEU-4",
    )  # fmt: skip

    def row(experiment: ExperimentRow) -> tuple[str, ...]:
        lora, batch = f"{experiment.rank}, {experiment.alpha}", str(experiment.effective_batch)
        settings = (_named(experiment, result), f"{experiment.learning_rate:g}", lora)
        figures = experiment.figures
        if figures is None:
            return (*settings, "", batch, "FAILED", *[""] * len(MEASURES))
        measures = (
            _value(experiment, measure) + (_BEST if result.best.get(measure.key) == experiment.name else "")
            for measure in MEASURES
        )
        return (
            *settings,
            f"{figures.epochs:.3g}",
            batch,
            _loss(figures.train_loss),
            *measures,
        )

    note = "Train loss: mean of the last tenth of the logged steps. Loss in nats a token. "
    if result.held_out_records is not None:
        note += (
            f"Held-out loss, ROUGE-L and BLEU-4 ({result.bleu_signature}) are measured on {result.held_out_records} "
            f"held-out records that the exported files ({result.quantization}) answered greedily; the text metrics "
            "compare the answer behind the thought with the reference. "
        )
    note += "Best marks the best value, whether or not a difference is shown."
    return Table(header, "l" + "r" * (len(header) - 1), tuple(map(row, result.experiments)), note)


def cost_table(result: SweepResult) -> Table:
    """A table of its own: all columns in one would be wider than a page."""
    header: tuple[str, ...] = (
        "Experiment", "What it changes", "Trainable parameters", "Training time", "Peak memory", "Why it failed",
    )  # fmt: skip

    def row(experiment: ExperimentRow) -> tuple[str, ...]:
        figures = experiment.figures
        cost = ("", "", "")
        if figures is not None:
            time, memory = duration(figures.train_seconds), byte_size(figures.peak_memory_bytes)
            cost = (f"{figures.trainable_parameters:,}", time, memory)
        changes = ", ".join(f"{key} = {value}" for key, value in experiment.changes.items())
        return (experiment.name, changes or "nothing", *cost, experiment.failure or "")

    note = "Peak memory: of the training process, in the machine's memory."
    rows, align = tuple(map(row, result.experiments)), "llrrrl"
    if not any(failure for *_, failure in rows):
        header, align, rows = header[:-1], align[:-1], tuple(row[:-1] for row in rows)
    return Table(header, align, rows, note)


def _differences_section(result: SweepResult) -> Section | None:
    rows = compared(result)
    left_out = [
        f"{row.name} is not compared: {row.not_compared}."
        for row in result.experiments
        if row.not_compared and row.name != result.primary
    ]
    title = f"Against {result.primary}"
    if not rows:
        return Section(title, tuple(left_out)) if left_out else None
    table = Table(
        ("Experiment", *(cell for measure in MEASURES for cell in (measure.name, "Verdict"))),
        "l" + "rl" * len(MEASURES),
        tuple(
            (
                row.name,
                *(
                    cell
                    for measure in MEASURES
                    for cell in (_interval(row.differences[measure.key]), row.differences[measure.key].verdict)
                ),
            )
            for row in rows
        ),
        f"Experiment minus {result.primary} on the same {result.held_out_records} held-out records, paired bootstrap "
        f"over records. The {result.comparisons} intervals hold together with {result.joint_confidence:.0%} confidence "
        "(Bonferroni). Where one contains zero no difference is shown, and on fewer than "
        f"{LEAST_RECORDS} records none is looked for. Each experiment was trained once: the intervals tell what other "
        "held-out records could change, not what another seed could.",
    )
    chart = Chart(lambda: differences_chart(result), describe_differences(result))
    return Section(title, tuple(left_out), (table,), (chart,))


def _losses_section(result: SweepResult) -> Section | None:
    curves = loss_points(result)
    if not curves:
        return None
    chart = Chart(lambda: loss_curves(curves, result.primary), describe_losses(curves))
    return Section("Training loss", charts=(chart,))


def _named(row: ExperimentRow, result: SweepResult) -> str:
    says_so = row.name == "primary"
    return f"{row.name} (primary)" if row.name == result.primary and not says_so else row.name


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}"


def _value(row: ExperimentRow, measure: Measure) -> str:
    return "" if row.figures is None else f"{getattr(row.figures, measure.key):.3f}"


def _interval(difference: Difference) -> str:
    return f"{difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"
