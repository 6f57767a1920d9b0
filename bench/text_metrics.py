"""How much of a reference's wording an answer has: ROUGE-1, ROUGE-2, ROUGE-L and BLEU-4, all between 0 and 1.

ROUGE (Lin 2004, https://aclanthology.org/W04-1013) is the F-measure of words (1), of pairs of words (2) and of the
longest common subsequence of words (L), by rouge-score without stemming. BLEU-4 (Papineni et al. 2002,
https://aclanthology.org/P02-1040) is sacrebleu's, over all records together: a geometric mean of n-gram precisions
means little for one sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import MedcotError

_ORDERS = 4
_ROUGES = ("rouge1", "rouge2", "rougeL")


class Rouge(NamedTuple):
    rouge_1: float
    rouge_2: float
    rouge_l: float


def rouge(answer: str, reference: str) -> Rouge:
    """F-measures of one answer; raises MedcotError where rouge-score is not installed."""
    scores = _rouge_scorer().score(reference, answer)
    return Rouge(*(float(scores[name].fmeasure) for name in _ROUGES))


def bleu_counts(answer: str, reference: str) -> npt.NDArray[np.int64]:
    """One answer's part of BLEU-4, shape (10,): n-grams found, n-grams written (n = 1..4 each), both lengths.

    Counts of several answers are added before ``bleu_4``. Raises MedcotError where sacrebleu is not installed.
    """
    score = _bleu().corpus_score([answer], [[reference]])
    return np.array([*score.counts, *score.totals, score.sys_len, score.ref_len], dtype=np.int64)


def bleu_4(counts: npt.NDArray[np.int64]) -> float:
    """BLEU-4 of summed ``bleu_counts``, smoothed as sacrebleu does by default ("exp")."""
    numbers: Sequence[int] = counts.tolist()
    found, written, (answer_length, reference_length) = (
        numbers[:_ORDERS],
        numbers[_ORDERS : 2 * _ORDERS],
        numbers[2 * _ORDERS :],
    )
    score = _bleu().compute_bleu(found, written, answer_length, reference_length, smooth_method="exp")
    return float(score.score) / 100


def bleu_4_of_sums(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """BLEU-4 of each row of summed counts: (draws, 10) -> (draws,), as ``bench/statistics.py`` resamples them."""
    return np.array([bleu_4(counts) for counts in np.rint(sums).astype(np.int64)])


def bleu_signature() -> str:
    """How BLEU-4 was computed, in sacrebleu's notation (Post 2018, https://aclanthology.org/W18-6319)."""
    bleu = _bleu()
    bleu.corpus_score([""], [[""]])  # the number of references is known only after a score
    return str(bleu.get_signature())


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge-score", error) from error
    return RougeScorer(list(_ROUGES))


@cache
def _bleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise _missing("sacrebleu", error) from error
    return BLEU()


def _missing(package: str, error: ImportError) -> MedcotError:
    return MedcotError(f"ROUGE and BLEU-4 need {package} ({error}): pip install {package}.")
