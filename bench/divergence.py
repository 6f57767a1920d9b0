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
from pipeline.results import Estimate, TokenDivergence

REFERENCE = "reference"
_LOGITS_BLOCK = 64  # positions held at a time, for each model


@dataclass(frozen=True)
class Divergence:
    """One model against the reference, one value a token [tokens]: its loss and the divergence (nats)."""

    nll: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]
    same_top: npt.NDArray[np.bool_]

    @property
    def tokens(self) -> int:
        return len(self.kl)

    def __getitem__(self, part: slice) -> Divergence:
        return Divergence(self.nll[part], self.kl[part], self.same_top[part])

    @classmethod
    def joined(cls, parts: Sequence[Divergence]) -> Divergence:
        return cls(
            np.concatenate([part.nll for part in parts]),
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.same_top for part in parts]),
        )


def divergence(
    reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32], following: npt.NDArray[np.int64]
) -> Divergence:
    """Compare two models' logits [positions, vocabulary]; ``following`` [positions] are the tokens that came next."""
    log_p, log_q = log_softmax(reference), log_softmax(other)
    return Divergence(
        nll=-log_q[np.arange(len(following)), following].astype(np.float64),
        kl=kl_divergence(log_p, log_q),
        same_top=reference.argmax(axis=1) == other.argmax(axis=1),
    )


def compare(
    reference: GgufModel, models: Mapping[str, GgufModel], ids: Sequence[int], first: int
) -> dict[str, Divergence]:
    """Every model on ``ids`` from number ``first`` (at least 1) on, the ones before being given.

    The reference itself is under REFERENCE. Models are evaluated side by side, a block of logits of each at a time,
    so memory does not grow with the text.
    """
    if any(model.n_vocab != reference.n_vocab for model in models.values()):
        raise MedcotError(f"{reference.path} has another vocabulary than a model it is compared with.")
    parts: dict[str, list[Divergence]] = {name: [] for name in (REFERENCE, *models)}
    start = 0
    streams = [model.logits(ids, chunk=_LOGITS_BLOCK) for model in (reference, *models.values())]
    for expected, *found in zip(*streams, strict=True):
        # Row i of a block predicts token start + i + 1.
        rows = range(max(0, first - 1 - start), min(len(expected), len(ids) - 1 - start))
        if len(rows):
            chosen = slice(rows.start, rows.stop)
            following = np.asarray(ids[start + rows.start + 1 : start + rows.stop + 1])
            for name, logits in zip(parts, (expected, *found), strict=True):
                parts[name].append(divergence(expected[chosen], logits[chosen], following))
        start += len(expected)
    return {name: Divergence.joined(each) for name, each in parts.items()}


def summarize(records: Sequence[Divergence]) -> TokenDivergence:
    """One model over records; intervals are 95 %, those of means by resampling records."""
    tokens = [record.tokens for record in records]
    together = Divergence.joined(records)
    return TokenDivergence(
        tokens=together.tokens,
        perplexity=statistics.perplexity([float(record.nll.sum()) for record in records], tokens),
        mean_kl=mean_per_token([float(record.kl.sum()) for record in records], tokens),
        p99_kl=float(np.percentile(together.kl, 99)),
        top1_agreement=statistics.wilson(int(together.same_top.sum()), together.tokens),
    )


def mean_per_token(sums: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """Token-weighted mean over records; of paired differences too, where a sum may be negative."""
    return statistics.bootstrap(statistics.ratio, np.column_stack([sums, tokens]).astype(np.float64))
