"""From the stages' measurements to one HTML and one Markdown file and a model card. No stage imports this module.

Only manifests are read (``pipeline/results.py`` says what is in them). All files render one ``Page``, so
they cannot say different things; a stage without a finished artifact is named as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.charts import describe_lengths, describe_loss, length_histograms, loss_curve
from bench.model_card import model_card
from bench.page import STAGES, Line, Page, Run, Section, Table, Tone, byte_size, duration, percent, render, spread
from pipeline.artifacts import write_text
from pipeline.config import Config, ReferenceRun
from pipeline.results import (
    Benchmark,
    Estimate,
    Evaluation,
    ExportedFile,
    ExportedModels,
    FileComparison,
    ModelEvaluation,
    PreparedData,
    Report,
    Speed,
    TrainedAdapter,
    Verification,
)

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
        _files_section(run.exported),
        _evaluation_section(run.evaluated),
        _verification_section(run.verified),
        _speed_section(run.benchmarked),
        _training_section(run.trained, config.report.reference_runs),
        _data_section(run.prepared),
        _samples_section(run.evaluated),
        _stages_section(run),
        Section("Configuration", code=config.to_yaml()),
        _provenance_section(run),
    ]
    return Page(
        name=config.name,
        decision=tuple(decide(run)),
        disclaimer=_disclaimer(config),
        sections=tuple(section for section in sections if section is not None),
    )


def decide(run: Run) -> list[Line]:
    """What the reader came for: which file to use, whether it is what was trained, whether tuning helped."""
    return [_which_file(run), _is_verified(run), *_tuned_against_base(run.evaluated)]


def _which_file(run: Run) -> Line:
    if run.exported is None:
        return Line("There is no GGUF yet: the export stage has not finished.", "bad")
    shipped = next(file for file in run.exported.files if file.name == run.exported.ship)
    size = f"{shipped.quantization}, {byte_size(shipped.size_bytes)}, {shipped.bits_per_weight:.2f} bits per weight"
    if run.verified is not None and not run.verified.passed:
        return Line(f"Do not use {shipped.name} ({size}) before the failed checks below are understood.", "bad")
    return Line(f"Use {shipped.name} ({size}).", "good")


def _is_verified(run: Run) -> Line:
    if run.verified is None:
        return Line("Not verified: nothing shows yet that the GGUF says what the trained model says.", "bad")
    failed = [check.name for check in run.verified.checks if not check.passed]
    if failed or not run.verified.passed:
        return Line(f"Verification failed: {', '.join(failed) or 'see below'}.", "bad")
    return Line(
        f"Verified: all {len(run.verified.checks)} checks passed; the most likely next token agrees with the "
        f"trained model at {percent(run.verified.top1_agreement)} of {run.verified.positions:,} positions.",
        "good",
    )


def _tuned_against_base(evaluation: Evaluation | None) -> list[Line]:
    if evaluation is None:
        return [Line("Not evaluated: whether the tuned model beats its base is not known.", "bad")]
    tuned, base = _by_role(evaluation)
    if tuned is None or base is None:
        return [Line("Only one model was evaluated, so there is no comparison of tuned and base.")]
    lines = []
    for metric in _metrics(tuned, base):
        if metric.decisive:
            verdict, tone = metric.verdict
            numbers = f"{metric.show(metric.tuned)} against {metric.show(metric.base)}"
            lines.append(Line(f"{metric.name}: {verdict}, {numbers}.", tone))
    return lines


@dataclass(frozen=True)
class Metric:
    """One measure of both models; ``decisive`` ones are part of the decision."""

    name: str
    tuned: Estimate
    base: Estimate
    higher_is_better: bool
    is_rate: bool
    decisive: bool = False

    @property
    def verdict(self) -> tuple[str, Tone]:
        """Better or worse only where the 95 % intervals are apart, which is stricter than a paired test."""
        above, below = self.tuned.low > self.base.high, self.tuned.high < self.base.low
        if not above and not below:
            return "no difference shown", "neutral"
        return ("tuned is better", "good") if above == self.higher_is_better else ("tuned is worse", "bad")

    def show(self, estimate: Estimate) -> str:
        if self.is_rate:
            return f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)})"
        return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _metrics(tuned: ModelEvaluation, base: ModelEvaluation) -> list[Metric]:
    metrics = [
        Metric(
            "Perplexity of the reference answer",
            tuned.answer_perplexity,
            base.answer_perplexity,
            False,
            False,
            True,
        )
    ]
    if tuned.reasoning_perplexity is not None and base.reasoning_perplexity is not None:
        metrics += [
            Metric(
                "Perplexity of the reference reasoning",
                tuned.reasoning_perplexity,
                base.reasoning_perplexity,
                False,
                False,
            ),
            Metric("One closed thought, then an answer", tuned.well_formed, base.well_formed, True, True, True),
        ]
    return [*metrics, Metric("Ended its turn itself", tuned.finished, base.finished, True, True)]


def _by_role(evaluation: Evaluation) -> tuple[ModelEvaluation | None, ModelEvaluation | None]:
    first = {model.role: model for model in reversed(evaluation.models)}
    return first.get("tuned"), first.get("base")


def _files_section(exported: ExportedModels | None) -> Section | None:
    if exported is None:
        return None

    def row(file: ExportedFile) -> tuple[str, ...]:
        types = ", ".join(f"{count} {name}" for name, count in sorted(file.tensor_types.items()))
        purpose = "ship" if file.name == exported.ship else "base, to compare" if file.role == "base" else ""
        return (
            file.name,
            purpose,
            file.quantization,
            byte_size(file.size_bytes),
            f"{file.bits_per_weight:.2f}",
            types,
        )

    return Section(
        "What was made",
        (
            f"A {exported.architecture} model of {exported.parameters:,} parameters; the adapter changed "
            f"{exported.adapter_matrices_merged} of its matrices.",
        ),
        (
            Table(
                ("File", "Purpose", "Type", "Size", "Bits per weight", "Tensors"),
                "lllrrl",
                tuple(map(row, exported.files)),
            ),
        ),
    )


def _evaluation_section(evaluation: Evaluation | None) -> Section | None:
    if evaluation is None:
        return None
    tuned, base = _by_role(evaluation)
    if tuned is None or base is None:
        return _single_evaluations(evaluation)
    rows = tuple(
        (
            metric.name,
            metric.show(metric.base),
            metric.show(metric.tuned),
            metric.verdict[0],
            str(metric.tuned.n),
        )
        for metric in _metrics(tuned, base)
    )
    length = ("New tokens, mean", f"{base.mean_new_tokens:.0f}", f"{tuned.mean_new_tokens:.0f}", "", "")
    return Section(
        "Base against tuned",
        (f"Base is {base.model}, tuned is {tuned.model}; held-out records, greedy decoding.",),
        (
            Table(
                ("Measure", "Base", "Tuned", "Verdict", "Records"),
                "lrrlr",
                (*rows, length),
                "In brackets the 95 % interval: bootstrap over records for perplexities, Wilson for rates. "
                "A verdict other than 'no difference shown' needs intervals that do not overlap. "
                "Lower perplexity is better.",
            ),
        ),
    )


def _single_evaluations(evaluation: Evaluation) -> Section:
    metrics = [(model.model, _metrics(model, model)) for model in evaluation.models]
    rows = tuple(
        (name, metric.name, metric.show(metric.tuned), str(metric.tuned.n))
        for name, list_ in metrics
        for metric in list_
    )
    note = "In brackets the 95 % interval."
    return Section("Evaluation", tables=(Table(("Model", "Measure", "Value", "Records"), "llrr", rows, note),))


def _verification_section(verification: Verification | None) -> Section | None:
    if verification is None:
        return None
    rows = tuple((check.name, "passed" if check.passed else "FAILED", check.detail) for check in verification.checks)
    checks = Table(("Check", "Result", "What was found"), "lll", rows)
    predictions = (_predictions_table(verification.files),) if verification.files else ()
    return Section("Verification", tables=(*predictions, checks))


def _predictions_table(files: list[FileComparison]) -> Table:
    def row(file: FileComparison) -> tuple[str, ...]:
        return (
            file.name,
            file.quantization,
            file.reference,
            f"{file.mean_kl:.2g}",
            "" if file.max_mean_kl is None else f"{file.max_mean_kl:.2g}",
            f"{file.p99_kl:.2g}",
            percent(file.top1_agreement),
            percent(file.min_top1),
            f"{file.positions:,}",
            "" if file.tensor_error is None else f"{file.worst_tensor}: {file.tensor_error:.2g}",
        )

    header = (
        "File", "Type", "Compared with", "Mean KL", "Limit", "99th percentile", "Same likeliest token", "Limit",
        "Positions", "Weights farthest off",
    )  # fmt: skip
    note = (
        "Predictions of the next token on held-out conversations. KL is the Kullback-Leibler divergence from what the "
        "file is compared with (nats a token), 0 for equal predictions; files without quantization have a limit on the "
        "squared error of their logits instead, among the checks. Weights: the tensor nearest to its limit, its "
        "root-mean-square error as a share of its size."
    )
    return Table(header, "lllrrrrrrl", tuple(map(row, files)), note)


def _speed_section(benchmark: Benchmark | None) -> Section | None:
    if benchmark is None:
        return None

    def row(speed: Speed) -> tuple[str, ...]:
        return (
            speed.model,
            f"{speed.engine}, {speed.weights}",
            "" if speed.file_bytes is None else byte_size(speed.file_bytes),
            byte_size(speed.peak_memory_bytes),
            f"{speed.load_seconds:.2f}",
            spread(speed.prompt_tokens_per_second, 0),
            spread(speed.generated_tokens_per_second, 1),
            spread(speed.time_to_first_token_seconds, 2),
        )

    first = benchmark.models[0] if benchmark.models else None
    note = "Median of the repeats, in brackets the smallest and the largest. "
    if first is not None:
        note += (
            f"Prompt: {first.prompt_tokens} tokens at once. Generation: {first.generated_tokens} tokens one "
            "by one, sampling excluded. First token: a question of ordinary length, nothing cached. Loading "
            f"excludes importing the library. {len(first.prompt_tokens_per_second)} repeats after a warm-up, "
            "each model in a process of its own."
        )
    header = (
        "Model", "Engine", "File", "Peak memory", "Load, s", "Prompt, tokens/s", "Generation, tokens/s",
        "First token, s",
    )  # fmt: skip
    return Section(
        "Speed and memory",
        (f"{benchmark.machine}; {benchmark.threads} threads.",),
        (Table(header, "llrrrrrr", tuple(map(row, benchmark.models)), note),),
    )


def _training_section(trained: TrainedAdapter | None, references: Sequence[ReferenceRun]) -> Section | None:
    if trained is None:
        return None
    change = 1 - trained.eval_loss_after / trained.eval_loss_before if trained.eval_loss_before else 0.0
    share = trained.trainable_parameters / trained.total_parameters
    rows: tuple[tuple[str, ...], ...] = (
        ("Base", trained.base),
        ("Device", f"{trained.device}, {trained.dtype}{', base in 4 bit' if trained.load_in_4bit else ''}"),
        (
            "Trained",
            f"{trained.trainable_parameters:,} of {trained.total_parameters:,} parameters ({100 * share:.2f} %)",
        ),
        (
            "Steps",
            f"{_steps(trained)} in {duration(trained.train_seconds)}, {trained.tokens_per_second:.0f} tokens/s",
        ),
        (
            "Held-out loss",
            f"{trained.eval_loss_before:.3f} before, {trained.eval_loss_after:.3f} after "
            f"({percent(abs(change))} {'lower' if change >= 0 else 'higher'})",
        ),
    )
    if trained.resumed_from_step is not None:
        rows = (*rows, ("Resumed", f"from step {trained.resumed_from_step}"))
    published = (_published_losses(trained, references),) if references else ()
    return Section(
        "Training",
        tables=(Table(("", ""), "ll", rows), *published),
        chart=loss_curve(trained, references),
        chart_text=describe_loss(trained, references),
    )


def _steps(trained: TrainedAdapter) -> str:
    if trained.stopped_early:
        return f"{trained.steps} of {trained.planned_steps}, then no further gain on the held-out records,"
    return str(trained.steps) if trained.finished else f"{trained.steps} of {trained.planned_steps} so far"


def _published_losses(trained: TrainedAdapter, references: Sequence[ReferenceRun]) -> Table:
    """Our training loss beside the published ones, at the steps that they were published for."""
    ours = {point.step: point.loss for point in trained.train_loss}

    def row(step: int) -> tuple[str, ...]:
        losses = [ours.get(step), *(run.loss.get(step) for run in references)]
        return (str(step), *("" if loss is None else f"{loss:.3f}" for loss in losses))

    steps = sorted({step for run in references for step in run.loss})
    header = ("Training loss at step", "This run", *(run.name for run in references))
    return Table(header, "r" * len(header), tuple(row(step) for step in steps))


def _data_section(data: PreparedData | None) -> Section | None:
    if data is None:
        return None
    counts = (
        ("read", f"{data.read:,}"),
        ("for training", f"{data.train_rows:,}"),
        ("held out", f"{data.eval_rows:,}"),
        ("not used", f"{data.unused_rows:,}"),
        ("rejected", f"{data.rejected:,}"),
        *((f"rejected: {reason}", f"{count:,}") for reason, count in sorted(data.reject_reasons.items())),
        *((f"repaired: {kind}", f"{count:,}") for kind, count in sorted(data.repaired.items())),
        ("reasoning cut to fit the context", f"{data.cut_rows:,}"),
        ("question of an earlier record", f"{data.repeated_questions:,}"),
        ("nearly equal to an earlier record", f"{data.near_duplicates:,}"),
        ("with reasoning", f"{data.with_reasoning:,}"),
        ("with options", f"{data.with_options:,}"),
    )
    lengths = [(f"{part}, words", distribution) for part, distribution in data.words.items()]
    lengths += [(f"{part}, tokens", distribution) for part, distribution in data.tokens.items()]
    rows = tuple((name, *(f"{value:,.0f}" for value in (d.minimum, d.median, d.p95, d.maximum))) for name, d in lengths)
    return Section(
        "Data",
        (f"Source: {data.source}.", _leakage_sentence(data)),
        (
            Table(("Records", "Number"), "lr", counts),
            Table(("Length", "Minimum", "Median", "95 %", "Maximum"), "lrrrr", rows),
        ),
        chart=length_histograms(data.tokens),
        chart_text=describe_lengths(data.tokens),
    )


def _leakage_sentence(data: PreparedData) -> str:
    leakage = data.leakage
    found = (
        f"{leakage.leaking_records:,} training records held at least {percent(leakage.overlap)} of the 8-grams of "
        f"{leakage.held_out_given_away:,} held-out ones"
    )
    if leakage.leaking_records == 0:
        found = f"No training record held {percent(leakage.overlap)} of a held-out record's 8-grams"
    elif leakage.policy == "drop":
        found += " and were left out"
    else:
        found += " and were trained on all the same, as data.leakage=keep asks: the held-out figures flatter the model"
    return (
        f"{found}. {leakage.held_out_sharing_an_8_gram:,} of {data.eval_rows:,} held-out records have some run of "
        "eight words in common with the training records used."
    )


def _samples_section(evaluation: Evaluation | None) -> Section | None:
    if evaluation is None or not evaluation.samples:
        return None
    return Section(
        "Samples",
        ("Held-out questions with the models' whole outputs, greedy decoding, as they were written.",),
        samples=tuple(evaluation.samples),
    )


def _stages_section(run: Run) -> Section:
    def row(stage: str) -> tuple[str, ...]:
        artifact = run.artifacts.get(stage)
        if artifact is None:
            return (stage, run.missing[stage], "", "", "")
        manifest = artifact.manifest
        size = sum(record.size for record in manifest.files)
        return (
            stage,
            "done",
            duration(manifest.seconds),
            byte_size(manifest.peak_memory_bytes),
            f"{len(manifest.files)} {'file' if len(manifest.files) == 1 else 'files'}, {byte_size(size)}",
        )

    header = ("Stage", "State", "Time", "Peak memory", "Artifact")
    return Section("Stages", tables=(Table(header, "llrrl", tuple(row(stage) for stage in STAGES)),))


def _provenance_section(run: Run) -> Section | None:
    if not run.artifacts:
        return None
    versions = {
        (name, version)
        for artifact in run.artifacts.values()
        for name, version in artifact.manifest.versions.items()
        if version != "absent"
    }
    hashes = tuple(
        (stage, record.path, record.sha256)
        for stage, artifact in run.artifacts.items()
        for record in artifact.manifest.files
    )
    return Section(
        "Versions and hashes",
        tables=(
            Table(("Package", "Version"), "ll", tuple(sorted(versions))),
            Table(("Stage", "File", "SHA-256"), "lll", hashes),
        ),
    )


def _disclaimer(config: Config) -> str:
    text = "A research tool, not medical advice: nothing here may guide the care of a patient."
    if config.data.source == "sample":
        text += " The cases are synthetic and no clinician has reviewed them."
    return text
