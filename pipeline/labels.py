"""Proof of what the loss sees: the labels of an example, decoded and compared with what they should say."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from pipeline.prompts import IGNORED_LABEL, ChatFormat, Example
from pipeline.vocabulary import TransformersVocabulary


class Fragment(BaseModel):
    """A stretch of the example that is wholly inside or outside the loss."""

    model_config = ConfigDict(frozen=True)
    text: str
    in_loss: bool


def loss_mask(
    chat_format: ChatFormat, vocabulary: TransformersVocabulary, example: Example, max_tokens: int | None = None
) -> list[Fragment]:
    """The example's text as fragments inside and outside the loss, decoded from the ids that training sees."""
    encoded = chat_format.encode(example, max_tokens)
    fragments = []
    for in_loss, group in itertools.groupby(
        zip(encoded.input_ids, encoded.labels, strict=True), key=lambda pair: pair[1] != IGNORED_LABEL
    ):
        fragments.append(Fragment(text=vocabulary.decode([token for token, _ in group]), in_loss=in_loss))
    return fragments


def label_fault(chat_format: ChatFormat, vocabulary: TransformersVocabulary, example: Example) -> str | None:
    """What of the example the loss would not see, as the decoded labels show it; None when all is there."""
    labelled = vocabulary.decode(chat_format.encode(example).completion_ids)
    if labelled != vocabulary.representable(chat_format.completion_text(example)):
        return f"the labels say {labelled!r:.120} instead of the completion"
    return None


def prompt_fault(chat_format: ChatFormat, vocabulary: TransformersVocabulary) -> str | None:
    """How the prompt differs from the tokenizer's own ids of the rendered text; None when it does not."""
    asked = {"role": "user", "content": "What is sepsis?"}
    for messages in ([asked], [asked, {"role": "assistant", "content": "An infection."}, asked]):
        text = chat_format.render(messages)
        ours, whole = chat_format.prompt_ids(messages), vocabulary.whole(text)
        if ours[len(ours) - len(whole) :] != whole:
            return (
                f"the tokenizer makes other tokens of {text[:60]!r} than of its parts, because added tokens in it are "
                "single_word or normalized: use another model.base or chat template"
            )
    return None


def label_verdict(
    chat_format: ChatFormat,
    vocabulary: TransformersVocabulary,
    examples: Sequence[Example],
    max_tokens: int | None = None,
) -> tuple[str, str | None]:
    """The sentence about all examples' labels, and the problem where there is one.

    Of examples longer than ``max_tokens`` the labels are the beginning of what they would be.
    """
    fault = prompt_fault(chat_format, vocabulary)
    if fault:
        return fault, fault
    if not examples:
        return "no usable record to show", None
    faults = [fault for example in examples if (fault := label_fault(chat_format, vocabulary, example))]
    if faults:
        fault = f"{len(faults)} of {len(examples)} records: {faults[0]}: use another model.base or chat template"
        return fault, fault
    with_reasoning = sum(example.reasoning is not None for example in examples)
    what = "reasoning, answer and end of turn are" if with_reasoning else "answer and end of turn are"
    verdict = f"{what} in the loss of all {len(examples)} records looked at, the prompt is not"
    lengths = [] if max_tokens is None else [len(chat_format.encode(example).input_ids) for example in examples]
    if longer := sum(length > (max_tokens or 0) for length in lengths):
        verb = "is" if longer == 1 else "are"
        verdict += f"; {longer} of them {verb} cut off after {max_tokens} tokens, without the end of turn"
    return verdict, None
