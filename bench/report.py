"""From the stages' measurements to one HTML, one Markdown and one JSON file and a model card.

    medcot report runs/smollm2-cpu

No stage imports this module. All files render one ``Page``, so they cannot say different things; a stage without a
finished artifact is named as such. ``bench/report_document.py`` describes the JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.model_card import model_card
from bench.page import Page, Section, render
from bench.report_document import SCHEMA_NAME, RunReport, run_report
from bench.run_folder import Run
from bench.sections.data import data_section
from bench.sections.decision import decide
from bench.sections.evaluation import choice_section, evaluation_section
from bench.sections.files import files_section
from bench.sections.provenance import provenance_section
from bench.sections.quality import quality_section
from bench.sections.samples import samples_sections
from bench.sections.speed import speed_section
from bench.sections.stages import stages_section
from bench.sections.training import training_section
from bench.sections.verification import verification_section
from pipeline.artifacts import write_text
from pipeline.config import Config
from pipeline.results import Measurement, Report

CARD_NAME = "MODEL_CARD.md"


def report(config: Config, inputs: dict[str, Path], out_dir: Path) -> Report:
    """The stage: ``report.html`` (self-contained, works offline), ``.md``, ``.json`` with its schema, model card."""
    files, _ = report_run(config, Run(inputs), out_dir)
    return Report(files=files)


def report_run(config: Config, run: Run, out_dir: Path) -> tuple[list[str], RunReport]:
    """Write the report of one run and its model card; gives the files' names and what ``report.json`` holds."""
    page = build_page(config, run)
    card = model_card(config, run, page)
    document = run_report(config, run, page)
    files = write_report(page, document, out_dir)
    write_text(out_dir / CARD_NAME, card)
    return [*files, CARD_NAME], document


def write_report(page: Page, document: Measurement, out_dir: Path) -> list[str]:
    """The page as HTML and Markdown and the document as JSON beside its schema; gives the files' names."""
    texts = report_texts(page, document)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(out_dir / name, text)
    return list(texts)


def report_texts(page: Page, document: Measurement) -> dict[str, str]:
    """The report's files by their names."""
    schema = type(document).model_json_schema(mode="serialization")
    return {
        "report.html": render("report.html.j2", page=page),
        "report.md": render("report.md.j2", page=page),
        "report.json": document.model_dump_json(indent=2, by_alias=True) + "\n",
        SCHEMA_NAME: json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
    }


def build_page(config: Config, run: Run) -> Page:
    sections = [
        files_section(run.exported),
        evaluation_section(run.evaluated),
        choice_section(run.evaluated),
        verification_section(run.verified),
        speed_section(run.benchmarked),
        quality_section(run.benchmarked, run.exported),
        training_section(run.trained, config.report.reference_runs),
        data_section(run.prepared),
        *samples_sections(run.evaluated),
        stages_section(run),
        Section("Configuration", code=config.to_yaml()),
        provenance_section(run),
    ]
    return Page(
        name=config.name,
        decision=tuple(decide(run)),
        disclaimer=disclaimer(config),
        sections=tuple(section for section in sections if section is not None),
    )


def disclaimer(*configs: Config) -> str:
    text = "A research tool, not medical advice: nothing here may guide the care of a patient."
    if any(config.data.source == "sample" for config in configs):
        text += " The cases are synthetic and no clinician has reviewed them."
    return text
