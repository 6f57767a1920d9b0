"""The model card of a run: what the GGUF is, what it was made of, how good it is and what it must not be used for.

Tables are the report's. The front matter follows https://huggingface.co/docs/hub/model-cards; a key whose value medcot
does not know is left out, never guessed. A card is meant to be published, so paths of this machine stay out of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

import yaml

from bench.card_use import Repository, use_commands, use_notes
from bench.page import Page, Section, Table, percent, render
from bench.private_paths import public_name
from bench.run_folder import Run
from bench.sections.decision import not_benchmarked, not_evaluated
from bench.sections.evaluation import CHOICE_TITLE, COMPARISON_TITLE
from bench.sections.quality import TITLE as QUALITY_TITLE
from bench.sections.speed import TITLE as SPEED_TITLE
from pipeline.base_model import PACKAGE_PREFIX
from pipeline.cache import cache_dir
from pipeline.config import Config
from pipeline.results import Verification

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE_ID = re.compile(r"[a-z0-9.-]+")  # as in the hub's list; GGUF's general.license is free text


@dataclass(frozen=True)
class Part:
    """A heading of the card with its sentences, bullet points, tables and code."""

    title: str
    text: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    code: tuple[tuple[str, str, str], ...] = ()  # what it is for, language, text


def model_card(config: Config, run: Run, page: Page, repository: Repository | None = None) -> str:
    """The card as Markdown; a stage without a result is said to have none. ``repository`` is where it is published."""
    public = _without_paths(config)
    parts = (
        _files(run, page, repository),
        _use(public, run, repository),
        _data(config, run, page),
        _training(public, run, page),
        _evaluation(run, page),
        _verification(run, page),
        _speed(run, page),
        _limits(config, run),
        _licence(config, run),
        _reproduction(public, page),
    )
    return render(
        "model_card.md.j2",
        front_matter=yaml.safe_dump(_front_matter(config, run), sort_keys=False, allow_unicode=True),
        name=config.name,
        summary=_summary(public, run),
        disclaimer=page.disclaimer,
        decision=page.decision,
        parts=parts,
    )


def _front_matter(config: Config, run: Run) -> dict[str, Any]:
    sample = config.data.source == "sample"
    tags = ["gguf", "medical", "lora", "medcot"]
    if run.prepared is not None and run.prepared.with_reasoning:
        tags[2:2] = ["reasoning", "chain-of-thought"]
    if sample:
        tags.append("synthetic-data")
    values = {
        "license": _base_license(config.model.base),
        "language": _language(config),
        "base_model": _hub_id(config.model.base, run, "base"),
        "base_model_relation": "finetune" if _hub_id(config.model.base, run, "base") else None,
        "datasets": [found] if (found := _hub_id(config.data.source, run, "records")) else None,
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    return {key: value for key, value in values.items() if value}


def _language(config: Config) -> list[str] | None:
    """The data's language, where its name or origin tells: the sample is English, ``data.config`` may be a code."""
    if config.data.source == "sample":
        return ["en"]
    code = config.data.config or ""
    return [code] if re.fullmatch(r"[a-z]{2}", code) else None


def _hub_id(name: str, run: Run, key: str) -> str | None:
    """``name`` if a stage fetched it from the hub under that name, as its manifest says."""
    recorded = (artifact.manifest.config.get(key) for artifact in run.artifacts.values())
    on_hub = any(isinstance(each, dict) and each.get("hub") == name for each in recorded)
    return name if on_hub and _HUB_ID.fullmatch(name) else None


def _base_license(base: str) -> str | None:
    """What a base inside a Python package says in its own GGUF; it was noted when that was converted."""
    if not base.startswith(PACKAGE_PREFIX):
        return None
    for note in sorted(cache_dir().glob(f"base/{escape(Path(base).stem)}-*/source.json")):
        name = json.loads(note.read_text(encoding="utf-8")).get("license")
        if isinstance(name, str) and _LICENSE_ID.fullmatch(name):
            return name
    return None


def _without_paths(config: Config) -> Config:
    model = config.model.model_copy(update={"base": public_name(config.model.base)})
    data = config.data.model_copy(update={"source": public_name(config.data.source)})
    export = config.export.model_copy(update={"imatrix": public_name(config.export.imatrix)})
    return config.model_copy(update={"model": model, "data": data, "export": export})


def _summary(config: Config, run: Run) -> str:
    what = "medical questions"
    if run.prepared is not None and run.prepared.with_reasoning:
        what = "medical questions with written-out reasoning, so that it thinks between <think> and </think> first"
    return (
        f"{config.name} is {config.model.base}, fine-tuned with LoRA by medcot on {what}. "
        "It comes as GGUF files for llama.cpp and everything built on it."
    )


def _files(run: Run, page: Page, repository: Repository | None) -> Part:
    part = _part(page.section("What was made"), "Files", "There is no GGUF yet: the export stage has not finished.")
    text = part.text if run.exported is None else (*part.text, *run.exported.warnings)
    if repository is not None:
        here = f"In this repository: {', '.join(repository.ggufs)}."
        made = [] if run.exported is None else [file.name for file in run.exported.files]
        if set(made) - set(repository.ggufs):
            here += " The tables name other files too: they were made and measured, and not published."
        text = (here, *text)
    return replace(part, text=text)


def _use(config: Config, run: Run, repository: Repository | None) -> Part:
    if run.exported is None:
        return Part("Use", ("There is nothing to use yet.",))
    return Part("Use", use_notes(config), code=use_commands(config, run.exported.ship, repository))


def _data(config: Config, run: Run, page: Page) -> Part:
    section, data = page.section("Data"), run.prepared
    if section is None or data is None:
        return Part("Training data", ("Nothing is known of the data: the prepare stage has no result.",))
    source = "medcot's own sample" if config.data.source == "sample" else public_name(config.data.source)
    cleaning = f"Of {data.read:,} records read, {data.train_rows:,} were trained on and {data.eval_rows:,} held out"
    cleaning += f"; {data.rejected:,} were rejected and {sum(data.repaired.values()):,} repairs made."
    # The report's first sentence names the source as it was given, perhaps by a path.
    return Part("Training data", (f"Source: {source}.", cleaning, *section.text[1:]), tables=section.tables)


def _training(config: Config, run: Run, page: Page) -> Part:
    section = page.section("Training")
    lora, training = config.lora, config.training
    length = (
        ("Steps", str(training.max_steps)) if training.max_steps is not None else ("Epochs", f"{training.epochs:g}")
    )
    warmup = f"{training.warmup_steps} steps" if training.warmup_steps else percent(training.warmup_ratio)
    rows: tuple[tuple[str, str], ...] = (
        ("LoRA rank, alpha, dropout", f"{lora.r}, {lora.alpha}, {lora.dropout:g}"),
        ("LoRA matrices", ", ".join(lora.target_modules)),
        length,
        ("Batch", f"{training.effective_batch} examples a step, {training.batch_size} at once"),
        ("Learning rate", f"{training.learning_rate:g}, {training.schedule}, warm-up {warmup}"),
        ("Optimizer", f"{training.optimizer}, weight decay {training.weight_decay:g}"),
        ("Longest example", f"{config.model.max_seq_length:,} tokens"),
        ("Seed", str(config.seed)),
    )
    settings = Table(("Hyperparameter", "Value"), "ll", rows)
    if section is None:
        return Part("Training", ("The train stage has no result; it is configured so:",), tables=(settings,))
    # Without the base, which may be a path here; the card's first sentence names it.
    measured = [replace(each, rows=tuple(row for row in each.rows if row[0] != "Base")) for each in section.tables]
    text = (
        "The loss is the mean negative log-likelihood of the thought's and answer's tokens (nats); prompts have none."
    )
    return Part("Training", (text, *(chart.text for chart in section.charts)), tables=(settings, *measured))


def _evaluation(run: Run, page: Page) -> Part:
    section = page.section(COMPARISON_TITLE) or page.section("Evaluation")
    part = _part(section, "Evaluation", not_evaluated(run).text)
    return _with(part, page.section(CHOICE_TITLE))


def _speed(run: Run, page: Page) -> Part:
    part = _part(page.section(SPEED_TITLE), "Speed", not_benchmarked(run).text)
    return _with(part, page.section(QUALITY_TITLE))


def _verification(run: Run, page: Page) -> Part:
    section = page.section("Verification")
    part = _part(section, "Verification", "Not verified: nothing shows yet that the GGUF says what was trained.")
    if run.verified is None or not run.verified.files:
        return part
    # The report's tables, but for the one of the predictions, which the card shows with all its figures.
    return replace(part, tables=(*part.tables[-1:], _quantization_loss(run.verified)))


def _quantization_loss(verified: Verification) -> Table:
    rows = tuple(
        (file.name, file.reference, f"{file.positions:,}", f"{file.mean_kl:.4f}", f"{file.p99_kl:.4f}",
         percent(file.top1_agreement))
        for file in verified.files
    )  # fmt: skip
    header = ("File", "Compared with", "Positions", "KL, mean", "KL, 99 %", "Same most likely token")
    note = "KL is the Kullback-Leibler divergence of the next-token probabilities (nats a token); 0 is no loss."
    return Table(header, "llrrrr", rows, note)


def _limits(config: Config, run: Run) -> Part:
    points = [
        "It invents facts, doses and sources, and says them with confidence. Check every statement elsewhere.",
        "Its written reasoning need not be the reason for its answer.",
        "The evaluation measures how well it follows data of the kind it was trained on, and the form of its answers; "
        "no one has judged whether the answers are right.",
        "It has the biases and gaps of its base model and of its data; other languages, places, ages and illnesses "
        "than the data's were not looked at.",
        "It has not been tried against misuse, and nothing is filtered.",
    ]
    if config.data.source == "sample":
        points.append("The training cases are invented, few, and no clinician has reviewed them: they show that the "
                      "pipeline works, and teach no medicine.")  # fmt: skip
    if run.evaluated is not None and run.evaluated.models:
        measured = [model.answer_perplexity or model.perplexity for model in run.evaluated.models]
        n = min(0 if estimate is None else estimate.n for estimate in measured)
        points.append(f"The evaluation has {n} records; differences inside its intervals are not differences.")
    return Part("Limits", points=tuple(points))


def _licence(config: Config, run: Run) -> Part:
    known = _base_license(config.model.base)
    base = _hub_id(config.model.base, run, "base")
    model = f"The base model's licence is {known}" if known else "medcot does not know the base model's licence"
    where = f"https://huggingface.co/{base}" if base else "the base model"
    weights = f"{model}. It holds for these weights too: see {where}."
    if config.data.source == "sample":
        return Part("Licence", (weights, "The training data is part of medcot and under its MIT licence."))
    data = "medcot does not know the licence of the training data: check that it allows what you do with the weights."
    return Part("Licence", (weights, data))


def _reproduction(config: Config, page: Page) -> Part:
    versions = page.section("Versions and hashes")
    return Part(
        "Reproduce",
        ("With the configuration below as config.yaml; each package's version is the one it was made with.",),
        tables=versions.tables[:1] if versions is not None else (),
        code=(("Command", "sh", "medcot run config.yaml"), ("Configuration", "yaml", config.to_yaml().rstrip())),
    )


def _part(section: Section | None, title: str, otherwise: str) -> Part:
    return Part(title, (otherwise,)) if section is None else Part(title, section.text, tables=section.tables)


def _with(part: Part, section: Section | None) -> Part:
    if section is None:
        return part
    return replace(part, text=(*part.text, *section.text), tables=(*part.tables, *section.tables))
