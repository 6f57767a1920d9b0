"""Options: what an answer names, what is scored, and calibration against published values."""

import numpy as np
import pytest
from bench_models import FakeEngine

from bench.held_out import HeldOutRecord
from bench.multiple_choice import (
    ChoiceOutcome,
    binned,
    calibration_bins,
    calibration_error,
    calibration_parts,
    extract_option,
    measure_choice,
)
from bench.statistics import total
from pipeline.errors import MedcotError
from pipeline.prompts import Example

OPTIONS = ("cortisol", "glucose", "sodium", "vanillylmandelic acid", "insulin", "insulin resistance")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is D.", "D"),
        ("The correct answer is **(D)** because the tumour secretes catecholamines.", "D"),
        ("Answer: B", "B"),
        ("I would choose option C", "C"),
        (r"So \boxed{D} it is", "D"),
        (r"So \boxed{\text{A}}", "A"),
        ("D", "D"),
        ("D. vanillylmandelic acid", "D"),
        ("(B) glucose", "B"),
        ("**C**", "C"),
        ("Vanillylmandelic acid in the urine is the most helpful.", "D"),
        ("It is insulin resistance.", "F"),
        ("It is insulin.", "E"),
        # None is named, or more than one: no luck.
        ("", None),
        ("A patient like this needs a scan.", None),
        ("The answer is a hormone of the adrenal gland.", None),
        ("The answer is Dexamethasone.", None),
        ("The answer is Z.", None),
        ("Option A is wrong and option B is right.", None),
        ("A. cortisol\nB. glucose\nC. sodium\nD. vanillylmandelic acid", None),
        ("Either glucose or sodium.", None),
        ("A. sodium", None),
        ("The answer is B: sodium", None),
    ],
)
def test_an_answer_names_one_option_or_none(answer: str, letter: str | None) -> None:
    found = extract_option(answer, OPTIONS)
    assert found == (None if letter is None else "ABCDEF".index(letter))


def outcome(probabilities: list[float], right: int, extracted: int | None = None) -> ChoiceOutcome:
    return ChoiceOutcome(
        right=right,
        # A constant more or less is what the rest of the vocabulary takes.
        log_probabilities=[float(value) for value in np.log(probabilities) - 3],
        own_thought=False,
        output="",
        extracted=extracted,
    )


def test_probabilities_are_those_among_the_options() -> None:
    assert outcome([0.1, 0.2, 0.7], right=2).probabilities == pytest.approx([0.1, 0.2, 0.7])


def test_a_tie_is_not_right() -> None:
    assert not outcome([0.5, 0.5], right=0).likeliest_is_right
    assert outcome([0.51, 0.49], right=0).likeliest_is_right
    assert not outcome([0.5, 0.5], right=0).extracted_is_right


def test_brier_score_of_scikit_learns_documentation() -> None:
    """brier_score_loss(["eggs", "ham", "spam"], [[.8, .1, .1], [.2, .7, .1], [.2, .2, .6]]) is 0.146... there."""
    outcomes = [outcome([0.8, 0.1, 0.1], 0), outcome([0.2, 0.7, 0.1], 1), outcome([0.2, 0.2, 0.6], 2)]
    assert np.mean([each.brier_score for each in outcomes]) == pytest.approx(0.44 / 3)
    assert outcome([0.9999999, 0.0000001], right=1).brier_score == pytest.approx(2, abs=1e-5)


def test_calibration_error_of_torchmetrics_documentation() -> None:
    """BinaryCalibrationError(n_bins=2, norm="l1") of these predictions is 0.2900 there."""
    pairs = [(0.25, False), (0.25, False), (0.55, True), (0.75, True), (0.75, True)]
    assert total(calibration_error, binned(pairs, 2)) == pytest.approx(0.29)


def test_calibration_bins_are_closed_above() -> None:
    assert binned([(0.6, True)], 10).argmax() == 5
    outcomes = [outcome([0.55, 0.45], 0), outcome([0.55, 0.45], 1), outcome([0.05, 0.95], 1), outcome([1 / 16] * 16, 0)]
    bins = calibration_bins(outcomes)
    assert [each.records for each in bins] == [1, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    assert (bins[5].low, bins[5].high) == (0.5, 0.6)
    assert (bins[5].confidence, bins[5].accuracy) == (pytest.approx(0.55), 0.5)
    assert bins[1].confidence is None and bins[1].accuracy is None
    # By hand: of four records one is 0.0625 - 0 off, two are 0.55 - 0.5 off, one is 1 - 0.95 off.
    assert total(calibration_error, calibration_parts(outcomes)) == pytest.approx((0.0625 + 2 * 0.05 + 0.05) / 4)


@pytest.mark.parametrize(
    ("written", "before_the_letter", "own"),
    [
        ("<think>\nbecause\n</think>\n\nB", "<think>\nbecause\n</think>\n\nThe answer is ", True),
        ("<think>\nand so on", "<think>\n\n</think>\n\nThe answer is ", False),  # cut off: the thought never closed
        ("It is B.", "assistant\nThe answer is ", False),
    ],
)
def test_the_letter_follows_a_closed_thought(written: str, before_the_letter: str, own: bool) -> None:
    engine = FakeEngine(likely_letter="B")
    record = HeldOutRecord(Example("Which?", None, "y"), ("x", "y"), right=1)
    found = measure_choice(engine, record, list(written.encode()))
    assert engine.scored[0].endswith(before_the_letter)
    assert (found.own_thought, found.likeliest_is_right) == (own, True)


def test_an_output_without_an_answer_is_not_extracted() -> None:
    record = HeldOutRecord(Example("Which?", None, "y"), ("x", "y"), right=1)
    assert measure_choice(FakeEngine(), record, list(b"<think>\nThe answer is B")).extracted is None
    assert measure_choice(FakeEngine(), record, []).extracted is None


def test_a_vocabulary_without_letters_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here B and C begin with the same token, and A with another."""
    engine = FakeEngine()
    monkeypatch.setattr(
        type(engine.chat_format.vocabulary),
        "encode_text",
        lambda self, text, after: [half for byte in text.encode() for half in (byte // 2, byte % 2)],
    )
    record = HeldOutRecord(Example("Which?", None, "y"), ("x", "y", "z"), right=1)
    with pytest.raises(MedcotError, match="no token of its own for each letter from A to C"):
        measure_choice(engine, record, list(b"B"))
