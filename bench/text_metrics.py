"""How much of a reference's wording an answer has: ROUGE-L and BLEU-4, both between 0 and 1.

ROUGE-L (Lin 2004, https://aclanthology.org/W04-1013) is the F-measure of the longest common subsequence of words, by
rouge-score without stemming. BLEU-4 (Papineni et al. 2002, https://aclanthology.org/P02-1040) is sacrebleu's, over all
records together: a geometric mean of n-gram precisions means little for one sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import MedcotError

_ORDERS = 4


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of one answer; raises MedcotError where rouge-score is not installed."""
    return float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure)


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
    return RougeScorer(["rougeL"])


@cache
def _bleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise _missing("sacrebleu", error) from error
    return BLEU()


def _missing(package: str, error: ImportError) -> MedcotError:
    return MedcotError(f"ROUGE-L and BLEU-4 need {package} ({error}): pip install {package}.")
