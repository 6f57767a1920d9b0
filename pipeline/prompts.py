"""The one place where an example becomes tokens and labels, and a conversation becomes a prompt.

The text of a conversation comes from the model's own chat template (``pipeline/chat_template.py``). It is cut at the
control tokens that the *template* wrote; what lies between is tokenized as plain text. So a question that contains
``<|im_end|>`` or ``</think>`` stays text, and the ids equal those of the whole rendered text otherwise.

Two traps of R1's template are handled here. It deletes everything up to ``</think>`` from assistant turns, so
the completion is never rendered through it. And it ends the generation prompt with ``<think>\\n``, so that
opening is moved into the completion, where the loss sees it.

Needs jinja2 only: the chat uses it without PyTorch or transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from pipeline.chat_template import (
    THINK_CLOSE,
    THINK_OPEN,
    ChatTemplate,
    Message,
    Piece,
    template_sha256,
)
from pipeline.errors import MedcotError
from pipeline.vocabulary import Preceding

IGNORED_LABEL = -100  # PyTorch's cross entropy leaves this label out
# White space as added tokens swallow it: Unicode's, which is Rust's; Python's \s has four control characters more.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"

__all__ = [
    "IGNORED_LABEL",
    "THINK_CLOSE",
    "THINK_OPEN",
    "ChatFormat",
    "EncodedExample",
    "Example",
    "Message",
    "Vocabulary",
]


class Vocabulary(Protocol):
    """What prompts need of a tokenizer; implemented for transformers and for llama.cpp."""

    bos_token: str | None
    eos_token: str
    adds_bos: bool
    control_tokens: Mapping[str, int]
    strips_left: frozenset[str]  # control tokens that swallow the white space before them (added tokens with lstrip),
    strips_right: frozenset[str]  # and after them

    def encode_text(self, text: str, after: Preceding) -> list[int]:
        """Ids of ``text`` without recognising any control token; what stands before it decides its leading space."""


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
class _Segment:
    """A control token, or the text between two."""

    text: str
    is_control: bool
    after: Preceding = "nothing"


_TEXT_BEFORE = _Segment("x", is_control=False)


class ChatFormat:
    """Turns conversations and examples into ids with one model's template and vocabulary.

    Every method raises MedcotError when the template refuses a conversation or cannot be used at all.
    """

    def __init__(self, template: str, vocabulary: Vocabulary, system: str | None = None) -> None:
        self.template = template
        self.vocabulary = vocabulary
        self.system = system
        self.chat_template = ChatTemplate(template, vocabulary.bos_token, vocabulary.eos_token)

    @property
    def template_sha256(self) -> str:
        return template_sha256(self.template)

    @property
    def opens_thought(self) -> bool:
        """Whether the generation prompt itself ends with ``<think>``, so that output starts inside the thought."""
        return self.chat_template.opens_thought

    @cached_property
    def end_of_turn(self) -> str:
        """The control token that ends the assistant's turn: the first one the template writes behind an answer.

        It often differs from the vocabulary's EOS (Llama 3: ``<|eot_id|>``), which is taken where the template
        writes none.
        """
        found = re.match(rf"\s*{self._control_pattern.pattern}", self.chat_template.after_answer)
        return found[1] if found else self.vocabulary.eos_token

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text, exactly as the template writes it."""
        return self.chat_template.render(messages, add_generation_prompt)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids that end where the assistant's turn begins, with exactly one BOS where the model wants one."""
        return self._with_one_bos(self._ids(self._segments(self.chat_template.pieces(messages))))

    def question_ids(self, question: str) -> list[int]:
        """The prompt for a single question, with the configured system prompt if there is one."""
        return self.prompt_ids(self._conversation(question))

    def thought_end_ids(self) -> list[int]:
        """Ids that close a thought under way, behind which the model answers; as in training."""
        return self._ids(self._segments([Piece(f"\n{THINK_CLOSE}\n\n", True)], _TEXT_BEFORE))

    def empty_thought_ids(self) -> list[int]:
        """Ids behind a prompt that leave the thought out: opened and closed at once, as for examples without one."""
        opening = "" if self.opens_thought else f"{THINK_OPEN}\n"
        prompt = self._segments(self.chat_template.pieces([{"role": "user", "content": "x"}]))
        return self._ids(self._segments([Piece(f"{opening}{THINK_CLOSE}\n\n", True)], prompt[-1]))

    def completion_text(self, example: Example) -> str:
        """What the model should write, from the opening of its thought to the end of its turn, as text."""
        return "".join(piece.text for piece in self._completion_pieces(example))

    def encode(self, example: Example, max_tokens: int | None = None) -> EncodedExample:
        """Ids and labels of one example; the loss sees the thought, the answer and the end of turn.

        Cut off after ``max_tokens`` as a tokenizer's ``truncation=True`` cuts: the end of turn goes first.
        """
        self.chat_template.check_continuation()
        prompt = self.chat_template.pieces(self._conversation(example.question))
        if self.opens_thought:
            prompt = _without_thought_opening(prompt)
        segments = self._segments(prompt)
        prompt_ids = self._with_one_bos(self._ids(segments))
        # The completion's own ids, never merged with the prompt's: while chatting the prompt comes first, too.
        completion_ids = self._ids(self._segments(self._completion_pieces(example), segments[-1]))
        return EncodedExample(
            input_ids=(prompt_ids + completion_ids)[:max_tokens],
            labels=([IGNORED_LABEL] * len(prompt_ids) + completion_ids)[:max_tokens],
        )

    def encode_parts(self, example: Example, max_tokens: int | None = None) -> tuple[list[int], list[int], list[int]]:
        """Ids of (prompt, thought with its tags, answer with the end of turn): ``encode`` cut in three."""
        prompt, thought, answer = self._whole_parts(example)
        if max_tokens is None:
            return prompt, thought, answer
        left = max(0, max_tokens - len(prompt))
        return prompt[:max_tokens], thought[:left], answer[: max(0, left - len(thought))]

    def _whole_parts(self, example: Example) -> tuple[list[int], list[int], list[int]]:
        whole = self.encode(example)
        completion = whole.completion_ids
        if not self._thought_pieces(example):
            return whole.prompt_ids, [], completion
        answer = self._ids(self._segments(self._answer_pieces(example), _TEXT_BEFORE))
        # A merge may span the blank line and the answer's first letters; then the cut moves, never the ids.
        return whole.prompt_ids, completion[: len(completion) - len(answer)], completion[-len(answer) :]

    def _conversation(self, question: str) -> list[Message]:
        user = {"role": "user", "content": question.strip()}
        return [user] if self.system is None else [{"role": "system", "content": self.system}, user]

    def _completion_pieces(self, example: Example) -> list[Piece]:
        return [*self._thought_pieces(example), *self._answer_pieces(example)]

    def _thought_pieces(self, example: Example) -> list[Piece]:
        if example.reasoning is not None:
            thought = [Piece(example.reasoning.strip(), False), Piece("\n", True)]
        elif self.opens_thought:
            # Inference begins inside a thought whatever was trained, so an example without one closes it at once. A
            # second line break would become one token with the first, and no longer go on from the prompt's ids.
            thought = []
        else:
            return []
        return [Piece(f"{THINK_OPEN}\n", True), *thought, Piece(f"{THINK_CLOSE}\n\n", True)]

    def _answer_pieces(self, example: Example) -> list[Piece]:
        return [Piece(example.answer.strip(), False), Piece(self.end_of_turn, True)]

    def _segments(self, pieces: Sequence[Piece], before: _Segment | None = None) -> list[_Segment]:
        """Pieces cut at the control tokens of the template's text, all other text merged; ``before`` precedes them.

        White space that a control token swallows is left out, whoever wrote it, as transformers leaves it out.
        """
        parts: list[tuple[str, bool]] = []
        plain = ""
        for piece in pieces:
            if not piece.from_template:
                plain += piece.text
                continue
            for index, part in enumerate(self._control_pattern.split(piece.text)):
                if index % 2 == 0:
                    plain += part
                else:
                    parts += [(plain, False), (part, True)]
                    plain = ""
        parts.append((plain, False))
        segments: list[_Segment] = []
        for index, (text, is_control) in enumerate(parts):
            if not is_control:
                if before is not None and before.is_control and before.text in self.vocabulary.strips_right:
                    text = text.lstrip(_WHITE_SPACE)
                if index + 1 < len(parts) and parts[index + 1][0] in self.vocabulary.strips_left:
                    text = text.rstrip(_WHITE_SPACE)
                if not text:
                    continue
            after: Preceding = "nothing" if before is None else "control" if before.is_control else "text"
            before = _Segment(text, is_control, after)
            segments.append(before)
        return segments

    def _ids(self, segments: Sequence[_Segment]) -> list[int]:
        ids: list[int] = []
        for segment in segments:
            if segment.is_control:
                ids.append(self.vocabulary.control_tokens[segment.text])
            else:
                ids.extend(self._text_ids(segment))
        return ids

    def _text_ids(self, segment: _Segment) -> list[int]:
        text = segment.text
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MedcotError(
                f"The text behind {text[max(0, error.start - 20) : error.start]!r} is half a character (the lone "
                f"surrogate {text[error.start]!r}): remove it."
            ) from error
        return self.vocabulary.encode_text(text, segment.after)

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
        """One group that matches any control token, the longest first; nothing where there are none."""
        longest_first = sorted(self.vocabulary.control_tokens, key=len, reverse=True)
        return re.compile("(" + ("|".join(map(re.escape, longest_first)) or r"(?!)") + ")")


def _without_thought_opening(pieces: Sequence[Piece]) -> list[Piece]:
    last = pieces[-1]
    return [*pieces[:-1], Piece(last.text.rstrip().removesuffix(THINK_OPEN), True)]
