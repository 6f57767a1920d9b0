"""A conversation with one model: what it is asked, what it answers, and what it still remembers.

Knows nothing of terminals or web pages; a page or a terminal shows the events that ``Session.ask`` yields.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pipeline.errors import MedcotError
from pipeline.prompts import ChatFormat, Message
from pipeline.thought import Part, ThoughtParser, parse_output

# DeepSeek's usage recommendations for R1 and its distillations: https://huggingface.co/deepseek-ai/DeepSeek-R1
# Models tuned to think in the same way get the same, unless their file says otherwise.
DEFAULT_TEMPERATURE = 0.6
DEFAULT_TOP_P = 0.95

Finished = Literal["end", "length", "stopped"]


class ChatModel(Protocol):
    """What a session needs of a model; ``export.gguf_model.GgufModel`` has it."""

    @property
    def n_ctx(self) -> int: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def chat_format(self) -> ChatFormat: ...

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
            seed=secrets.randbits(31) if seed is None else seed,
        )


@dataclass(frozen=True)
class Turn:
    """One question and what the model said to it.

    ``seconds`` is the whole turn; ``tokens_per_second`` the pace of generation, so without the prompt and the
    first token, and None below two tokens. ``finished``: the model ended its turn, ran into the limit of
    tokens, or was stopped.
    """

    question: str
    thought: str | None
    answer: str
    tokens: int
    seconds: float
    time_to_first_token: float | None
    tokens_per_second: float | None
    finished: Finished


@dataclass(frozen=True)
class Forgotten:
    """Old turns left the conversation: with them, prompt and answer would not fit the context."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Piece:
    """The next stretch of thought or answer."""

    part: Part
    text: str


@dataclass(frozen=True)
class Done:
    """The turn as it went into the history."""

    turn: Turn


Event = Forgotten | Piece | Done


class Session:
    """``history`` holds whole turns; of them the model sees questions and answers, never thoughts."""

    def __init__(self, model: ChatModel, sampling: Sampling, max_new_tokens: int = 1024) -> None:
        self.model = model
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.history: list[Turn] = []

    def clear(self) -> None:
        self.history.clear()

    def ask(self, text: str) -> Generator[Event, None, None]:
        """Yield the answer as it is made: Forgotten where turns had to go, then pieces, then Done.

        A caller that stops early (closes the iterator, or is interrupted) finds what was said by then as the
        last turn of ``history``. Raises MedcotError, with the history unchanged, when the message alone is
        too long for the context.
        """
        answer = _AnswerInProgress(text.strip(), self.model.chat_format.opens_thought)
        try:
            forgotten, prompt = self._fit(answer.question)
            if forgotten:
                self.history = self.history[len(forgotten) :]
                yield Forgotten(forgotten)
            limit = min(self.max_new_tokens, self.model.n_ctx - len(prompt))
            ids = self.model.generate(
                prompt,
                limit,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                seed=self.sampling.seed,
            )
            for new_text in self.model.stream_text(answer.count(ids)):
                yield from answer.take(new_text)
            yield from answer.rest()
        except (GeneratorExit, KeyboardInterrupt):
            self.history.append(answer.turn("stopped"))
            raise
        turn = answer.turn("length" if answer.tokens >= limit else "end")
        self.history.append(turn)
        yield Done(turn)

    def _fit(self, question: str) -> tuple[tuple[Turn, ...], list[int]]:
        """The oldest turns, as many as must go for prompt and answer to fit, and the prompt without them."""
        n_ctx = self.model.n_ctx
        # A context smaller than two answers keeps half of itself for the question.
        reserved = min(self.max_new_tokens, n_ctx // 2)
        for first_kept in range(len(self.history) + 1):
            ids = self.model.chat_format.prompt_ids(self._messages(self.history[first_kept:], question))
            if len(ids) + reserved <= n_ctx:
                return tuple(self.history[:first_kept]), ids
        raise MedcotError(
            f"The message takes {len(ids)} tokens, and beside an answer of {reserved} the context of {n_ctx} "
            f"has room for {n_ctx - reserved}: shorten it, or open the model with a larger context."
        )

    def _messages(self, turns: Sequence[Turn], question: str) -> list[Message]:
        system = self.model.chat_format.system
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        for turn in turns:
            # Templates want strict alternation, so a question that got no answer is not told either.
            if turn.answer:
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": turn.answer})
        return [*messages, {"role": "user", "content": question}]


class _AnswerInProgress:
    """Collects an output while it is streamed, with its times."""

    def __init__(self, question: str, opens_thought: bool) -> None:
        self.question = question
        self.tokens = 0
        self._opens_thought = opens_thought
        self._parser = ThoughtParser(opens_thought)
        self._text = ""
        self._started = self._first_token = self._last_token = time.perf_counter()

    def count(self, ids: Iterator[int]) -> Iterator[int]:
        for token in ids:
            self._last_token = time.perf_counter()
            if self.tokens == 0:
                self._first_token = self._last_token
            self.tokens += 1
            yield token

    def take(self, text: str) -> Iterator[Piece]:
        self._text += text
        for part, piece in self._parser.feed(text):
            yield Piece(part, piece)

    def rest(self) -> Iterator[Piece]:
        for part, piece in self._parser.finish():
            yield Piece(part, piece)

    def turn(self, finished: Finished) -> Turn:
        parsed = parse_output(self._text, self._opens_thought)
        generating = self._last_token - self._first_token
        return Turn(
            question=self.question,
            thought=parsed.thought,
            answer=parsed.answer,
            tokens=self.tokens,
            seconds=time.perf_counter() - self._started,
            time_to_first_token=self._first_token - self._started if self.tokens else None,
            tokens_per_second=(self.tokens - 1) / generating if generating > 0 else None,
            finished=finished,
        )


def _first(asked: float | None, in_file: str | None, default: float) -> float:
    if asked is not None:
        return asked
    try:
        return default if in_file is None else float(in_file)
    except ValueError:
        return default
