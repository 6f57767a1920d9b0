"""An answer while it is made: its text in two parts, its tokens and its times."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from chat.turn import ClosedBy, Finished, Piece, ThoughtEnded, Turn
from pipeline.loops import ending_cycle
from pipeline.thought import Part, ThoughtParser, parse_output

_CHECK_EVERY = 16  # tokens between two looks for a loop


class AnswerInProgress:
    """Collects an output while it is streamed; ``ids`` are all tokens behind the prompt, written by whomever."""

    def __init__(self, question: str, seed: int, opens_thought: bool) -> None:
        self.question = question
        self.seed = seed
        self.ids: list[int] = []
        self.generated = 0
        self.prompt_tokens = self.reused_tokens = 0
        self.thought_closed_by: ClosedBy | None = None
        self._opens_thought = opens_thought
        self._parser = ThoughtParser(opens_thought)
        self._text: list[str] = []
        self._tokens: dict[Part, int] = {"thought": 0, "answer": 0}
        self._seconds: dict[Part, float] = {"thought": 0.0, "answer": 0.0}
        self._undecided = 0  # tokens that may be the beginning of a tag, or of a character
        self._next_check = _CHECK_EVERY
        self._started = self._first_token = self._last_token = self._counted_until = time.perf_counter()

    @property
    def part(self) -> Part:
        return self._parser.part

    @property
    def thought_tokens(self) -> int:
        """Of the thought so far, without what may turn out to be the beginning of its end."""
        return self._tokens["thought"]

    def count(self, ids: Iterator[int]) -> Iterator[int]:
        """Pass generated ids on."""
        for token in ids:
            self._last_token = time.perf_counter()
            if self.generated == 0:
                self._first_token = self._counted_until = self._last_token
            self.ids.append(token)
            self.generated += 1
            self._undecided += 1
            yield token

    def take(self, text: str) -> list[Piece | ThoughtEnded]:
        """The next generated text, as the pieces that are certain by now."""
        return self._feed(text, "model")

    def put(self, ids: Sequence[int], text: str, closed_by: ClosedBy) -> list[Piece | ThoughtEnded]:
        """The end of a thought, or a whole empty one, that the model did not write."""
        self._attribute("thought")
        self.ids.extend(ids)
        self.thought_closed_by = closed_by
        return self._feed(text, closed_by)

    def rest(self) -> list[Piece]:
        """What was held back as the possible beginning of a tag."""
        return [Piece(part, piece) for part, piece in self._parser.finish()]

    def loops(self) -> bool:
        """Whether the output ends in a cycle; looked for every few tokens only."""
        if len(self.ids) < self._next_check:
            return False
        self._next_check = len(self.ids) + _CHECK_EVERY
        return ending_cycle(self.ids) is not None

    def turn(self, finished: Finished, context_size: int) -> Turn:
        self._attribute(self.part)
        parsed = parse_output("".join(self._text), self._opens_thought)
        generating = self._last_token - self._first_token
        return Turn(
            question=self.question,
            thought=parsed.thought,
            answer=parsed.answer,
            finished=finished,
            thought_closed_by=self.thought_closed_by,
            seed=self.seed,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            thought_tokens=self._tokens["thought"],
            answer_tokens=self._tokens["answer"],
            context_tokens=self.prompt_tokens + len(self.ids),
            context_size=context_size,
            seconds=time.perf_counter() - self._started,
            time_to_first_token=self._first_token - self._started if self.generated else None,
            thought_seconds=self._seconds["thought"],
            answer_seconds=self._seconds["answer"],
            tokens_per_second=(self.generated - 1) / generating if generating > 0 else None,
        )

    def _feed(self, text: str, writer: ClosedBy) -> list[Piece | ThoughtEnded]:
        self._text.append(text)
        before = self.part
        events: list[Piece | ThoughtEnded] = [Piece(part, piece) for part, piece in self._parser.feed(text)]
        if self.part != before:
            self._attribute("thought")  # its tags belong to it
        elif events:
            self._attribute(before)
        if (before, self.part) == ("thought", "answer"):
            self.thought_closed_by = writer
            of_thought = sum(isinstance(event, Piece) and event.part == "thought" for event in events)
            events.insert(of_thought, ThoughtEnded(self._tokens["thought"], self._seconds["thought"], writer))
        return events

    def _attribute(self, part: Part) -> None:
        self._tokens[part] += self._undecided
        self._seconds[part] += self._last_token - self._counted_until
        self._undecided, self._counted_until = 0, self._last_token
