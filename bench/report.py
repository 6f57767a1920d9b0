"""From the stages' measurements to one HTML and one Markdown file and a model card. No stage imports this module.

All files render one ``Page``, so they cannot say different things; a stage without a finished artifact is named as
such. What is measured, ``pipeline/results.py`` says.
"""

from __future__ import annotations

from pathlib import Path

from bench.model_card import model_card
from bench.page import Page, Section, render
from bench.run_folder import Run
from bench.sections.data import data_section
from bench.sections.decision import decide
from bench.sections.evaluation import evaluation_section
from bench.sections.files import files_section
from bench.sections.provenance import provenance_section
from bench.sections.samples import samples_section
from bench.sections.speed import speed_section
from bench.sections.stages import stages_section
from bench.sections.training import training_section
from bench.sections.verification import verification_section
from pipeline.artifacts import write_text
from pipeline.config import Config
from pipeline.results import Report

CARD_NAME = "MODEL_CARD.md"


def report(config: Config, inputs: dict[str, Path], out_dir: Path) -> Report:
    """The stage: ``report.html`` (self-contained, works offline), ``report.md`` and ``MODEL_CARD.md``."""
    run = Run(inputs)
    page = build_page(config, run)
    texts = {name: render(f"{name}.j2", page=page) for name in ("report.html", "report.md")}
    texts[CARD_NAME] = model_card(config, run, page)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(out_dir / name, text)
    return Report(files=list(texts))


def build_page(config: Config, run: Run) -> Page:
    sections = [
        files_section(run.exported),
        evaluation_section(run.evaluated),
        verification_section(run.verified),
        speed_section(run.benchmarked),
        training_section(run.trained, config.report.reference_runs),
        data_section(run.prepared),
        samples_section(run.evaluated),
        stages_section(run),
        Section("Configuration", code=config.to_yaml(), folded=True),
        provenance_section(run),
    ]
    return Page(
        name=config.name,
        decision=tuple(decide(run)),
        disclaimer=disclaimer(config),
        sections=tuple(section for section in sections if section is not None),
    )


def disclaimer(config: Config) -> str:
    text = "A research tool, not medical advice: nothing here may guide the care of a patient."
    if config.data.source == "sample":
        text += " The cases are synthetic and no clinician has reviewed them."
    return text
