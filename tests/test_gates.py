"""Regression gates: what can be written, and when they pass."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.gates import check_gates, raise_if_failed
from pipeline.cli import cli
from pipeline.config import load_config
from pipeline.errors import GateFailed, MedcotError
from pipeline.gates import parse_gate, split_gate
from pipeline.results import Comparison, Estimate, Evaluation, ModelEvaluation, Verdict

ESTIMATE = Estimate(value=0.75, low=0.5, high=0.9, n=30)
TUNED = ModelEvaluation(
    model="tuned.gguf",
    role="tuned",
    answer_perplexity=Estimate(value=12.0, low=10, high=14, n=30),
    reasoning_perplexity=None,
    well_formed=ESTIMATE,
    finished=ESTIMATE,
    mean_new_tokens=10,
)
BASE = TUNED.model_copy(update={"model": "base.gguf", "role": "base"})


def compared(verdict: Verdict, p_value: float | None = None) -> Comparison:
    return Comparison(
        model="tuned.gguf", reference="base.gguf", metric="answer_perplexity", n=30,
        difference=-2, low=-3, high=-1, p_value=p_value, verdict=verdict,
    )  # fmt: skip


def passes(name: str, condition: str, *comparisons: Comparison) -> bool:
    (outcome,) = check_gates([parse_gate(name, condition)], [BASE, TUNED], comparisons)
    assert outcome.model == "tuned.gguf"
    return outcome.passed


@pytest.mark.parametrize(
    ("condition", "passed"), [(">= 0.75", True), (">=0.76", False), ("<= 0.75", True), ("<= 7e-1", False)]
)
def test_limits_hold_for_the_value(condition: str, passed: bool) -> None:
    assert passes("well_formed", condition) is passed
    assert passes("format", condition) is passed  # the same metric by another name


@pytest.mark.parametrize(
    ("verdict", "better", "not_worse"),
    [
        ("better", True, True),
        ("no difference shown", False, True),
        ("too few records", False, True),
        ("worse", False, False),
    ],
)
def test_relations_follow_the_verdict(verdict: Verdict, better: bool, not_worse: bool) -> None:
    assert passes("answer_perplexity", "better", compared(verdict)) is better
    assert passes("answer_perplexity", "not  worse", compared(verdict)) is not_worse


def test_what_was_not_measured_has_not_passed() -> None:
    assert not passes("choice_accuracy", ">= 0")
    assert not passes("answer_perplexity", "not worse")  # compared with nothing


def test_a_failure_tells_the_numbers() -> None:
    gates = [parse_gate("answer_perplexity", "better"), parse_gate("format", ">= 0.9"), parse_gate("format", "<= 1")]
    comparisons = [compared("no difference shown", 0.25)]
    outcomes = check_gates(gates, [BASE, TUNED], comparisons)
    evaluation = Evaluation(models=[BASE, TUNED], samples=[], gates=outcomes)
    told = (
        r"2 of 3 gates failed: tuned\.gguf: answer_perplexity must be better than base\.gguf's and is 12 \(10 to 14\) "
        r"on 30 records, a difference of -2 \(-3 to -1\) on 30, McNemar's p 0\.25: no difference shown; "
        r"tuned\.gguf: well_formed must be >= 0\.9 and is 0\.75 \(0\.5 to 0\.9\) on 30 records\."
    )
    with pytest.raises(GateFailed, match=told) as caught:
        raise_if_failed(evaluation)
    assert caught.value.exit_status == 3
    raise_if_failed(evaluation.model_copy(update={"gates": outcomes[2:]}))


@pytest.mark.parametrize(
    ("name", "condition", "told"),
    [
        ("perplexty", "better", r"no metric perplexty: gates name perplexity, reasoning_perplexity, .*, or format"),
        ("looping", "good", r"looping: 'good' is no condition: write better, not worse, '>= NUMBER' or '<= NUMBER'"),
        ("looping", "< 0.1", "is no condition"),
        ("looping", "<= ten", "is no condition"),
        ("new_tokens", "better", "new_tokens is neither better high nor low"),
    ],
)
def test_a_wrong_gate_is_a_configuration_error(name: str, condition: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        parse_gate(name, condition)
    path = tmp_path / "mine.yaml"
    path.write_text(f'evaluation:\n  gates: {{{name}: "{condition}"}}\n')
    with pytest.raises(MedcotError, match=rf"mine\.yaml:2: evaluation\.gates: .*{told[:12]}") as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)
    outcome = CliRunner().invoke(cli, ["evaluate", "a.gguf", "--data", "x.jsonl", "--gate", f"{name}={condition}"])
    assert isinstance(outcome.exception, MedcotError) and name in str(outcome.exception)


def test_gates_in_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('evaluation:\n  gates:\n    answer_perplexity: better\n    format: ">= 0.8"\n')
    gates = load_config(str(path), ["evaluation.gates.looping=not worse"]).evaluation.parsed_gates
    assert [(gate.metric.key, gate.condition) for gate in gates] == [
        ("answer_perplexity", "better"),
        ("well_formed", ">= 0.8"),
        ("looping", "not worse"),
    ]
    with pytest.raises(MedcotError, match=r"evaluation\.gates compares answer_perplexity with the base's"):
        load_config(str(path), ["export.include_base=false"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("answer_perplexity=better", ("answer_perplexity", "better")),
        ("format=>= 0.8", ("format", ">= 0.8")),
        ("format>=0.8", ("format", ">=0.8")),
        ("looping <= 0.1", ("looping", "<= 0.1")),
    ],
)
def test_gates_of_the_command_line(text: str, expected: tuple[str, str]) -> None:
    assert split_gate(text) == expected


@pytest.mark.parametrize("text", ["", "=", "format", "format="])
def test_a_gate_without_a_condition_is_told(text: str) -> None:
    outcome = CliRunner().invoke(cli, ["evaluate", "a.gguf", "b.gguf", "--data", "x.jsonl", "--gate", text])
    assert isinstance(outcome.exception, MedcotError)


def test_a_comparison_needs_two_models() -> None:
    outcome = CliRunner().invoke(cli, ["evaluate", "a.gguf", "--data", "x", "--gate", "rouge_l=not worse"])
    assert isinstance(outcome.exception, MedcotError) and "compares two models" in str(outcome.exception)
