"""What a GPU was checked and measured to do: the typed document of ``tests/gpu/run.sh``, and the README's table of it.

python -m bench.gpu_results                     the table of bench/results/*.json, as Markdown
python -m bench.gpu_results --write README.md   the same, put between the README's two markers
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click
from pydantic import Field, ValidationError

from pipeline.artifacts import write_text
from pipeline.errors import MedcotError
from pipeline.results import Check, Measurement

SCHEMA_VERSION = 1
RESULTS_DIR = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- gpu-results -->", "<!-- /gpu-results -->"
PLANNED = ", planned"  # ends the name of a figure that the plan gave for the one of the same name without it
NOT_RUN = "It has not run on a GPU yet."
Status = Literal["passed", "failed", "skipped", "unfinished"]


class Figure(Measurement):
    """A measured number; ``unit`` may be empty for a ratio or a loss."""

    name: str
    value: float
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.name} {_number(self.value)}{' ' + self.unit if self.unit else ''}"


class PartResult(Measurement):
    """One part of the script: ``failed`` when a check failed or the part broke, ``skipped`` when it was not begun,
    ``unfinished`` when its time was up: what it had measured until then stays."""

    part: str
    title: str
    status: Status
    reason: str | None = Field(default=None, description="Why it was not passed.")
    seconds: float = 0.0
    checks: tuple[Check, ...] = ()
    figures: tuple[Figure, ...] = ()


class GpuMachine(Measurement):
    """``gpu`` and what belongs to it are None in a rehearsal on a machine without one."""

    gpu: str | None
    gpu_memory_bytes: int | None
    compute_capability: str | None
    driver: str | None
    cpu: str
    cores: int
    memory_bytes: int


class GpuResults(Measurement):
    schema_version: Literal[1]
    created: str
    rehearsal: bool = Field(description="On the CPU with tiny shapes: its figures say nothing about a GPU.")
    machine: GpuMachine
    versions: dict[str, str]
    commit: str | None
    command: str
    seconds: float
    parts: list[PartResult]

    @property
    def exit_status(self) -> int:
        """3 when a check failed, as a missed gate has; 1 when no part came through; else 0."""
        statuses = {part.status for part in self.parts}
        if "failed" in statuses:
            return 3
        return 0 if "passed" in statuses else 1


def file_name(machine: GpuMachine, only: Sequence[str] = ()) -> str:
    """For example ``nvidia-h100-80gb-hbm3.json``; of a call for some parts only, their names are in it."""
    words = " ".join([machine.gpu or "rehearsal", *only])
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + ".json"


def read_results(path: Path) -> GpuResults:
    """Raises MedcotError when ``path`` is no such document."""
    try:
        return GpuResults.model_validate_json(path.read_bytes())
    except OSError as error:
        raise MedcotError(f"{path} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise MedcotError(
            f"{path} holds no GPU results of schema {SCHEMA_VERSION} ({where}: {first['msg']}): run tests/gpu/run.sh."
        ) from error


def outcome(part: PartResult) -> str:
    """The word and, where there is one, its reason."""
    return part.status if part.reason is None else f"{part.status}: {part.reason}"


def measured(figures: Sequence[Figure]) -> list[str]:
    """Each figure as text, and in it the one that was planned, which goes by its name and ``PLANNED``."""
    names = {figure.name for figure in figures}
    planned = {figure.name: _number(figure.value) for figure in figures}
    return [
        f"{figure} (planned {planned[figure.name + PLANNED]})" if figure.name + PLANNED in names else str(figure)
        for figure in figures
        if not (figure.name.endswith(PLANNED) and figure.name.removesuffix(PLANNED) in names)
    ]


def markdown(documents: Sequence[GpuResults]) -> str:
    """A table for each GPU, or the sentence that there is none; raises MedcotError for a rehearsal."""
    if not documents:
        return NOT_RUN
    return "\n\n".join(_table(document) for document in documents)


def _table(document: GpuResults) -> str:
    machine = document.machine
    if document.rehearsal or machine.gpu is None:
        raise MedcotError("A rehearsal says nothing about a GPU: keep its file out of bench/results.")
    memory = "" if machine.gpu_memory_bytes is None else f", {machine.gpu_memory_bytes / 2**30:.0f} GiB"
    head = (
        f"{machine.gpu}{memory}, driver {machine.driver}, PyTorch {document.versions.get('torch', 'unknown')}, "
        f"{document.created[:10]}, {document.seconds:.0f} s in all"
    )
    rows = [
        f"| {_cell(part.title)} | {_cell(outcome(part))} | {_cell('; '.join(measured(part.figures)) or '-')} |"
        for part in document.parts
    ]
    return "\n".join([f"{head}:", "", "| part | outcome | measured |", "| --- | --- | --- |", *rows])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float) -> str:
    """Three significant digits, whole from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def put_between_markers(text: str, table: str, name: str) -> str:
    """``text`` with the table in place of what stood between the markers; raises MedcotError without them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MedcotError(f"{name} has no {BEGIN} followed by {END}: add them where the table is to stand.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--write", "target", type=click.Path(path_type=Path), help="Put the table into this file.")
def main(files: tuple[Path, ...], target: Path | None) -> None:
    """Show FILES (default: bench/results/*.json) as a Markdown table.

    Example: python -m bench.gpu_results --write README.md
    """
    try:
        table = markdown([read_results(path) for path in files or sorted(RESULTS_DIR.glob("*.json"))])
        if target is None:
            click.echo(table)
            return
        try:
            text = target.read_text(encoding="utf-8")
        except OSError as error:
            raise MedcotError(f"{target} cannot be read: {error.strerror}.") from error
        write_text(target, put_between_markers(text, table, target.name))
    except MedcotError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
