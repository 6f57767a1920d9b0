"""What one browser tab asked and was told. Each tab has a conversation of its own, with a session for each model."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from chat import web_texts
from chat.safety import RedFlagWatch
from chat.session import SEEDS, ChatModel, Event, Sampling, Session
from chat.web_queue import AnswerQueue, Exchange, Generation
from pipeline.errors import MedcotError

MOST_MODELS = 2


@dataclass(frozen=True)
class WebModel:
    """A loaded model and the name that its column bears."""

    name: str
    model: ChatModel


@dataclass(frozen=True)
class WebSettings:
    """What a page starts with.

    ``temperature`` and ``top_p`` None: by model. ``seed`` None: another one for each conversation; all its models share
    it. ``thought_budget`` as ``Session`` has it.
    """

    watch: RedFlagWatch
    max_new_tokens: int = 1024
    thought_budget: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def sampling(self, model: ChatModel, seed: int) -> Sampling:
        return Sampling.for_model(model, temperature=self.temperature, top_p=self.top_p, seed=seed)


@dataclass(frozen=True)
class Controls:
    """Where the page's sliders stand when a question is sent."""

    temperature: float
    max_new_tokens: int
    thought_budget: int | None


def check_number(models: int) -> None:
    """Raises MedcotError for more models than a page has columns."""
    if not 1 <= models <= MOST_MODELS:
        raise MedcotError(f"A page shows one model, or two side by side, not {models}: name one or two GGUFs.")


class Conversation:
    """``exchanges`` are all there were; asking raises MedcotError, one sentence for the page, for what cannot be asked.

    The models share one ``queue``.
    """

    def __init__(self, models: Sequence[WebModel], settings: WebSettings, queue: AnswerQueue) -> None:
        self._models = models
        self._settings = settings
        self._queue = queue
        self._seed = secrets.randbelow(SEEDS) if self._settings.seed is None else self._settings.seed
        self.exchanges: list[Exchange] = []
        self._sessions = [Session(each.model, self._settings.sampling(each.model, self._seed)) for each in self._models]

    @property
    def last(self) -> Exchange | None:
        return self.exchanges[-1] if self.exchanges else None

    def ask(self, question: str, controls: Controls) -> Exchange:
        """Put a question into the line."""
        self._check_idle()
        question = question.strip()
        if not question:
            raise MedcotError(web_texts.NOTHING_ASKED)
        self._set(controls)
        generations = [
            Generation(each.name, session, partial(session.ask, question))
            for each, session in zip(self._models, self._sessions, strict=True)
        ]
        return self._submit(question, self._seed, generations)

    def retry(self, controls: Controls) -> Exchange:
        """Put the last question into the line again, with the next seed; its answers replace the last ones."""
        self._check_idle()
        if not self.exchanges:
            raise MedcotError(web_texts.NOTHING_TO_RETRY)
        self._set(controls)
        before = self.exchanges.pop()
        seed = (before.seed + 1) % SEEDS
        generations = [
            Generation(old.name, old.session, _again(old, before.question, seed)) for old in before.generations
        ]
        return self._submit(before.question, seed, generations)

    def place(self) -> int:
        """How many questions come before the last one of this conversation."""
        return 0 if self.last is None else self._queue.place(self.last)

    def stop(self, exchange: Exchange | None = None) -> None:
        """End the answer under way, or leave the line; the last exchange's unless another is named."""
        exchange = exchange or self.last
        if exchange is not None:
            self._queue.stop(exchange)

    def answer_now(self) -> None:
        if self.last is not None:
            self.last.answer_now()

    def _submit(self, question: str, seed: int, generations: Sequence[Generation]) -> Exchange:
        exchange = Exchange(question, seed, self._settings.watch.warning(question), generations)
        self.exchanges.append(exchange)
        self._queue.submit(exchange)
        return exchange

    def _set(self, controls: Controls) -> None:
        for session in self._sessions:
            session.sampling = replace(session.sampling, temperature=controls.temperature)
            session.max_new_tokens = controls.max_new_tokens
            session.thought_budget = controls.thought_budget

    def _check_idle(self) -> None:
        if self.last is not None and not self.last.finished:
            raise MedcotError(web_texts.STILL_ANSWERING)


def _again(old: Generation, question: str, seed: int) -> Callable[[], Generator[Event, None, None]]:
    """Asks ``question`` again: in place of the old turn, or anew where the old answer never came about."""
    return partial(old.session.ask, question, seed) if old.turn is None else partial(old.session.retry, seed)
