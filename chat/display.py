"""How events of a session look in a terminal, in a pipe, and as JSON.

A model's text is printed as it is, never as rich markup, and with its control characters made visible: an
escape sequence that a model emits must not reach the terminal.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from chat.safety import RedFlagWatch
from chat.turn import ClosedBy, Done, Event, Forgotten, Piece, Reading, ThoughtEnded, Turn
from pipeline.thought import Part

if TYPE_CHECKING:
    from chat.markdown_stream import MarkdownStream

_REDRAW_SECONDS = 0.2  # of the one line that stands for a thought under way
# Between two flushes of what streams: each wakes the terminal, which on a small machine takes a core from the model.
_FLUSH_SECONDS = 0.03
_CLOSED_BY: dict[ClosedBy, str] = {
    "model": "",
    "budget": ", ended by its budget",
    "user": ", ended by you",
    "loop": ", ended because it repeated itself",
}

# C0 controls but for tab and newline become their Unicode pictures, carriage returns vanish, DEL and C1
# (whose U+009B begins an escape sequence too) become the replacement character, and so do the marks that
# turn the direction of text, with which a line can be made to read otherwise than it was written.
_HARMLESS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"},
    ord("\r"): None,
    **dict.fromkeys([*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
}


def harmless(text: str) -> str:
    """``text`` without anything a terminal would obey."""
    return text.translate(_HARMLESS)


def write(console: Console, text: str, style: str = "") -> None:
    """Print ``text`` as it is, at once: no markup, no wrapping, tabs stay tabs.

    Not through rich's ``print``, which takes 60 microseconds: a hundredth of a small model's token.
    """
    _put(console, text, style)
    console.file.flush()


def _put(console: Console, text: str, style: str = "") -> None:
    console.file.write(_style(style).render(text, color_system=_COLORS if console.is_terminal else None))


_COLORS = ColorSystem.STANDARD
_style = lru_cache(Style.parse)


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

    @property
    def moves_cursor(self) -> bool:
        """Whether what was printed to the terminal can be printed over."""
        return self.in_terminal and not self.answer.is_dumb_terminal and not self.answer.legacy_windows

    def note(self, text: str) -> None:
        """A line from the program, not from the model."""
        write(self.status, harmless(text) + "\n", "dim italic")


class StreamingDisplay:
    """Shows one turn while it is made: the thought dimmed, or folded to one line; the answer as Markdown.

    In a pipe the answer is plain, and nothing but it goes to standard output.
    """

    def __init__(self, streams: Streams, folded: bool) -> None:
        self._streams = streams
        self._folded = folded
        self._part: Part | None = None
        self._markdown = _markdown_stream(streams.answer) if streams.moves_cursor else None
        self._thought = ""
        self._thought_began = self._drawn = self._flushed = 0.0
        self._has_line = False

    def show(self, event: Event) -> None:
        """Print what ``event`` tells; of pieces that follow each other closely, some only with the next ones."""
        match event:
            case Forgotten(turns):
                self._streams.note(_describe_forgotten(turns))
            case Reading(tokens, prompt_tokens):
                self._draw_line(f"· reading {prompt_tokens:,} tokens: {tokens / prompt_tokens:.0%}")
            case Piece("thought", text):
                self._enter("thought")
                self._show_thought(text)
                self._flush_if_due()
            case Piece("answer", text):
                self._enter("answer")
                self._show_answer(text)
                self._flush_if_due()
            case ThoughtEnded():
                self._end_thought(event)
            case Done(turn):
                self.end(turn)

    def end(self, turn: Turn) -> None:
        """Close the turn with its figures; also for one that was stopped before it was done."""
        self._clear_line()
        if self._part == "thought" and not self._folded:
            write(self._streams.status, "\n")
        elif self._part == "answer":
            self._end_answer()
        self._part = None
        self._streams.note(_describe_turn(turn))

    def _enter(self, part: Part) -> None:
        if part == self._part:
            return
        self._clear_line()
        if self._part == "answer" and self._streams.in_terminal:
            self._end_answer()
        if part == "thought":
            self._thought_began = time.monotonic()
            if not self._folded:
                write(self._streams.status, "Thought\n", "bold dim")
            elif not self._streams.moves_cursor:
                write(self._streams.status, "Thinking ...\n", "bold dim")
        self._part = part

    def _show_thought(self, text: str) -> None:
        if not self._folded:
            _put(self._streams.status, harmless(text), "dim")
            return
        self._thought = (self._thought + text)[-1000:]
        seconds = time.monotonic() - self._thought_began
        self._draw_line(f"· thinking, {seconds:.0f} s ", " ".join(self._thought.split()))

    def _show_answer(self, text: str) -> None:
        if self._markdown is None:
            _put(self._streams.answer, harmless(text))
        else:
            self._markdown.feed(text)

    def _flush_if_due(self) -> None:
        now = time.monotonic()
        if now - self._flushed >= _FLUSH_SECONDS:
            self._streams.answer.file.flush()
            self._streams.status.file.flush()
            self._flushed = now

    def _end_thought(self, ended: ThoughtEnded) -> None:
        self._clear_line()
        if self._part == "thought" and not self._folded:
            write(self._streams.status, "\n")
        if ended.tokens:
            hint = " (/thought shows it)" if self._folded and self._streams.in_terminal else ""
            self._streams.note(f"· thought {ended.tokens:,} tokens, {ended.seconds:.0f} s{_CLOSED_BY[ended.by]}{hint}")
        if self._streams.in_terminal:
            write(self._streams.status, "\n")
        self._part = None

    def _end_answer(self) -> None:
        if self._markdown is None:
            write(self._streams.answer, "\n")
        else:
            self._markdown.finish()

    def _draw_line(self, beginning: str, ending: str = "") -> None:
        """One line in a terminal that the next one replaces; of ``ending`` only as much of its end as fits."""
        now = time.monotonic()
        if not self._streams.moves_cursor or (self._has_line and now - self._drawn < _REDRAW_SECONDS):
            return
        width = self._streams.status.width - 1
        tail = harmless(ending)[-width:]
        while tail and cell_len(beginning + tail) > width:
            tail = tail[1:]
        write(self._streams.status, "\r\x1b[K" + beginning + tail, "dim")
        self._has_line, self._drawn = True, now

    def _clear_line(self) -> None:
        if self._has_line:
            write(self._streams.status, "\r\x1b[K")
        self._has_line = False


def _markdown_stream(console: Console) -> MarkdownStream:
    from chat.markdown_stream import MarkdownStream  # takes long to import, and the prompt need not wait

    return MarkdownStream(console, harmless)


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
    filled = turn.context_tokens / turn.context_size
    figures.append(f"context {turn.context_tokens:,} of {turn.context_size:,} ({filled:.0%})")
    if turn.finished == "stopped":
        figures.append("stopped")
    elif turn.finished == "looped":
        figures.append("ended, because it repeated itself endlessly: /retry takes another seed")
    elif turn.finished == "length":
        hint = "" if turn.answer else " before the answer: raise it (max_tokens) or give the thought a budget (think)"
        figures.append("cut off at the token limit" + hint)
    elif not turn.answer:
        figures.append("the model ended without an answer")
    return "[" + ", ".join(figures) + "]"


def _describe_forgotten(turns: tuple[Turn, ...]) -> str:
    questions = ", ".join(f'"{_shorten(turn.question)}"' for turn in turns)
    return f"Forgotten, because the context is full: {questions}."


def _shorten(text: str, limit: int = 50) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
