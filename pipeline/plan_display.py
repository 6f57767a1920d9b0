"""A plan for people: tables, and one example with its loss mask in colour."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.hardware import GIBIBYTE
from pipeline.plan import Plan


def print_plan(plan: Plan, *, with_example: bool = True) -> None:
    """Print to standard output; the loss mask is green and dim, and bracketed where there is no colour."""
    console = Console(highlight=False)
    console.print(f"Plan of {plan.name} on {plan.platform}", style="bold", markup=False)
    console.print(_facts(plan))
    console.print(_stages(plan))
    if plan.timeline.gguf_seconds is not None:
        console.print(f"GGUF after about {_duration(plan.timeline.gguf_seconds)}", style="bold", markup=False)
    if with_example and plan.example:
        console.print(_example(plan, console.color_system is not None))
    for note in plan.notes:
        console.print(f"Note: {note}.", markup=False)
    style = "red" if plan.problems else "green"
    console.print(Text(f"Labels: {plan.verdict}.", style=style if "in the loss" in plan.verdict else "red"))


def _facts(plan: Plan) -> Table:
    survey = plan.survey
    rejected = ", ".join(f"{reason}: {count}" for reason, count in list(survey.reasons.items())[:4])
    rows = [(choice.name, choice.value, choice.reason) for choice in plan.choices]
    rows.append(
        (
            "records",
            f"{plan.workload.train_rows:,} + {plan.workload.eval_rows:,} held out",
            f"{survey.usable:,} of {survey.read:,} read are usable" + (f" ({rejected})" if rejected else ""),
        )
    )
    if survey.tokens is not None:
        tokens = survey.tokens
        rows.append(
            (
                "tokens",
                f"{tokens.median:,.0f} a record",
                f"95 % up to {tokens.p95:,.0f}, longest {tokens.maximum:,.0f}; {plan.tokens_trained:,} in all",
            )
        )
    rows.append(
        (
            "training",
            f"{plan.steps:,} steps",
            f"{plan.trained_parameters:,} of {plan.parameters + plan.trained_parameters:,} parameters are trained",
        )
    )
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value, reason in rows:
        table.add_row(name, Text.assemble((value, "bold"), (f": {reason}", "dim")))
    return table


def _stages(plan: Plan) -> Table:
    table = Table(title="What it will take, about", title_justify="left")
    table.add_column("stage")
    for heading in ("time", "memory", "GPU memory", "disk", "download"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        sizes = (stage.memory_bytes, stage.gpu_memory_bytes, stage.disk_bytes, stage.cache_bytes)
        table.add_row(stage.stage, _duration(stage.seconds), *map(_size, sizes))
    table.add_section()
    known = sum(stage.seconds for stage in plan.stages if stage.seconds is not None)
    table.add_row(
        "in all, most",
        _duration(plan.timeline.seconds or known),
        *(
            _size(max((getattr(stage, name) for stage in plan.stages), default=0))
            for name in ("memory_bytes", "gpu_memory_bytes")
        ),
        *(_size(sum(getattr(stage, name) for stage in plan.stages)) for name in ("disk_bytes", "cache_bytes")),
    )
    there = (plan.memory_bytes, plan.gpu_memory_bytes, plan.disk_bytes, plan.cache_disk_bytes)
    table.add_row("there is", "", *map(_size, there))
    return table


def _example(plan: Plan, coloured: bool) -> Text:
    """What the loss sees is green; without colour it stands between arrows, so that a pipe shows it too."""
    text = Text(
        "\nOne example; " + ("what the loss sees is green" if coloured else "the loss sees what is in ⟦ ⟧") + ":\n"
    )
    for fragment in plan.example:
        opening, closing = ("⟦", "⟧") if fragment.in_loss and not coloured else ("", "")
        text.append(opening + fragment.text + closing, style="green" if fragment.in_loss else "dim")
    text.append("\n")
    return text


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 3570:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def _size(size: int) -> str:
    if size == 0:
        return ""
    return f"{size / GIBIBYTE:.1f} GiB" if size >= 0.1 * GIBIBYTE else f"{max(1, round(size / 2**20))} MiB"
