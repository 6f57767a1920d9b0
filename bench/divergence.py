"""How far quantized models are from the one they were made of, token by token on the same text.

Kullback-Leibler divergence is ``sum over words w of p(w) (log p(w) - log q(w))`` in nats, p from the reference: what
``llama-perplexity --kl-divergence`` reports. It sees every change of the prediction, perplexity only that of the
word that came next, so it decides between two quantizations on far less text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench import statistics
from export.gguf_model import GgufModel
from export.verify_logits import kl_divergence, log_softmax
from pipeline.errors import MedcotError
from pipeline.prompts import EncodedExample
from pipeline.results import Estimate

REFERENCE = "reference"
_LOGITS_BLOCK = 64  # positions held at a time, for each model


@dataclass(frozen=True)
class Divergence:
    """One model against the reference on one completion: sums over its ``tokens``."""

    tokens: int
    nll: float
    kl: float
    same_top: int

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(
            self.tokens + other.tokens, self.nll + other.nll, self.kl + other.kl, self.same_top + other.same_top
        )


@dataclass(frozen=True)
class Summary:
    """One model against the reference over all records; divergence in nats a token."""

    perplexity: Estimate
    mean_kl: Estimate
    top1_agreement: Estimate


def divergence(
    reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32], following: npt.NDArray[np.int64]
) -> Divergence:
    """Compare two models' logits [positions, vocabulary]; ``following`` [positions] are the tokens that came next."""
    log_p, log_q = log_softmax(reference), log_softmax(other)
    return Divergence(
        tokens=len(following),
        nll=float(-log_q[np.arange(len(following)), following].sum(dtype=np.float64)),
        kl=float(kl_divergence(log_p, log_q).sum()),
        same_top=int((reference.argmax(axis=1) == other.argmax(axis=1)).sum()),
    )


def compare(reference: GgufModel, models: Mapping[str, GgufModel], example: EncodedExample) -> dict[str, Divergence]:
    """Every model on one example's completion, its prompt being given; the reference itself under REFERENCE."""
    ids = example.input_ids
    first = len(example.prompt_ids)
    if any(model.n_vocab != reference.n_vocab for model in models.values()):
        raise MedcotError(f"{reference.path} has another vocabulary than a model it is compared with.")
    totals = {name: Divergence(0, 0.0, 0.0, 0) for name in (REFERENCE, *models)}
    start = 0
    streams = [model.logits(ids, chunk=_LOGITS_BLOCK) for model in (reference, *models.values())]
    for expected, *found in zip(*streams, strict=True):
        # Row i of a block predicts token start + i + 1.
        rows = range(max(0, first - 1 - start), min(len(expected), len(ids) - 1 - start))
        if len(rows):
            chosen = slice(rows.start, rows.stop)
            following = np.asarray(ids[start + rows.start + 1 : start + rows.stop + 1])
            for name, logits in zip(totals, (expected, *found), strict=True):
                totals[name] += divergence(expected[chosen], logits[chosen], following)
        start += len(expected)
    return totals


def summarize(records: Sequence[Divergence]) -> Summary:
    """One model over records; intervals are 95 %, those of means by resampling records."""
    tokens = [record.tokens for record in records]
    return Summary(
        perplexity=statistics.perplexity([record.nll for record in records], tokens),
        mean_kl=mean_per_token([record.kl for record in records], tokens),
        top1_agreement=statistics.wilson(sum(record.same_top for record in records), sum(tokens)),
    )


def mean_per_token(sums: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """Token-weighted mean over records; of paired differences too, where a sum may be negative."""
    return statistics.bootstrap(statistics.ratio, np.column_stack([sums, tokens]).astype(np.float64))
