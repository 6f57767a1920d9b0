"""Endless repetition: does a sequence of tokens end in a cycle that has been gone through again and again?

Small models, greedy decoding and hard quantization fall into such cycles (Holtzman et al. 2020,
https://arxiv.org/abs/1904.09751, section 3) and rarely leave them. Only exact repetition counts: a list whose numbers
go up is none.
"""

from __future__ import annotations

from collections.abc import Sequence

REPEATS = 4  # a refrain comes two or three times in ordinary text
SHORTEST = 48  # tokens of the whole repetition: rulers, tables and "0 0 0 0" repeat a few tokens rightly
LONGEST_PERIOD = 256  # tokens: a paragraph


def ending_cycle(tokens: Sequence[int]) -> int | None:
    """The period (tokens) of the cycle that ``tokens`` end in, the shortest there is; None where they end in none.

    A cycle has been gone through at least REPEATS times and over at least SHORTEST tokens. The cycle may be cut off
    anywhere in its last round. Takes some tens of microseconds where nothing repeats.
    """
    end = list(tokens[-(REPEATS * LONGEST_PERIOD) :])
    for period in range(1, min(LONGEST_PERIOD, len(end) // REPEATS) + 1):
        if end[-1] != end[-1 - period]:
            continue  # mostly this settles it
        length = max(SHORTEST, REPEATS * period)
        if len(end) >= length and end[-length:-period] == end[period - length :]:
            return period
    return None
