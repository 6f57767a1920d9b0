"""ROUGE and BLEU-4 against values published or worked out by hand."""

import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from bench.text_metrics import bleu_4, bleu_4_of_sums, bleu_counts, bleu_signature, rouge


@pytest.mark.parametrize(
    ("answer", "expected"),
    # Lin 2004, section 3.1: reference and candidates S1, S2 and S3, and the values given there.
    [("police kill the gunman", 3 / 4), ("the gunman kill police", 2 / 4), ("police killed the gunman", 1.0)],
)
def test_rouge_l_of_its_paper(answer: str, expected: float) -> None:
    assert rouge(answer, "police killed the gunman").rouge_l == pytest.approx(expected)


def test_rouge_l_is_the_f_measure_and_does_not_stem() -> None:
    precision, recall = 5 / 7, 5 / 6  # common subsequence: the cat on the mat
    expected = 2 * precision * recall / (precision + recall)
    assert rouge("the cat sat on the mat today", "the cat is on the mat").rouge_l == pytest.approx(expected)
    assert rouge("killing", "killed").rouge_l == 0
    assert rouge("", "killed").rouge_l == 0


def test_bleu_counts_are_clipped_as_in_its_paper() -> None:
    # Papineni et al. 2002, section 2.1: seven times "the" has a modified unigram precision of 2/7.
    counts = bleu_counts("the the the the the the the", "the cat is on the mat")
    assert (counts[0], counts[4]) == (2, 7)


def test_bleu_4_by_hand() -> None:
    counts = bleu_counts("the cat sat on the mat today", "the cat is on the mat")
    assert counts.tolist() == [5, 3, 1, 0, 7, 6, 5, 4, 7, 6]
    # No 4-gram is found: smoothing counts half of one.
    assert bleu_4(counts) == pytest.approx((5 / 7 * 3 / 6 * 1 / 5 * 0.5 / 4) ** 0.25)
    brief = bleu_counts("one two three four five", "one two three four five six")
    assert bleu_4(brief) == pytest.approx(math.exp(1 - 6 / 5))


def test_bleu_4_of_several_answers_is_that_of_their_counts() -> None:
    pairs = [
        ("the cat sat on the mat today", "the cat is on the mat"),
        ("a dog ran by the sea", "a dog ran to the sea"),
    ]
    whole = BLEU().corpus_score([answer for answer, _ in pairs], [[reference for _, reference in pairs]]).score / 100
    assert bleu_4(sum(bleu_counts(*pair) for pair in pairs)) == pytest.approx(whole)  # type: ignore[arg-type]
    assert bleu_4(bleu_counts("", "something")) == 0


def test_the_signature_names_tokenizer_and_smoothing() -> None:
    assert bleu_signature().startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_rouge_1_and_2_by_hand() -> None:
    # ROUGE's own definition (Lin 2004, section 2): five of six reference words and three of five pairs are found.
    scores = rouge("the cat sat on the mat today", "the cat is on the mat")
    assert scores.rouge_1 == pytest.approx(2 * (5 / 7) * (5 / 6) / (5 / 7 + 5 / 6))
    assert scores.rouge_2 == pytest.approx(2 * (3 / 6) * (3 / 5) / (3 / 6 + 3 / 5))
    # The example in rouge-score's README: precision 0.75 and recall 0.67 for single words.
    readme = rouge("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog")
    assert readme.rouge_1 == pytest.approx(2 * (6 / 8) * (6 / 9) / (6 / 8 + 6 / 9))
    assert rouge("", "a reference") == (0, 0, 0)


def test_sums_of_draws_are_scored_row_by_row() -> None:
    one = bleu_counts("the cat sat on the mat today", "the cat is on the mat")
    other = bleu_counts("a dog ran by the sea", "a dog ran to the sea")
    sums = np.array([one, one + other], dtype=np.float64)
    assert bleu_4_of_sums(sums) == pytest.approx([bleu_4(one), bleu_4(one + other)])
