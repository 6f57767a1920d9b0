"""One question with what the model said to it, and the events that tell of it while it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.thought import Part

Finished = Literal["end", "length", "stopped", "looped"]
ClosedBy = Literal["model", "budget", "user", "loop"]


class Turn(BaseModel):
    """A question, its answer, and what they took; all seconds are wall time.

    ``finished``: the model ended its turn, ran into the limit of tokens or the context's end, was stopped, or repeated
    itself endlessly. ``thought_closed_by``: who ended the thought, the model itself, the thought budget, the user (who
    wanted the answer now), or its endless repetition; None where no thought was ended.

    ``seconds`` is the whole turn; ``time_to_first_token`` begins with it and is None where there was no token. From the
    first token on ``thought_seconds`` and ``answer_seconds`` share the time, as ``thought_tokens`` (the tags among
    them) and ``answer_tokens`` share the generated tokens. ``tokens_per_second`` is the pace of generation, so without
    the prompt and the first token, and None below two tokens.

    Of ``prompt_tokens``, the conversation that the model was shown, ``reused_tokens`` were still in its cache.
    ``context_tokens`` of ``context_size`` were filled when the turn ended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    question: str
    thought: str | None
    answer: str
    finished: Finished
    thought_closed_by: ClosedBy | None
    seed: int
    prompt_tokens: int
    reused_tokens: int
    thought_tokens: int
    answer_tokens: int
    context_tokens: int
    context_size: int
    seconds: float
    time_to_first_token: float | None
    thought_seconds: float
    answer_seconds: float
    tokens_per_second: float | None

    @property
    def tokens(self) -> int:
        """All that were generated."""
        return self.thought_tokens + self.answer_tokens


@dataclass(frozen=True)
class Forgotten:
    """Old turns left the conversation: with them, prompt and answer would not fit the context."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Reading:
    """A long prompt is being evaluated: so many of its tokens are done. A short one comes without this."""

    tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """The next stretch of thought or answer."""

    part: Part
    text: str


@dataclass(frozen=True)
class ThoughtEnded:
    """The thought is closed, by whom and after what; the answer follows. None comes for a thought never closed."""

    tokens: int
    seconds: float
    by: ClosedBy


@dataclass(frozen=True)
class Done:
    """The turn as it went into the history."""

    turn: Turn


Event = Forgotten | Reading | Piece | ThoughtEnded | Done
