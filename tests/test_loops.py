"""Repetition is told from text that merely repeats something."""

import random
import time

import pytest

from pipeline.loops import LONGEST_PERIOD, REPEATS, SHORTEST, ending_cycle


@pytest.mark.parametrize("period", [1, 2, 3, 7, 12, 13, 50, LONGEST_PERIOD])
@pytest.mark.parametrize("cut", [0, 1])
def test_a_cycle_is_found_with_its_period_wherever_it_is_cut(period: int, cut: int) -> None:
    before, cycle = list(range(10_000, 10_100)), list(range(period))
    rounds = max(REPEATS, -(-SHORTEST // period)) + 1
    tokens = before + cycle * rounds
    assert ending_cycle(tokens[: len(tokens) - cut % period]) == period


@pytest.mark.parametrize("period", [1, 5, 12, 50])
def test_one_token_less_than_a_cycle_needs_is_none(period: int) -> None:
    needed = max(SHORTEST, REPEATS * period)
    endless = [index % period for index in range(needed + period)]
    assert ending_cycle([-1, *endless[:needed]]) == period
    assert ending_cycle([-1, *endless[: needed - 1]]) is None


def test_a_cycle_that_was_left_is_none() -> None:
    assert ending_cycle([1, 2, 3] * 100 + [4]) is None


def test_a_counting_list_and_random_tokens_are_none() -> None:
    counting = [token for number in range(100) for token in (7, 8, 1000 + number, 9)]
    assert ending_cycle(counting) is None
    generator = random.Random(0)
    assert ending_cycle([generator.randrange(3) for _ in range(5000)]) is None
    assert ending_cycle([]) is None
    assert ending_cycle([5]) is None


def test_a_period_beyond_the_longest_is_not_looked_for() -> None:
    assert ending_cycle(list(range(LONGEST_PERIOD + 1)) * 10) is None


def test_looking_at_text_without_repetition_takes_less_than_a_token_takes() -> None:
    generator = random.Random(0)
    tokens = [generator.randrange(50_000) for _ in range(4000)]
    started = time.process_time()
    for _ in range(100):
        ending_cycle(tokens)
    assert (time.process_time() - started) / 100 < 1e-3
