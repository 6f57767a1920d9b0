"""A model's Jinja chat template: a conversation as text, and which of that text the template itself wrote.

The difference matters: control tokens are recognised only in the template's own text, so what a user types stays
text. Templates are foreign code; they run in Jinja's sandbox, set up as transformers does it
(``transformers/utils/chat_template_utils.py``), and whatever goes wrong in them is one sentence.

Needs jinja2 only: the chat uses it without PyTorch or transformers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import MedcotError

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

Message = Mapping[str, str]

# What a template's own arithmetic, indexing and calls raise, beside Jinja's errors.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
# Stand-ins for contents are private-use characters around a number; they are looked for only where no content is.
_MARKER = re.compile("\ue000(\\d+)\ue001")
_QUESTION = [{"role": "user", "content": "x"}]
_EMPTY_THOUGHT = re.compile(rf"(?:{THINK_OPEN})?\s*(?:{THINK_CLOSE})?\s*\Z")


@dataclass(frozen=True)
class Piece:
    """A stretch of rendered text; control tokens are recognised only in what the template wrote."""

    text: str
    from_template: bool


def template_sha256(template: str) -> str:
    """SHA-256 of the template as Jinja reads it: line ends are ``\\n``, and one at the very end does not count.

    So it stays the same when a tokenizer is saved and loaded, which writes the template to a text file.
    """
    text = template.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    return hashlib.sha256(text.encode()).hexdigest()


class ChatTemplate:
    """One compiled template. Every method raises MedcotError when the template refuses or cannot be used."""

    def __init__(self, source: str, bos_token: str | None, eos_token: str) -> None:
        if not isinstance(source, str):
            raise MedcotError("The model has several chat templates: keep one in its chat_template.jinja.")
        self.source = source
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token}
        try:
            self._compiled = _compile(source)
        except jinja2.TemplateError as error:
            raise MedcotError(f"The model's chat template is not valid Jinja: {error}.") from error

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, now: datetime | None = None
    ) -> str:
        """The conversation as text, exactly as the template writes it; ``now`` is the time it may print."""
        return self._render(self.messages(messages), add_generation_prompt, now)

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages the way the template wants them: content as text, or as a list of one part of type text."""
        return [self._message(message, self._wants_parts) for message in messages]

    @cached_property
    def opens_thought(self) -> bool:
        """Whether the generation prompt itself ends with ``<think>``, so that output starts inside the thought."""
        return self._asking.rstrip().endswith(THINK_OPEN)

    @property
    def after_answer(self) -> str:
        """What the template writes behind the last message when the assistant said it; the end of turn is in it."""
        return self._assistant_turn[1]

    def check_continuation(self) -> None:
        """Refuse a template behind whose generation prompt an answer is something else than in a conversation.

        White space and a thought's tags between the two are no difference: R1's and Qwen3's templates write them.
        """
        before, _ = self._assistant_turn
        if _bare(self._asking) != _bare(before):
            raise MedcotError(
                f"The model's chat template begins an answer with {self._asking[-40:]!r} when it asks for one and with "
                f"{before[-40:]!r} in a conversation, so training would not teach what is asked: use another template."
            )

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Render with a generation prompt, the template's own text told from the messages' contents.

        Every content is rendered as a marker, which shows the template's text, and then one at a time as itself,
        which shows what the template makes of it (R1's strips thoughts from history, Llama 2's white space).
        """
        _ = self._asking  # refuses
        now = datetime.now()
        marked = [
            {**message, "content": _marker(index)} if message["content"].strip() else message
            for index, message in enumerate(messages)
        ]
        skeleton = self.render(marked, now=now)
        whole = self.render(messages, now=now)
        if all(marked[index] is message or _marker(index) in skeleton for index, message in enumerate(messages)):
            unchanged = _pieces(skeleton, {index: message["content"] for index, message in enumerate(messages)})
            if "".join(piece.text for piece in unchanged) == whole:
                # What a template makes of a content is never longer than it (below), so here each is all there.
                return unchanged
        written: dict[int, str] = {}
        for index, message in enumerate(messages):
            if marked[index] is message:
                continue
            around = skeleton.split(_marker(index))
            if len(around) == 1:
                raise MedcotError(
                    f"The model's chat template leaves out a message of the {message['role']}: use another template."
                )
            alone = [*marked[:index], message, *marked[index + 1 :]]
            written[index] = _text_between(around, self.render(alone, now=now))
            if not _is_left_of(written[index], message["content"]):
                raise _mixed_text()
        pieces = _pieces(skeleton, written)
        if "".join(piece.text for piece in pieces) != whole:
            raise _mixed_text()
        return pieces

    @cached_property
    def _asking(self) -> str:
        """A question with its generation prompt; a template that cannot ask for an answer is refused."""
        before, _ = self._assistant_turn
        asking = self.render(_QUESTION)
        if asking == self.render(_QUESTION, add_generation_prompt=False) and _bare(asking) != _bare(before):
            raise MedcotError(
                "The model's chat template ignores add_generation_prompt, so no answer can be asked for: "
                "use another template."
            )
        return asking

    @cached_property
    def _assistant_turn(self) -> tuple[str, str]:
        """The text around an assistant's content at the end of a conversation."""
        marker = _marker(0)
        conversation = [*_QUESTION, {"role": "assistant", "content": marker}]
        before, found, after = self.render(conversation, add_generation_prompt=False).partition(marker)
        if not found:
            raise MedcotError(
                "The model's chat template leaves out what the assistant says, so it cannot hold a conversation: "
                "use another template."
            )
        return before, after

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether text has to come as ``[{"type": "text", "text": ...}]``, as templates of vision models want it."""
        message = {"role": "user", "content": _marker(0)}

        def shows_content(as_parts: bool) -> bool:
            try:
                return _marker(0) in self._render([self._message(message, as_parts)], True, None)
            except MedcotError:
                return False

        return not shows_content(as_parts=False) and shows_content(as_parts=True)

    @staticmethod
    def _message(message: Message, as_parts: bool) -> dict[str, Any]:
        if not as_parts:
            return dict(message)
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, now: datetime | None) -> str:
        try:
            return self._compiled.render(
                messages=messages,
                # transformers passes these, and some templates ask whether they are none, not whether they exist.
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=(now or datetime.now()).strftime,
                **self._tokens,
            )
        except _TEMPLATE_ERRORS as error:
            raise MedcotError(f"The model's chat template refuses this conversation: {error}.") from error


def _marker(index: int) -> str:
    return f"\ue000{index}\ue001"


def _pieces(skeleton: str, contents: Mapping[int, str]) -> list[Piece]:
    """A conversation rendered with markers, cut at them, with the contents in their places."""
    return [
        Piece(part, True) if place % 2 == 0 else Piece(contents[int(part)], False)
        for place, part in enumerate(_MARKER.split(skeleton))
    ]


def _text_between(around: Sequence[str], whole: str) -> str:
    """The text X for which ``X.join(around) == whole``; MedcotError where there is none."""
    length, rest = divmod(len(whole) - sum(map(len, around)), len(around) - 1)
    start = len(around[0])
    text = whole[start : start + max(length, 0)]
    if rest or text.join(around) != whole:
        raise _mixed_text()
    return text


def _is_left_of(written: str, content: str) -> bool:
    """Whether ``written`` is what remains of ``content`` when some of its characters are left out."""
    remaining = iter(content)
    return all(character in remaining for character in written)


def _mixed_text() -> MedcotError:
    return MedcotError(
        "The model's chat template adds to a message's content, or changes its own text with it, so that what was "
        "typed cannot be told from control tokens: write the message in other words or use another template."
    )


def _bare(text: str) -> str:
    """Text without white space and an empty thought, opened or closed, at its end."""
    return _EMPTY_THOUGHT.sub("", text).rstrip()


class _GenerationBlock(Extension):
    """``{% generation %}...{% endgeneration %}``, transformers' mark around what the assistant says: shown as it is."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as in transformers: what is set inside is unknown behind it.
        return nodes.Scope(body).set_lineno(line)


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """Jinja as transformers sets it up for chat templates, so that the same template gives the same text."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
