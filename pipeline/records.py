"""One row of a source as a usable training record, or the reason why it is none."""

from __future__ import annotations

import json
import re
import string
from dataclasses import dataclass
from typing import Any

from pipeline.cleaning import clean_text, sentence_starts
from pipeline.config import Columns, Config
from pipeline.prompts import THINK_CLOSE, THINK_OPEN, ChatFormat, Example
from pipeline.sources import SourceRow

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one encoded example; the thought's tags count as thought, the end of turn as answer."""

    prompt: int
    thought: int
    answer: int

    @property
    def whole(self) -> int:
        return self.prompt + self.thought + self.answer


@dataclass(frozen=True)
class Record:
    """A usable record.

    ``options`` maps letters to texts and ``answer_idx`` is the right letter; ``repairs`` names what cleaning
    changed; ``cut`` says that sentences of the reasoning were left out to fit the context, ``truncated`` that training
    will see only its first model.max_seq_length tokens, which ``tokens`` counts.
    """

    example: Example
    options: dict[str, str] | None
    answer_idx: str | None
    source: str
    number: int
    tokens: TokenCounts
    repairs: frozenset[str] = frozenset()
    cut: bool = False
    truncated: bool = False

    def to_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "question": self.example.question,
            "reasoning": self.example.reasoning,
            "answer": self.example.answer,
            "source": self.source,
            "number": self.number,
        }
        if self.options is not None:
            fields |= {"options": self.options, "answer_idx": self.answer_idx}
        return fields


class Rejected(Exception):
    """Why a record is left out, in a few words that are counted over all records.

    ``drawn`` says that the row takes part in the shuffle all the same: readable rows with long enough texts do, so
    that a stricter cleaning leaves the others in the order of the earlier projects' recipes.
    """

    def __init__(self, reason: str, detail: str = "", *, drawn: bool = False) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.drawn = drawn


def usable_record(row: SourceRow, config: Config, chat_format: ChatFormat) -> Record:
    """The row cleaned, checked and measured; raises Rejected."""
    if row.columns is None:
        raise Rejected("unreadable", row.fault or "")
    names = config.data.columns
    repairs: set[str] = set()
    question = _text(row.columns, names.question, repairs)
    answer = _text(row.columns, names.answer, repairs)
    reasoning = None if names.reasoning is None else _text(row.columns, names.reasoning, repairs)
    for name, text in ((names.question, question), (names.answer, answer)):
        if len(text) < config.data.min_characters:
            raise Rejected("too short", f"{name} has {len(text)} characters")
    if reasoning is not None and not reasoning:
        raise Rejected("empty", f"{names.reasoning}")
    if any(tag in text for tag in (THINK_OPEN, THINK_CLOSE) for text in (reasoning or "", answer)):
        raise Rejected("think tag in the text", "it would open or close the thought in the wrong place", drawn=True)
    options, answer_idx = _options(row.columns, names)
    example = Example(question, reasoning, answer)
    if config.data.too_long == "truncate":
        tokens, truncated = _truncated(example, config.model.max_seq_length, chat_format)
        return Record(
            example, options, answer_idx, row.source, row.number, tokens, frozenset(repairs), truncated=truncated
        )
    example, tokens = _fitted(example, config, chat_format)
    cut = example.reasoning != reasoning
    return Record(example, options, answer_idx, row.source, row.number, tokens, frozenset(repairs), cut)


def _text(columns: dict[str, Any], name: str, repairs: set[str]) -> str:
    if name not in columns:
        raise Rejected("missing column", f"{name} (found {', '.join(sorted(map(str, columns)))})")
    value = columns[name]
    if not isinstance(value, str):
        raise Rejected("not text", f"{name} is {'empty' if value is None else type(value).__name__}")
    if _SURROGATE.search(value):
        raise Rejected("not text", f"{name} holds half a surrogate pair")
    text, changes = clean_text(value)
    repairs |= changes
    return text


def _options(columns: dict[str, Any], names: Columns) -> tuple[dict[str, str] | None, str | None]:
    """Letters to texts, from a mapping, a list, or either as JSON text (CSV has nothing else)."""
    found = columns.get(names.options) if names.options else None
    if isinstance(found, str) and found.strip():
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            raise Rejected("options are not JSON", repr(found)[:80], drawn=True) from None
    if isinstance(found, list) and len(found) <= len(string.ascii_uppercase):
        found = dict(zip(string.ascii_uppercase, found, strict=False))
    if isinstance(found, dict):
        found = {letter: text for letter, text in found.items() if text is not None}  # Parquet fills up structs
    if not found:
        return None, None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise Rejected("options are not letters with texts", repr(found)[:80], drawn=True)
    options = {str(letter): clean_text(text)[0] for letter, text in found.items()}
    answer_idx = columns.get(names.answer_idx) if names.answer_idx else None
    if isinstance(answer_idx, str) and answer_idx.strip() in options:
        return options, answer_idx.strip()
    if isinstance(answer_idx, int) and not isinstance(answer_idx, bool) and 0 <= answer_idx < len(options):
        return options, list(options)[answer_idx]
    raise Rejected("answer_idx is none of the options", repr(answer_idx)[:80], drawn=True)


def _truncated(example: Example, limit: int, chat_format: ChatFormat) -> tuple[TokenCounts, bool]:
    """The size of what is left of the example, and whether that is less than all; Rejected when it is the prompt."""
    whole = count_tokens(example, chat_format)
    if whole.prompt >= limit:
        raise Rejected("too long", f"the prompt has {whole.prompt} tokens, model.max_seq_length is {limit}", drawn=True)
    thought = min(whole.thought, limit - whole.prompt)
    left = TokenCounts(whole.prompt, thought, min(whole.answer, limit - whole.prompt - thought))
    return left, left != whole


def _fitted(example: Example, config: Config, chat_format: ChatFormat) -> tuple[Example, TokenCounts]:
    """The example as it fits the context, and its size; raises Rejected when it does not."""
    limit = config.model.max_seq_length
    tokens = count_tokens(example, chat_format)
    if tokens.whole <= limit:
        return example, tokens
    too_long = f"{tokens.whole} tokens, model.max_seq_length is {limit}"
    if config.data.too_long == "drop" or example.reasoning is None:
        raise Rejected("too long", too_long, drawn=True)
    # Sentences go from the beginning: the end of a thought is what leads to its answer.
    starts = sentence_starts(example.reasoning)
    low, high = 1, len(starts)  # the smallest number of sentences to leave out; all of them is too many
    while low < high:
        middle = (low + high) // 2
        shorter = Example(example.question, example.reasoning[starts[middle] :], example.answer)
        if count_tokens(shorter, chat_format).whole <= limit:
            high = middle
        else:
            low = middle + 1
    if low == len(starts):
        raise Rejected("too long", f"{too_long}, and not one sentence of the reasoning fits", drawn=True)
    shorter = Example(example.question, example.reasoning[starts[low] :].strip(), example.answer)
    return shorter, count_tokens(shorter, chat_format)


def count_tokens(example: Example, chat_format: ChatFormat) -> TokenCounts:
    prompt, thought, answer = chat_format.encode_parts(example)
    return TokenCounts(len(prompt), len(thought), len(answer))
