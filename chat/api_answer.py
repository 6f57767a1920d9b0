"""One answer to one request, as the documents of OpenAI's chat completions.

The thought goes into ``reasoning_content``, beside ``content``, as in DeepSeek's API
(https://api-docs.deepseek.com/guides/reasoning_model) and llama.cpp's server. What OpenAI has no word for is in the
field ``medcot``, which other clients ignore: red flags found in the question, and how the answer ended.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from chat.answer import AnswerInProgress
from chat.api_request import ChatRequest, too_long
from chat.safety import RedFlagWatch
from chat.session import LONGEST_TOKEN, ChatModel, Sampling, Session
from chat.stop_texts import StopTexts
from chat.turn import Done, Event, Piece, Reading, Turn
from chat.web_conversation import WebSettings
from pipeline.thought import Part

_DELTA: dict[Part, str] = {"thought": "reasoning_content", "answer": "content"}
# 2**32 - 1 itself makes llama.cpp draw a seed of its own, and OpenAI's seeds may be negative or longer.
_SEEDS = 2**32 - 1


@dataclass(frozen=True)
class Finished:
    """The whole answer; ``answer`` ends before the first stop text, ``thought`` is None where nothing was thought."""

    thought: str | None
    answer: str
    turn: Turn

    @property
    def reason(self) -> Literal["stop", "length"]:
        """A loop that was cut is no end of an answer: of OpenAI's reasons that is the one for what was cut off."""
        return "length" if self.turn.finished in ("length", "looped") else "stop"

    def usage(self) -> dict[str, Any]:
        turn = self.turn
        return {
            "prompt_tokens": turn.prompt_tokens,
            "completion_tokens": turn.tokens,
            "total_tokens": turn.prompt_tokens + turn.tokens,
            "prompt_tokens_details": {"cached_tokens": turn.reused_tokens},
            "completion_tokens_details": {"reasoning_tokens": turn.thought_tokens},
        }

    def extension(self) -> dict[str, Any]:
        return {"finished": self.turn.finished, "thought_closed_by": self.turn.thought_closed_by}


class Reply(Session):
    """The answer to a conversation that a client brings along whole, so nothing is remembered and nothing forgotten.

    ``settings`` hold for what the request leaves open.
    Raises Refusal where it does not fit the context, and MedcotError where the template refuses it.
    """

    def __init__(self, model: ChatModel, request: ChatRequest, settings: WebSettings) -> None:
        messages = request.conversation(model.chat_format.system)
        characters = sum(len(message["content"]) for message in messages)
        if characters > model.n_ctx * LONGEST_TOKEN:
            raise too_long(f"messages have {characters:,} characters", model.n_ctx, "messages")
        self._prompt = model.chat_format.prompt_ids(messages)
        room = model.n_ctx - len(self._prompt)
        if room <= 0:
            raise too_long(f"messages take {len(self._prompt)} tokens", model.n_ctx, "messages")
        sampling = Sampling.for_model(
            model,
            temperature=settings.temperature if request.temperature is None else request.temperature,
            top_p=settings.top_p if request.top_p is None else request.top_p,
            seed=settings.seed if request.seed is None else request.seed % _SEEDS,
        )
        budget = request.thought_budget if request.sets_thought_budget else settings.thought_budget
        super().__init__(model, sampling, request.token_limit or settings.max_new_tokens, budget)
        self._question = request.question
        self._stops = request.stops

    def stream(self) -> Generator[Piece | Reading | Finished, None, None]:
        """Pieces of thought and answer as they are made, Reading while a long prompt is evaluated, Finished last."""
        stops = StopTexts(self._stops)
        parts: dict[Part, list[str]] = {"thought": [], "answer": []}
        for event in self._events():
            pieces: list[Piece] = []
            match event:
                case Reading():
                    yield event
                case Piece("thought", _):
                    pieces = [event]
                case Piece("answer", text):
                    pieces = [Piece("answer", stops.feed(text))]
                    if stops.found:
                        self.stop()
                case Done(turn):
                    pieces = [Piece("answer", stops.finish())]
            for piece in pieces:
                if piece.text:
                    parts[piece.part].append(piece.text)
                    yield piece
        yield Finished("".join(parts["thought"]) or None, "".join(parts["answer"]), turn)

    def _events(self) -> Generator[Event, None, None]:
        answer = AnswerInProgress(self._question, self.sampling.seed, self.model.chat_format.opens_thought)
        finished = yield from self._answer(answer, self._prompt)
        yield Done(answer.turn(finished, self.model.n_ctx))


class Documents:
    """What is sent to the client, as JSON documents that share one id."""

    def __init__(self, model_name: str, request: ChatRequest, watch: RedFlagWatch) -> None:
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
        self._with_usage = request.stream_options is not None and request.stream_options.include_usage
        self._safety = red_flags(request.question, watch)

    def completion(self, finished: Finished) -> dict[str, Any]:
        message = {"role": "assistant", "content": finished.answer, "reasoning_content": finished.thought}
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finished.reason}],
            "usage": finished.usage(),
            "medcot": {**self._safety, **finished.extension()},
        }

    def first_chunk(self) -> dict[str, Any]:
        """Before anything is generated, so that a red flag is known at once."""
        return self._chunk({"role": "assistant", "content": ""}, medcot=self._safety)

    def piece_chunk(self, piece: Piece) -> dict[str, Any]:
        return self._chunk({_DELTA[piece.part]: piece.text})

    def last_chunks(self, finished: Finished) -> Sequence[dict[str, Any]]:
        last = self._chunk({}, finish_reason=finished.reason, medcot=finished.extension())
        usage = {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": finished.usage()}
        return (last, usage) if self._with_usage else (last,)

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **extension: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice], **extension}


def red_flags(question: str, watch: RedFlagWatch) -> dict[str, Any]:
    """Possible emergencies in what the user wrote last, for the client to show above whatever the model says."""
    flags = watch.flags(question)
    return {
        "red_flags": [{**asdict(flag), "message": watch.message(flag)} for flag in flags],
        "warning": watch.warning(question),
    }
