"""What a client asks of /v1/chat/completions, in OpenAI's words, and what is refused with a sentence.

https://platform.openai.com/docs/api-reference/chat/create; ``reasoning_budget_tokens`` as llama.cpp's server has it.
A request that asks for what this server cannot do is refused: to ignore it silently would answer something else.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import MedcotError
from pipeline.prompts import Message
from pipeline.thought import parse_output

# What each effort lets a model think (tokens); None: as long as it will. OpenAI names the levels and gives no figures.
THOUGHT_BUDGETS = {"none": 0, "minimal": 64, "low": 256, "medium": 1024, "high": None}
MOST_STOPS = 4  # as OpenAI has it
# Settings that this server does not have, and the values of them that ask for nothing.
_NEUTRAL: dict[str, Sequence[Any]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
# These change nothing about the answer of a server of one's own.
_IGNORED = {"user", "safety_identifier", "metadata", "store", "service_tier", "prompt_cache_key", "parallel_tool_calls"}
_NOT_TEXT = ("tool_calls", "function_call", "audio")


class Refusal(MedcotError):
    """A request that is not answered; becomes OpenAI's error document with an HTTP status."""

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.code = code
        self.status = status


class TextPart(BaseModel):
    model_config = ConfigDict(frozen=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message. ``reasoning_content`` may come back in an assistant's message; no model is shown it again."""

    model_config = ConfigDict(frozen=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def for_template(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        if self.role == "assistant":
            text = parse_output(text, opens_thought=False).answer
        return {"role": "system" if self.role == "developer" else self.role, "content": text.strip()}


class StreamOptions(BaseModel):
    model_config = ConfigDict(frozen=True)
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request that can be answered; None where the client leaves a setting to the server."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
    model: str | None = None  # any name is answered by the one model there is
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    reasoning_budget_tokens: int | None = Field(None, ge=-1)

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sets_thought_budget(self) -> bool:
        return self.reasoning_budget_tokens is not None or self.reasoning_effort is not None

    @property
    def thought_budget(self) -> int | None:
        """Tokens; None where the model may think as long as it will."""
        if self.reasoning_budget_tokens is not None:
            return None if self.reasoning_budget_tokens < 0 else self.reasoning_budget_tokens
        return THOUGHT_BUDGETS[self.reasoning_effort or "high"]

    @property
    def question(self) -> str:
        """What the user wrote last."""
        return self.messages[-1].for_template()["content"]

    def conversation(self, system: str | None) -> list[Message]:
        """The messages as a chat template takes them; ``system`` is the model's own, for a request without one."""
        messages = [message.for_template() for message in self.messages]
        if system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": system}, *messages]


def parse_chat_request(body: bytes) -> ChatRequest:
    """Raises Refusal with what is wrong, where, and what to do."""
    settings = parse_json_object(body)
    for name, neutral in _NEUTRAL.items():
        value = settings.pop(name, None)
        if value is not None and value not in neutral:
            raise Refusal(f"{name} is not supported by this server: leave it out.", name, "unsupported_parameter")
    known = {name: value for name, value in settings.items() if name not in _IGNORED}
    _check_messages(known.get("messages"))
    try:
        request = ChatRequest.model_validate(known)
    except ValidationError as error:
        raise explain(error, tuple(ChatRequest.model_fields)) from error
    if len(request.stops) > MOST_STOPS or "" in request.stops:
        raise Refusal(f"stop takes at most {MOST_STOPS} texts, none of them empty.", "stop")
    if request.messages[-1].role != "user":
        raise Refusal("The last message must be the user's: an answer cannot be continued.", "messages")
    return request


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Raises Refusal."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"The request's body is not JSON ({error}): send one JSON object.") from error
    if not isinstance(document, dict):
        raise Refusal("The request's body is not a JSON object: send one, with messages.")
    return document


def explain(error: ValidationError, known: Sequence[str]) -> Refusal:
    """The first thing that is wrong with a request; ``known`` are the names a setting may have."""
    first = error.errors(include_url=False)[0]
    # A union's own branches ("str", "list[TextPart]") are no part of the request.
    place = ".".join(str(step) for step in first["loc"] if step != "str" and "[" not in str(step))
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(place, known, 1)
        hint = f"did you mean {close[0]}?" if close else "leave it out."
        return Refusal(f"{place} is no setting this server knows: {hint}", place, "unknown_parameter")
    if first["type"] == "missing":
        return Refusal(f"{place} is missing from the request.", place)
    return Refusal(f"{place}: {first['msg'][0].lower()}{first['msg'][1:]} (found {first['input']!r:.60}).", place)


def too_long(what: str, n_ctx: int, parameter: str) -> Refusal:
    """``what`` is longer than the context has room for."""
    return Refusal(
        f"The {what}, and the context has room for {n_ctx} tokens, the answer's among them: shorten it, or start the "
        "server with a larger --ctx.",
        parameter,
        "context_length_exceeded",
    )


def _check_messages(messages: Any) -> None:
    """Say plainly what a model that reads and writes text alone is often asked for."""
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, dict):
            continue
        place = f"messages.{index}"
        if message.get("role") in ("tool", "function") or any(message.get(name) for name in _NOT_TEXT):
            raise Refusal(f"{place}: tools and audio are not supported by this server.", place, "unsupported_value")
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind is not None and kind != "text":
                raise Refusal(
                    f"{place}: content of type {kind!r:.40} is not supported: the model reads text alone.",
                    place,
                    "unsupported_value",
                )
