"""Answers to questions, made one at a time in a thread of their own, and watched by pages while they grow.

All models of a page share the processor's cores, so one worker serves them all: two columns are filled one after the
other, and their tokens per second can be compared. Who asks meanwhile waits in line.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Literal

from chat.session import Done, Event, Forgotten, Piece, Reading, Session, ThoughtEnded, Turn
from pipeline.errors import MedcotError
from pipeline.thought import Part

State = Literal["waiting", "reading", "thinking", "answering", "done", "failed"]


class Generation:
    """One model's answer to one question: written by the worker's thread, read by whoever shows it.

    ``begin`` starts it on ``session``. ``turn`` is there when ``state`` is "done", ``problem`` when it is "failed".
    """

    def __init__(self, name: str, session: Session, begin: Callable[[], Generator[Event, None, None]]) -> None:
        self.name = name
        self.session = session
        self.state: State = "waiting"
        self.reading: Reading | None = None
        self.forgotten: tuple[Turn, ...] = ()
        self.turn: Turn | None = None
        self.problem: str | None = None
        self._begin = begin
        self._texts: dict[Part, str] = {"thought": "", "answer": ""}
        self._thought_began = 0.0
        self._thought_ended: ThoughtEnded | None = None
        self._stop, self._answer_now = threading.Event(), threading.Event()

    @property
    def finished(self) -> bool:
        return self.state in ("done", "failed")

    @property
    def thought(self) -> str:
        return self._texts["thought"] if self.turn is None else self.turn.thought or ""

    @property
    def answer(self) -> str:
        return self._texts["answer"] if self.turn is None else self.turn.answer

    @property
    def thought_seconds(self) -> float:
        """Of the thought so far, or of the whole one."""
        if self.turn is not None:
            return self.turn.thought_seconds
        if self._thought_ended is not None:
            return self._thought_ended.seconds
        return time.perf_counter() - self._thought_began if self._thought_began else 0.0

    def stop(self) -> None:
        self._stop.set()
        self.session.stop()

    def answer_now(self) -> None:
        self._answer_now.set()

    def withdraw(self) -> None:
        """End it before it began."""
        self._fail("Stopped before it was this question's turn.")

    def run(self) -> None:
        """Make the answer, in the caller's thread."""
        if self._stop.is_set():
            self.withdraw()
            return
        self.state = "reading"
        try:
            with closing(self._begin()) as events:
                for event in events:
                    self._take(event)
                    # A session forgets, when it begins, what it was told before.
                    if self._stop.is_set():
                        self.session.stop()
                    if self._answer_now.is_set():
                        self._answer_now.clear()
                        self.session.answer_now()
        except MedcotError as error:
            self._fail(str(error))
        except Exception:
            logging.exception("An answer broke off.")
            self._fail("The answer broke off through a fault in medcot or in llama.cpp: the server's output has it.")

    def _take(self, event: Event) -> None:
        match event:
            case Forgotten(turns):
                self.forgotten = turns
            case Reading():
                self.reading = event
            case Piece(part, text):
                if part == "thought" and not self._thought_began:
                    self._thought_began = time.perf_counter()
                self._texts[part] += text
                self.state = "thinking" if part == "thought" else "answering"
            case ThoughtEnded():
                self._thought_ended = event
                self.state = "answering"
            case Done(turn):
                self.turn = turn
                self.state = "done"

    def _fail(self, problem: str) -> None:
        self.problem = problem
        self.state = "failed"


class Exchange:
    """One question, its warning, and the answers to it, which are made in this order."""

    def __init__(self, question: str, seed: int, warning: str | None, generations: Sequence[Generation]) -> None:
        self.question = question
        self.seed = seed
        self.warning = warning
        self.generations = tuple(generations)

    @property
    def finished(self) -> bool:
        return all(generation.finished for generation in self.generations)

    def answer_now(self) -> None:
        """Of the answer under way."""
        for generation in self.generations:
            if generation.state in ("reading", "thinking"):
                generation.answer_now()


class AnswerQueue:
    """Answers exchanges in the order in which they were submitted."""

    def __init__(self) -> None:
        self._waiting: deque[Exchange] = deque()
        self._changed = threading.Condition()
        self._answering: Exchange | None = None
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="answers", daemon=True)
        self._worker.start()

    def submit(self, exchange: Exchange) -> None:
        with self._changed:
            self._waiting.append(exchange)
            self._changed.notify()

    def place(self, exchange: Exchange) -> int:
        """How many questions come before this one; 0 when it is being answered or done."""
        with self._changed:
            if exchange not in self._waiting:
                return 0
            return self._waiting.index(exchange) + (self._answering is not None)

    def stop(self, exchange: Exchange) -> None:
        """What was said by then stays; an exchange that waits leaves the line."""
        with self._changed:
            if exchange in self._waiting:
                self._waiting.remove(exchange)
                for generation in exchange.generations:
                    generation.withdraw()
            elif exchange is self._answering:
                for generation in exchange.generations:
                    generation.stop()

    def close(self) -> None:
        """Stop everything and wait until no model is in use any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        for exchange in (*self._waiting, *filter(None, [self._answering])):
            self.stop(exchange)
        self._worker.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._answering = None
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._answering = self._waiting.popleft()
            for generation in self._answering.generations:
                generation.run()
