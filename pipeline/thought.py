"""Telling a model's thought from its answer, in whole outputs and in streams of pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.prompts import THINK_CLOSE, THINK_OPEN

Part = Literal["thought", "answer"]


@dataclass(frozen=True)
class ParsedOutput:
    """A whole output: ``thought`` is None where there was none; ``closed`` says that the thought ended.

    ``one_thought``: exactly one, opened at the start, closed once, with something in it.
    """

    thought: str | None
    answer: str
    closed: bool
    one_thought: bool

    @property
    def well_formed(self) -> bool:
        """One thought and an answer behind it that is not empty."""
        return self.one_thought and bool(self.answer)


def parse_output(text: str, opens_thought: bool) -> ParsedOutput:
    """Split an output into thought and answer.

    ``opens_thought`` is true where the prompt already ended with ``<think>`` (R1).

    The parts equal what ThoughtParser streams, but for one case: where the opening tag is missing, a stream
    learns only at the closing tag that it was inside a thought; here that thought is a thought.
    """
    whole = THINK_OPEN + text if opens_thought and not text.lstrip().startswith(THINK_OPEN) else text
    opened, closings = whole.count(THINK_OPEN), whole.count(THINK_CLOSE)
    opening_missing = closings > 0 and THINK_OPEN not in whole.split(THINK_CLOSE, 1)[0]
    parser = ThoughtParser(opens_thought=opening_missing)
    parts: dict[Part, str] = {"thought": "", "answer": ""}
    for part, piece in (*parser.feed(whole), *parser.finish()):
        parts[part] += piece
    has_thought = opened + closings > 0
    one_thought = opened == closings == 1 and whole.lstrip().startswith(THINK_OPEN) and bool(parts["thought"])
    return ParsedOutput(
        thought=parts["thought"] if has_thought else None,
        answer=parts["answer"],
        closed=has_thought and parser.part == "answer",
        one_thought=one_thought,
    )


class ThoughtParser:
    """Tells thought from answer while text arrives in pieces of any size; tags may be split over pieces.

    Tags are never yielded, nor is white space at either end of a part; a part that is taken up again (a
    second thought) begins a new paragraph.
    """

    def __init__(self, opens_thought: bool) -> None:
        self.part: Part = "thought" if opens_thought else "answer"
        self._held = ""
        self._space = ""
        self._at_start = True
        self._begun: set[Part] = set()

    def feed(self, text: str) -> Iterator[tuple[Part, str]]:
        """Yield what is certain by now; an end that may be the beginning of a tag is held back."""
        self._held += text
        while True:
            index, tag = min(
                ((self._held.find(tag), tag) for tag in (THINK_OPEN, THINK_CLOSE) if tag in self._held),
                default=(-1, ""),
            )
            if index < 0:
                break
            yield from self._emit(self._held[:index])
            self._held = self._held[index + len(tag) :]
            self._enter("thought" if tag == THINK_OPEN else "answer")
        certain = len(self._held) - _possible_tag_start(self._held)
        ready, self._held = self._held[:certain], self._held[certain:]
        yield from self._emit(ready)

    def finish(self) -> Iterator[tuple[Part, str]]:
        """Yield what was held back when the output ends."""
        held, self._held = self._held, ""
        yield from self._emit(held)

    def _enter(self, part: Part) -> None:
        if part != self.part:
            self.part = part
            self._at_start = True
            self._space = "\n\n" if part in self._begun else ""

    def _emit(self, text: str) -> Iterator[tuple[Part, str]]:
        if self._at_start:
            text = text.lstrip()
        visible = text.rstrip()
        if not visible:
            self._space += text
            return
        piece = self._space + visible
        self._space = text[len(visible) :]
        self._at_start = False
        self._begun.add(self.part)
        yield self.part, piece


def _possible_tag_start(text: str) -> int:
    """Length of the longest end of ``text`` that could go on to become a tag."""
    for length in range(min(len(text), len(THINK_CLOSE) - 1), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in (THINK_OPEN, THINK_CLOSE)):
            return length
    return 0
