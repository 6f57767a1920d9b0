"""``medcot report RUN...``: one run's report again, or several runs on one page."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from bench.report import report_run, write_report
from bench.report_document import RunReport
from bench.run_comparison import ComparisonReport, comparison, open_runs
from bench.run_folder import open_run
from pipeline.errors import MedcotError
from pipeline.run import locked, stage_named, start_again

COMPARISON_FOLDER = Path("comparison")


def report_runs(folders: Sequence[Path], out: Path | None) -> tuple[Path, RunReport | ComparisonReport]:
    """Gives the path of the page and what ``report.json`` holds. Raises MedcotError."""
    if out is not None and out.exists() and not out.is_dir():
        raise MedcotError(f"{out} is a file: name a folder for the report.")
    if len(folders) > 1:
        page, document = comparison(open_runs(folders))
        folder = out or COMPARISON_FOLDER
        write_report(page, document, folder)
        return folder / "report.html", document
    [run_dir] = folders
    config, run = open_run(run_dir)
    inside = run_dir / stage_named("report").folder
    folder = out or inside
    # Inside the run it takes the stage's place; the next run makes that artifact again.
    with locked(run_dir) if folder.resolve() == inside.resolve() else nullcontext():
        if folder.resolve() == inside.resolve():
            start_again(folder)
        _, written = report_run(config, run, folder)
    return folder / "report.html", written
