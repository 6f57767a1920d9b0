"""The smallest file inside the budgets, and why."""

import pytest

from bench.recommendation import recommend
from pipeline.config import QualityBudget
from pipeline.results import Estimate, FileQuality, Recommendation, Speed, TokenDivergence

BUDGET = QualityBudget.model_validate({"max_mean_kl": 0.1, "min_top1_agreement": 0.85})


def speed_of(model: str, size: int, memory: float) -> Speed:
    return Speed(
        model=model, engine="llama.cpp", weights=model, file_bytes=size, load_seconds=1.0, prompt_tokens=1,
        prompt_tokens_per_second=[1.0], generated_tokens=1, generated_tokens_per_second=[1.0],
        time_to_first_token_seconds=[1.0], peak_memory_bytes=int(memory * 1e9),
    )  # fmt: skip


def quality_of(model: str, kl: float, top1: float) -> FileQuality:
    def certain(value: float) -> Estimate:
        return Estimate(value=value, low=value, high=value, n=8)

    part = TokenDivergence(
        tokens=800, perplexity=certain(9), mean_kl=certain(kl), p99_kl=kl, top1_agreement=certain(top1)
    )
    return FileQuality(model=model, reference="F16", records=8, whole=part, reasoning=None, answer=part)


SPEEDS = [speed_of("F16", 160, 16.5), speed_of("Q4", 50, 5.5), speed_of("Q2", 30, 3.5), speed_of("other", 1, 0.1)]


def chosen(two_bits: tuple[float, float], memory: float | None = 8.0, budget: QualityBudget = BUDGET) -> Recommendation:
    quality = [quality_of("F16", 0.0, 1.0), quality_of("Q4", 0.04, 0.9), quality_of("Q2", *two_bits)]
    return recommend(SPEEDS, quality, budget, memory)


def test_the_smallest_that_is_good_enough() -> None:
    assert chosen((0.09, 0.86)).model == "Q2"
    diverging = chosen((0.4, 0.86))
    assert diverging.model == "Q4"
    assert "0.040 nats" in diverging.reason and "90.0%" in diverging.reason
    assert "Q2 diverges by 0.400 nats a token (at most 0.1)" in diverging.reason
    disagreeing = chosen((0.09, 0.6))
    assert disagreeing.model == "Q4" and "60.0% (at least 85.0%)" in disagreeing.reason


def test_nothing_inside_the_budgets_is_said() -> None:
    none = chosen((0.4, 0.6), memory=5.0)
    assert none.model is None
    assert "Q4 takes 5.5 GB of memory (at most 5)" in none.reason and "F16 takes 16.5 GB" in none.reason
    strict = BUDGET.model_copy(update={"max_mean_kl": 0.001})
    assert chosen((0.4, 0.6), memory=None, budget=strict).model == "F16"


@pytest.mark.parametrize("speeds", [[], SPEEDS])
def test_without_quality_there_is_none(speeds: list[Speed]) -> None:
    found = recommend(speeds, [], BUDGET, None)
    assert found.model is None and "quality was not measured" in found.reason
