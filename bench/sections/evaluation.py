"""Base against tuned on held-out records: form and likelihood of what they write, multiple choice, and the gates."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from bench.page import Section, Table, Tone, percent
from pipeline.metrics import METRIC_BY_KEY, METRICS, Metric, MetricKey
from pipeline.results import Comparison, Estimate, Evaluation, ExportedModels, ModelEvaluation

COMPARISON_TITLE = "Base against tuned"
CHOICE_TITLE = "Multiple choice"
_CHOICE_KEYS: frozenset[MetricKey] = frozenset(
    {"choice_accuracy", "calibration_error", "brier_score", "generative_accuracy", "unextracted"}
)
_OTHER_KEYS = frozenset(METRIC_BY_KEY) - _CHOICE_KEYS
_TONES: dict[str, Tone] = {"better": "good", "worse": "bad"}
_NOTE = (
    "In brackets the 95 % interval over records: bootstrap, Wilson's for rates. The difference is tuned minus base on "
    "the same records, with an interval of its own; where that contains zero no difference is shown, however far "
    "apart the two values look."
)


def evaluation_section(evaluation: Evaluation | None) -> Section | None:
    if evaluation is None:
        return None
    base, tuned = by_role(evaluation)
    gates = _gates_table(evaluation)
    tables = [table for model in tuned if base for table in _comparison(evaluation, base, model, _OTHER_KEYS)]
    if not tables:
        return Section("Evaluation", tuple(conditions(evaluation)), tables=(*gates, *_values(evaluation, _OTHER_KEYS)))
    text = "Held-out records, greedy decoding; answers are compared with the reference answer, without the thought."
    if evaluation.bleu_signature is not None:
        text += f" BLEU as sacrebleu has it: {evaluation.bleu_signature}."
    return Section(COMPARISON_TITLE, (text, *conditions(evaluation)), (*gates, *tables))


def conditions(evaluation: Evaluation) -> list[str]:
    """What wrote the answers, and what a time limit left out, as sentences."""
    ended_early = [] if evaluation.ended_early is None else [evaluation.ended_early.sentence]
    if evaluation.ended_early is not None and evaluation.ended_early.answered == 0:
        return ended_early
    because = "" if evaluation.engine_reason is None else f" ({evaluation.engine_reason})"
    if any(model.engine == "transformers" and model.model.endswith(".gguf") for model in evaluation.models):
        told = [
            f"Answers were written under transformers, by base and adapter and by the base alone{because}; the GGUFs' "
            "likelihoods are measured under llama.cpp."
        ]
    else:
        names = " and ".join(sorted({model.engine for model in evaluation.models}))
        told = [f"Answers were written under {names}{because}."]
    return told + ended_early


def choice_section(evaluation: Evaluation | None) -> Section | None:
    """Records with options, where there are any."""
    measured = [] if evaluation is None else [model for model in evaluation.models if model.choice_accuracy is not None]
    if evaluation is None or not measured:
        return None
    base, tuned = by_role(evaluation)
    tables = [table for model in tuned if base for table in _comparison(evaluation, base, model, _CHOICE_KEYS)]
    text = [
        "By likelihood: the letter that is likeliest after a closed thought. By its own answer: the option that the "
        "written answer names; an answer that names none, or two, is wrong and counted."
    ]
    chances = {model.choice_chance for model in measured if model.choice_chance is not None}
    text += [f"Guessing reaches {percent(chance)}." for chance in sorted(chances)]
    text += [
        f"{model.model}: {model.choice_own_thoughts:,} records were scored after a thought of its own."
        for model in measured
        if model.choice_own_thoughts is not None
    ]
    calibration = [_calibration_table(model) for model in measured if any(bin_.records for bin_ in model.calibration)]
    return Section(CHOICE_TITLE, tuple(text), (*(tables or _values(evaluation, _CHOICE_KEYS)), *calibration))


def by_role(evaluation: Evaluation) -> tuple[ModelEvaluation | None, list[ModelEvaluation]]:
    """The base, if it was evaluated, and the tuned models."""
    base = next((model for model in evaluation.models if model.role == "base"), None)
    return base, [model for model in evaluation.models if model.role == "tuned"]


def tuned_model(evaluation: Evaluation, exported: ExportedModels | None) -> ModelEvaluation | None:
    """The evaluated model that ships, else the first tuned one."""
    _, tuned = by_role(evaluation)
    ships = [model for model in tuned if exported is not None and model.model == exported.ship]
    return next(iter([*ships, *tuned]), None)


def value_of(model: ModelEvaluation, key: MetricKey) -> Estimate | None:
    value: Estimate | None = getattr(model, key)
    return value


def comparison_of(evaluation: Evaluation, model: str, key: MetricKey) -> Comparison | None:
    found = (each for each in evaluation.comparisons if each.model == model and each.metric == key)
    return next(found, None)


def show(metric: Metric, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    value, low, high = (_number(metric, each) for each in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def show_difference(metric: Metric, comparison: Comparison) -> str:
    value, low, high = (_signed(metric, each) for each in (comparison.difference, comparison.low, comparison.high))
    unit = " points" if metric.kind == "rate" else ""
    return f"{value}{unit} ({low} to {high})"


def show_verdict(comparison: Comparison | None) -> str:
    if comparison is None:
        return "not compared"
    verdict = comparison.verdict
    return f"tuned is {verdict}" if verdict in ("better", "worse", "higher", "lower") else verdict


def tone_of(comparison: Comparison | None) -> Tone:
    return "neutral" if comparison is None else _TONES.get(comparison.verdict, "neutral")


def _number(metric: Metric, value: float) -> str:
    if metric.kind == "rate":
        return percent(value)
    return f"{value:,.{ {'perplexity': 2, 'score': 3, 'tokens': 0}[metric.kind] }f}"


def _signed(metric: Metric, value: float) -> str:
    if metric.kind == "rate":
        return f"{100 * value:+.1f}"
    return f"{value:+,.{ {'perplexity': 2, 'score': 3, 'tokens': 0}[metric.kind] }f}"


def _measured(models: Collection[ModelEvaluation], keys: Collection[MetricKey]) -> Iterator[Metric]:
    for metric in METRICS:
        if metric.key in keys and any(value_of(model, metric.key) is not None for model in models):
            yield metric


def _comparison(
    evaluation: Evaluation, base: ModelEvaluation, tuned: ModelEvaluation, keys: Collection[MetricKey]
) -> Iterator[Table]:
    def row(metric: Metric) -> tuple[str, ...]:
        ours, theirs = value_of(tuned, metric.key), value_of(base, metric.key)
        comparison = comparison_of(evaluation, tuned.model, metric.key)
        difference = "" if comparison is None else show_difference(metric, comparison)
        records = comparison.n if comparison is not None else ours.n if ours is not None else 0
        better = {"higher": " ↑", "lower": " ↓", None: ""}[metric.better]
        return (
            metric.name + better,
            show(metric, theirs),
            show(metric, ours),
            difference,
            show_verdict(comparison),
            f"{records:,}",
        )

    rows = tuple(map(row, _measured((base, tuned), keys)))
    if rows:
        header = ("Measure (↑ more is better, ↓ less)", "Base", "Tuned", "Difference", "Verdict", "Records")
        yield Table(header, "lrrrlr", rows, _NOTE, caption=f"{tuned.model} against {base.model}")


def _values(evaluation: Evaluation, keys: Collection[MetricKey]) -> Iterator[Table]:
    """Models that have nothing to be compared with."""
    rows = tuple(
        (model.model, metric.name, show(metric, value), f"{value.n:,}")
        for model in evaluation.models
        for metric in _measured((model,), keys)
        if (value := value_of(model, metric.key)) is not None
    )
    if rows:
        yield Table(("Model", "Measure", "Value", "Records"), "llrr", rows, "In brackets the 95 % interval.")


def _gates_table(evaluation: Evaluation) -> Iterator[Table]:
    rows = tuple(
        (
            METRIC_BY_KEY[gate.metric].name,
            gate.condition,
            "passed" if gate.passed else "FAILED",
            gate.detail,
            gate.model,
        )
        for gate in evaluation.gates
    )
    if rows:
        header = ("Gate", "Condition", "Result", "What was found", "Model")
        yield Table(header, "lllll", rows, caption="Regression gate")


def _calibration_table(model: ModelEvaluation) -> Table:
    rows = tuple(
        (
            f"{percent(each.low)} to {percent(each.high)}",
            f"{each.records:,}",
            "" if each.confidence is None else percent(each.confidence),
            "" if each.accuracy is None else percent(each.accuracy),
        )
        for each in model.calibration
        if each.records
    )
    header = ("Probability of the likeliest option", "Records", "Mean probability", "Right")
    note = "Calibrated is a model that is right as often as its probability says."
    return Table(header, "lrrr", rows, note, caption=f"Calibration of {model.model}", folded=True)
