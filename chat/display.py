"""How events of a session look in a terminal, in a pipe, and as JSON.

A model's text is printed as it is, never as rich markup, and with its control characters made visible: an
escape sequence that a model emits must not reach the terminal.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from chat.safety import RedFlagWatch
from chat.turn import Done, Event, Forgotten, Piece, Reading, Turn
from pipeline.thought import Part

# C0 controls but for tab and newline become their Unicode pictures, carriage returns vanish, DEL and C1
# (whose U+009B begins an escape sequence too) become the replacement character.
_HARMLESS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"},
    ord("\r"): None,
    **dict.fromkeys(range(0x7F, 0xA0), 0xFFFD),
}


def harmless(text: str) -> str:
    """``text`` without anything a terminal would obey."""
    return text.translate(_HARMLESS)


def write(console: Console, text: str, style: str = "") -> None:
    """Print ``text`` as it is: no markup, no wrapping, tabs stay tabs."""
    console.print(Segments([Segment(text, Style.parse(style))]), crop=False)


@dataclass(frozen=True)
class Streams:
    """Where things are printed: ``answer`` is standard output; ``status`` is the same only in a terminal."""

    answer: Console
    status: Console

    @classmethod
    def standard(cls) -> Streams:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # an encoding without "µ" must not end an answer
        answer = Console()
        # Rich takes some environments (FORCE_COLOR) for a terminal; a redirected answer is never in one.
        return cls(answer, answer if sys.stdout.isatty() else Console(stderr=True))

    @property
    def in_terminal(self) -> bool:
        return self.answer is self.status

    def note(self, text: str) -> None:
        """A line from the program, not from the model."""
        write(self.status, harmless(text) + "\n", "dim italic")


class StreamingDisplay:
    """Shows one turn while it is made: the thought dimmed and headed, the answer plain."""

    def __init__(self, streams: Streams, show_thought: bool) -> None:
        self._streams = streams
        self._show_thought = show_thought
        self._part: Part | None = None

    def show(self, event: Event) -> None:
        match event:
            case Forgotten(turns):
                self._streams.note(_describe_forgotten(turns))
            case Reading():
                pass
            case Piece(part, text):
                self._enter(part)
                self._print(part, harmless(text))
            case Done(turn):
                self.end(turn)

    def end(self, turn: Turn) -> None:
        """Close the turn with its figures; also for one that was stopped before it was done."""
        if self._part is not None:
            self._print(self._part, "\n")
        self._part = None
        self._streams.note(_describe_turn(turn))

    def _enter(self, part: Part) -> None:
        if part == self._part:
            return
        if self._part == "thought" or (self._part == "answer" and self._streams.in_terminal):
            self._print(self._part, "\n")
        if part == "thought":
            write(self._streams.status, "Thought\n" if self._show_thought else "Thinking ...\n", "bold dim")
        elif self._part == "thought" and self._streams.in_terminal:
            write(self._streams.answer, "\nAnswer\n", "bold")
        self._part = part

    def _print(self, part: Part, text: str) -> None:
        if part == "answer":
            write(self._streams.answer, text)
        elif self._show_thought:
            write(self._streams.status, text, "dim")


def turn_as_json(model_name: str, turn: Turn, watch: RedFlagWatch) -> str:
    """One turn as one JSON document; in ASCII, so it survives any terminal, pipe and locale.

    ``red_flags`` are the emergencies that the question may tell of, whatever the model made of it.
    """
    figures = turn.model_dump(mode="json")
    document = {
        "model": model_name,
        "question": figures.pop("question"),
        "red_flags": [
            {
                "id": flag.id,
                "title": flag.title,
                "form": flag.form,
                "quote": flag.quote,
                "message": watch.message(flag),
            }
            for flag in watch.flags(turn.question)
        ],
        "thought": figures.pop("thought"),
        "answer": figures.pop("answer"),
        "tokens": turn.tokens,
        **{name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()},
    }
    return json.dumps(document, indent=2)


def _describe_turn(turn: Turn) -> str:
    figures = [f"{turn.tokens} tokens in {turn.seconds:.1f} s"]
    if turn.tokens_per_second is not None:
        figures.insert(0, f"{turn.tokens_per_second:.1f} tokens/s")
    if turn.time_to_first_token is not None:
        figures.append(f"first token after {turn.time_to_first_token:.2f} s")
    if turn.finished == "stopped":
        figures.append("stopped")
    elif turn.finished == "looped":
        figures.append("ended, because it repeated itself endlessly")
    elif turn.finished == "length":
        figures.append("cut off at the token limit" + ("" if turn.answer else " before the answer: raise the limit"))
    elif not turn.answer:
        figures.append("the model ended without an answer")
    return "[" + ", ".join(figures) + "]"


def _describe_forgotten(turns: tuple[Turn, ...]) -> str:
    questions = ", ".join(f'"{_shorten(turn.question)}"' for turn in turns)
    return f"Forgotten, because the context is full: {questions}."


def _shorten(text: str, limit: int = 50) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
