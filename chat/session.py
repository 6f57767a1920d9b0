"""A conversation with one model: what it is asked, what it answers, and what it still remembers.

Knows nothing of terminals or web pages; a page or a terminal shows the events that ``Session.ask`` yields.
"""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event as Flag
from typing import Literal, Protocol

from chat.answer import AnswerInProgress
from chat.turn import Done, Event, Finished, Forgotten, Piece, Reading, ThoughtEnded, Turn
from pipeline.errors import MedcotError
from pipeline.prompts import THINK_CLOSE, THINK_OPEN, ChatFormat, Message
from pipeline.sampling import DEFAULT_TEMPERATURE, DEFAULT_TOP_P

__all__ = [
    "ChatModel", "Done", "Event", "Finished", "Forgotten", "Piece", "Reading", "Sampling", "Session", "ThoughtEnded",
    "Turn",
]  # fmt: skip

SEEDS = 1 << 31  # llama.cpp's go from 0; its largest, 2^32 - 1, means a random one
# Characters. Vocabularies hold no longer ones but for runs of spaces, so a text of so many is too long untokenized:
# tokenizing a pasted book would take minutes.
LONGEST_TOKEN = 256


class ChatModel(Protocol):
    """What a session needs of a model; ``export.gguf_model.GgufModel`` has it."""

    @property
    def n_ctx(self) -> int: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def chat_format(self) -> ChatFormat: ...

    def read_prompt(self, ids: Sequence[int]) -> Iterator[int]:
        """Evaluate a prompt in parts; yield how many of its ids the cache holds, first those of earlier calls."""

    def generate(
        self, ids: Sequence[int], max_new_tokens: int, *, temperature: float, top_p: float, seed: int
    ) -> Iterator[int]: ...

    def stream_text(self, ids: Iterator[int]) -> Iterator[str]: ...


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; ``temperature`` 0 is greedy. ``seed`` is one for the whole conversation."""

    temperature: float
    top_p: float
    seed: int

    @classmethod
    def for_model(
        cls,
        model: ChatModel,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Sampling:
        """What the user asks for, else what the model's author wrote into the GGUF, else the defaults.

        The GGUF's keys are llama.cpp's ``general.sampling.*`` (https://github.com/ggml-org/llama.cpp/pull/17120).
        """
        return cls(
            temperature=_first(temperature, model.metadata.get("general.sampling.temp"), DEFAULT_TEMPERATURE),
            top_p=_first(top_p, model.metadata.get("general.sampling.top_p"), DEFAULT_TOP_P),
            seed=secrets.randbelow(SEEDS) if seed is None else seed,
        )


class Session:
    """``history`` holds whole turns; of them the model sees questions and answers, never thoughts.

    ``forgotten`` holds the turns before them, which the context had no more room for.

    ``sampling``, ``max_new_tokens`` (of thought and answer together) and ``thought_budget`` may be changed between two
    questions. A thought that has taken ``thought_budget`` tokens is closed and the model made to answer; 0 leaves the
    thought out, None lets it go on. ``system`` as ``set_system`` has it.

    One thread at a time may ask; ``answer_now`` and ``stop`` may be called from any other thread and from a signal's
    handler.
    """

    def __init__(
        self,
        model: ChatModel,
        sampling: Sampling,
        max_new_tokens: int = 1024,
        thought_budget: int | None = None,
        system: str | None = None,
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.thought_budget = thought_budget
        self.history: list[Turn] = []
        self.forgotten: list[Turn] = []
        self._system: str | None = None
        self._stop, self._answer_now = Flag(), Flag()
        if system is not None:
            self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system prompt in use, None where there is none."""
        return self.model.chat_format.system if self._system is None else self._system or None

    @property
    def own_system(self) -> str | None:
        """What ``set_system`` was last told."""
        return self._system

    def set_system(self, text: str | None) -> None:
        """From the next question on: this system prompt, "" for none, None for the one the file was trained with.

        Raises MedcotError, with nothing changed, where the model's template takes none.
        """
        if text is not None:
            text = text.strip()
        if text:
            self.model.chat_format.prompt_ids([{"role": "system", "content": text}, {"role": "user", "content": "x"}])
        self._system = text

    def clear(self) -> None:
        """Forget all turns; settings stay."""
        self.history.clear()
        self.forgotten.clear()

    def stop(self) -> None:
        """End the answer under way after its next token, as a whole turn with its Done; nothing where there is none."""
        self._stop.set()

    def answer_now(self) -> None:
        """Close the thought under way after its next token and make the model answer; nothing where there is none."""
        self._answer_now.set()

    def ask(self, text: str, seed: int | None = None) -> Generator[Event, None, None]:
        """Yield the answer as it is made: Forgotten where turns had to go, Reading, pieces, then Done.

        ``seed`` is this turn's own. A caller that stops early (closes the iterator, or is interrupted) finds what was
        said by then as the last turn of ``history``. Raises MedcotError, with the history unchanged, when there is no
        question or when it alone is too long for the context.
        """
        self._stop.clear()
        self._answer_now.clear()
        question = text.strip()
        if not question:
            raise MedcotError("The question is empty: write one.")
        answer = AnswerInProgress(
            question, self.sampling.seed if seed is None else seed, self.model.chat_format.opens_thought
        )
        n_ctx = self.model.n_ctx
        try:
            forgotten, prompt = self._fit(question)
            if forgotten:
                self.forgotten += forgotten
                self.history = self.history[len(forgotten) :]
                yield Forgotten(forgotten)
            finished = yield from self._answer(answer, prompt)
        except (GeneratorExit, KeyboardInterrupt):
            self.history.append(answer.turn("stopped", n_ctx))
            raise
        turn = answer.turn(finished, n_ctx)
        self.history.append(turn)
        yield Done(turn)

    def retry(self, seed: int | None = None) -> Generator[Event, None, None]:
        """Ask the last question again with another seed, in place of the last turn; events as of ``ask``.

        Raises MedcotError, with the history unchanged, when there is no last question.
        """
        if not self.history:
            raise MedcotError("There is no question to ask again: ask one.")
        last = self.history.pop()
        try:
            yield from self.ask(last.question, (last.seed + 1) % SEEDS if seed is None else seed)
        except MedcotError:
            self.history.append(last)
            raise

    def _answer(self, answer: AnswerInProgress, prompt: Sequence[int]) -> Generator[Event, None, Finished]:
        """Read the prompt, then stream thought and answer, the thought closed where it takes too long; how it ended."""
        answer.prompt_tokens = len(prompt)
        for index, held in enumerate(self.model.read_prompt(prompt)):
            if index == 0:
                answer.reused_tokens = held
            else:
                yield Reading(held, len(prompt))
            if self._stop.is_set():
                return "stopped"
        if self.thought_budget == 0 or self._answer_now.is_set():
            yield from answer.put(*self._empty_thought(), "budget" if self.thought_budget == 0 else "user")
        has_looped = False
        while True:
            ended = yield from self._stream(answer, prompt)
            if ended == "looped" and answer.part == "thought" and not has_looped:
                has_looped, ended = True, "loop"
            if ended == "budget" or ended == "user" or ended == "loop":
                yield from answer.put(*self._thought_end(), ended)
            else:
                yield from answer.rest()
                return ended

    def _stream(
        self, answer: AnswerInProgress, prompt: Sequence[int]
    ) -> Generator[Event, None, Finished | Literal["budget", "user", "loop"]]:
        """Generate until the turn ends, or until the thought under way has to be closed; which of them, and why."""
        context = [*prompt, *answer.ids]
        limit = min(self.max_new_tokens - answer.generated, self.model.n_ctx - len(context))
        if limit <= 0:
            return "length"
        limit += answer.generated
        ids = self.model.generate(
            context,
            limit - answer.generated,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=answer.seed,
        )
        for new_text in self.model.stream_text(answer.count(ids)):
            yield from answer.take(new_text)
            if self._stop.is_set():
                return "stopped"
            if answer.part == "thought":
                if self._answer_now.is_set():
                    self._answer_now.clear()
                    return "user"
                if self.thought_budget is not None and answer.thought_tokens >= self.thought_budget:
                    return "budget"
            if answer.loops():
                return "looped"
        return "length" if answer.generated >= limit else "end"

    def _empty_thought(self) -> tuple[list[int], str]:
        """What leaves the thought out, as ids and as the text that the parser wants."""
        opening = "" if self.model.chat_format.opens_thought else THINK_OPEN
        return self.model.chat_format.empty_thought_ids(), opening + THINK_CLOSE

    def _thought_end(self) -> tuple[list[int], str]:
        return self.model.chat_format.thought_end_ids(), THINK_CLOSE

    def _fit(self, question: str) -> tuple[tuple[Turn, ...], list[int]]:
        """The oldest turns, as many as must go for prompt and answer to fit, and the prompt without them."""
        n_ctx = self.model.n_ctx
        # A context smaller than two answers keeps half of itself for the question.
        reserved = min(self.max_new_tokens, n_ctx // 2)
        if len(question) > n_ctx * LONGEST_TOKEN:
            raise MedcotError(_too_long(f"has {len(question):,} characters", reserved, n_ctx))

        def prompt(first_kept: int) -> list[int]:
            return self.model.chat_format.prompt_ids(self._messages(self.history[first_kept:], question))

        def fits(ids: Sequence[int]) -> bool:
            return len(ids) + reserved <= n_ctx

        whole = prompt(0)
        if fits(whole):
            return (), whole
        alone = prompt(len(self.history))
        if not fits(alone):
            raise MedcotError(_too_long(f"takes {len(alone)} tokens", reserved, n_ctx))
        first_kept = bisect_left(range(len(self.history)), True, key=lambda first: fits(prompt(first)))
        return tuple(self.history[:first_kept]), prompt(first_kept)

    def _messages(self, turns: Sequence[Turn], question: str) -> list[Message]:
        system = self.system
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        for turn in turns:
            # Templates want strict alternation, so a question that got no answer is not told either.
            if turn.answer:
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": turn.answer})
        return [*messages, {"role": "user", "content": question}]


def _too_long(message: str, reserved: int, n_ctx: int) -> str:
    return (
        f"The message {message}, and beside an answer of {reserved} the context of {n_ctx} "
        f"has room for {n_ctx - reserved}: shorten it, or open the model with a larger context."
    )


def _first(asked: float | None, in_file: str | None, default: float) -> float:
    if asked is not None:
        return asked
    try:
        return default if in_file is None else float(in_file)
    except ValueError:
        return default
