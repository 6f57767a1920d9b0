"""The one place where an example becomes tokens and labels, and a conversation becomes a prompt.

The text of a conversation comes from the model's own Jinja chat template. It is then cut at the control tokens
that the *template* wrote; what lies between is tokenized as plain text. So a question that contains
``<|im_end|>`` or ``</think>`` stays text, and the ids equal those of the whole rendered text otherwise.

Two traps of R1's template are handled here. It deletes everything up to ``</think>`` from assistant turns, so
the completion is never rendered through it. And it ends the generation prompt with ``<think>\\n``, so that
opening is moved into the completion, where the loss sees it.

Needs jinja2 only: the chat uses it without PyTorch or transformers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import MedcotError

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
IGNORED_LABEL = -100  # PyTorch's cross entropy leaves this label out

Message = Mapping[str, str]


class Vocabulary(Protocol):
    """What prompts need of a tokenizer; implemented for transformers and for llama.cpp."""

    bos_token: str | None
    eos_token: str
    adds_bos: bool
    control_tokens: Mapping[str, int]

    def encode_text(self, text: str, *, after_text: bool) -> list[int]:
        """Ids of ``text`` without recognising any control token.

        ``after_text`` says that it goes on from other text: SentencePiece then adds no leading space.
        """


@dataclass(frozen=True)
class Example:
    """One training record; ``reasoning`` is None for data without a chain of thought."""

    question: str
    reasoning: str | None
    answer: str


@dataclass(frozen=True)
class EncodedExample:
    """Token ids and, for each, the label the loss sees (the id itself, or IGNORED_LABEL in the prompt)."""

    input_ids: list[int]
    labels: list[int]

    @property
    def completion_ids(self) -> list[int]:
        return [label for label in self.labels if label != IGNORED_LABEL]

    @property
    def prompt_ids(self) -> list[int]:
        return self.input_ids[: len(self.input_ids) - len(self.completion_ids)]


@dataclass(frozen=True)
class _Piece:
    """A stretch of rendered text; control tokens are recognised only in what the template wrote."""

    text: str
    from_template: bool


class ChatFormat:
    """Turns conversations and examples into ids with one model's template and vocabulary."""

    def __init__(self, template: str, vocabulary: Vocabulary, system: str | None = None) -> None:
        self.template = template
        self.vocabulary = vocabulary
        self.system = system
        try:
            self._compiled = _environment().from_string(template)
        except jinja2.TemplateError as error:
            raise MedcotError(f"The model's chat template is not valid Jinja: {error}.") from error

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(self.template.encode()).hexdigest()

    @cached_property
    def opens_thought(self) -> bool:
        """Whether the generation prompt itself ends with ``<think>``, so that output starts inside the thought."""
        prompt = self.render([{"role": "user", "content": "x"}])
        return prompt.rstrip().endswith(THINK_OPEN)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text, exactly as the template writes it."""
        try:
            return self._compiled.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.vocabulary.bos_token or "",
                eos_token=self.vocabulary.eos_token,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise MedcotError(f"The model's chat template refuses this conversation: {error}.") from error

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids that end where the assistant's turn begins, with exactly one BOS where the model wants one."""
        return self._encode(self._render_pieces(messages))

    def question_ids(self, question: str) -> list[int]:
        """The prompt for a single question, with the configured system prompt if there is one."""
        return self.prompt_ids(self._conversation(question))

    def completion_text(self, example: Example) -> str:
        """What the model should write, from the opening of its thought to the end of its turn, as text."""
        return "".join(piece.text for piece in self._completion_pieces(example))

    def encode(self, example: Example) -> EncodedExample:
        """Ids and labels of one example; the loss sees the thought, the answer and the end of turn."""
        prompt = self._render_pieces(self._conversation(example.question))
        if self.opens_thought:
            prompt = _without_thought_opening(prompt)
        prompt_ids = self._encode(prompt)
        completion_ids = self._encode(self._completion_pieces(example), continues=True)
        return EncodedExample(
            input_ids=prompt_ids + completion_ids,
            labels=[IGNORED_LABEL] * len(prompt_ids) + completion_ids,
        )

    def encode_parts(self, example: Example) -> tuple[list[int], list[int], list[int]]:
        """Ids of (prompt, thought with its tags, answer with the end of turn): ``encode`` cut in three."""
        whole = self.encode(example)
        completion = whole.completion_ids
        if example.reasoning is None:
            return whole.prompt_ids, [], completion
        answer = self._encode(
            [_Piece(example.answer.strip(), False), _Piece(self.vocabulary.eos_token, True)], continues=True
        )
        # A merge may span the blank line and the answer's first letters; then the cut moves, never the ids.
        return whole.prompt_ids, completion[: len(completion) - len(answer)], completion[-len(answer) :]

    def _conversation(self, question: str) -> list[Message]:
        user = {"role": "user", "content": question.strip()}
        return [user] if self.system is None else [{"role": "system", "content": self.system}, user]

    def _completion_pieces(self, example: Example) -> list[_Piece]:
        end = _Piece(self.vocabulary.eos_token, True)
        answer = _Piece(example.answer.strip(), False)
        if example.reasoning is None:
            return [answer, end]
        return [
            _Piece(f"{THINK_OPEN}\n", True),
            _Piece(example.reasoning.strip(), False),
            _Piece(f"\n{THINK_CLOSE}\n\n", True),
            answer,
            end,
        ]

    def _render_pieces(self, messages: Sequence[Message]) -> list[_Piece]:
        """Render, then tell the template's own text from the messages' contents.

        Each content is rendered as itself and as a marker; the text around the markers is the template's. A
        template that changes contents (R1's strips thoughts from history) is followed by what it rendered.
        """
        rendered = self.render(messages)
        marked = [
            {**message, "content": _marker(index)} if message["content"].strip() else message
            for index, message in enumerate(messages)
        ]
        skeleton = re.split(r"(\uE000\d+\uE001)", self.render(marked))
        pieces: list[_Piece] = []
        position = 0
        for index, part in enumerate(skeleton):
            if index % 2 == 0:
                if rendered[position : position + len(part)] != part:
                    raise MedcotError(
                        "The model's chat template changes its own text with the message's content, "
                        "so user text cannot be told from control tokens: use another template."
                    )
                pieces.append(_Piece(part, True))
                position += len(part)
            else:
                following = skeleton[index + 1]
                content = messages[int(part[1:-1])]["content"]
                variants = (content, content.strip(), content.rsplit(THINK_CLOSE, 1)[-1])
                length = next(
                    (len(variant) for variant in variants if rendered.startswith(variant + following, position)),
                    None,
                )
                if length is None:
                    raise MedcotError(
                        "The model's chat template rewrites message contents in a way medcot does not know: "
                        "use another template."
                    )
                pieces.append(_Piece(rendered[position : position + length], False))
                position += length
        return pieces

    def _encode(self, pieces: Sequence[_Piece], continues: bool = False) -> list[int]:
        """Tokenize pieces: control tokens in template text become ids, the text between them is merged and encoded."""
        ids: list[int] = []
        plain = ""
        controls = self.vocabulary.control_tokens

        def flush() -> None:
            nonlocal plain
            if plain:
                ids.extend(self.vocabulary.encode_text(plain, after_text=continues and not ids))
                plain = ""

        for piece in pieces:
            if not piece.from_template or not controls:
                plain += piece.text
                continue
            for index, part in enumerate(self._control_pattern.split(piece.text)):
                if index % 2 == 0:
                    plain += part
                else:
                    flush()
                    ids.append(controls[part])
        flush()
        if not continues:
            ids = self._with_one_bos(ids)
        return ids

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        bos = self.vocabulary.bos_token
        if not self.vocabulary.adds_bos or bos is None:
            return ids
        bos_id = self.vocabulary.control_tokens[bos]
        while ids[:2] == [bos_id, bos_id]:
            ids = ids[1:]
        return ids if ids[:1] == [bos_id] else [bos_id, *ids]

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.vocabulary.control_tokens, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _marker(index: int) -> str:
    """A stand-in for a message's content, in private-use characters that no template writes."""
    return f"\ue000{index}\ue001"


def _without_thought_opening(pieces: Sequence[_Piece]) -> list[_Piece]:
    last = pieces[-1]
    return [*pieces[:-1], _Piece(last.text.rstrip().removesuffix(THINK_OPEN), True)]


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates, so that the same template gives the same text."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        import json

        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
