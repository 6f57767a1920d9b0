"""How far each quantization may be from the model it was made of, and what was measured of honest ones."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import LlamaFileType as F

from pipeline.config import VerifyConfig

_KL_MARGIN = 3.0
_TOP1_MARGIN = 2.0
# The base does not know the conversations' form and is compared on one only: Q4_K_M of SmolLM2 0.103 nats, not 0.058.
_BASE_FACTOR = 2.0


@dataclass(frozen=True)
class Measured:
    """Honest exports against 32 bit: Kullback-Leibler divergence (nats a token) and agreement of the likeliest token.

    SmolLM2-135M tuned on the sample, the worst of 8 held-out conversations of some 350 tokens (LOG.md); it is the
    smallest model that we ship, so the one that quantization hurts most, but most of its tensors are too narrow for
    the K-quants and get a type of more bits. Therefore also Llama-3-8B on WikiText-2, from llama.cpp's
    tools/perplexity/README.md, without importance matrix where there are both.
    """

    smollm2_kl: float
    smollm2_top1: float
    llama3_8b_kl: float


@dataclass(frozen=True)
class LogitLimits:
    """None where a figure is not limited: unquantized files have to meet the error, the others the divergence."""

    max_nmse: float | None
    max_mean_kl: float | None
    min_top1: float


MEASURED = {
    F.MOSTLY_Q8_0: Measured(0.0043, 0.949, 0.0014),
    F.MOSTLY_Q6_K: Measured(0.0107, 0.911, 0.0055),
    F.MOSTLY_Q5_K_M: Measured(0.0618, 0.866, 0.0108),
    F.MOSTLY_Q5_K_S: Measured(0.0785, 0.836, 0.0166),
    F.MOSTLY_Q4_K_M: Measured(0.0584, 0.863, 0.0313),
    F.MOSTLY_Q4_K_S: Measured(0.1083, 0.827, 0.0431),
    F.MOSTLY_IQ4_XS: Measured(0.1866, 0.765, 0.0363),
    F.MOSTLY_Q4_0: Measured(0.2760, 0.702, 0.0719),
    F.MOSTLY_Q3_K_M: Measured(0.1812, 0.778, 0.1019),
    F.MOSTLY_Q2_K: Measured(0.4146, 0.657, 0.4451),
}
# bfloat16 rounds weights and, in llama.cpp, activations to 8 bits: 98 to 99 % on SmolLM2, 99.7 % on Llama-3-8B.
_BF16_MIN_TOP1 = 0.96
_EXACT = (F.ALL_F32, F.MOSTLY_F16, F.MOSTLY_BF16)


def limits_of(file_type: int, thresholds: VerifyConfig, *, is_base: bool = False) -> LogitLimits:
    """Limits for a file by its ``general.file_type``; one of a type that we do not write gets those of the coarsest."""
    margin = _BASE_FACTOR if is_base else 1.0
    if file_type in _EXACT:
        top1 = thresholds.min_top1_agreement
        return LogitLimits(
            thresholds.max_logit_nmse, None, min(top1, _BF16_MIN_TOP1) if file_type == F.MOSTLY_BF16 else top1
        )
    by_number = {number.value: measured for number, measured in MEASURED.items()}
    measured = by_number.get(file_type, MEASURED[F.MOSTLY_Q2_K])
    return LogitLimits(
        max_nmse=None,
        max_mean_kl=margin * _KL_MARGIN * max(measured.smollm2_kl, measured.llama3_8b_kl),
        min_top1=max(0.0, 1 - margin * _TOP1_MARGIN * (1 - measured.smollm2_top1)),
    )


def type_name(file_type: int) -> str:
    """As users know it: Q4_K_M, F32; a number that this gguf library does not know stays one."""
    known = {each.value: each.name for each in F}
    return known.get(file_type, f"type {file_type}").removeprefix("MOSTLY_").removeprefix("ALL_")
