"""What trained: tokenizer, chat template, and base + adapter in 32 bit; the side that a GGUF is compared with."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.export import tokenizer_folder
from export.stress_corpus import control_token_texts
from export.verify_probe import Conversation, ReferenceExample, Request, VocabularyView, vocabulary_view
from pipeline.adapter_recipe import read_recipe
from pipeline.prompts import ChatFormat, Example

# Longest conversation whose logits are compared (tokens): 512 x 128,256 logits are 263 MB of temporary disk. Of longer
# ones the middle is left out, so that the end of the turn is always there.
_MAX_POSITIONS = 512
_KEPT_AT_END = 64
_SHOWN_TOKENS = 6
_DECOMPOSED = "e\u0301"  # é as two characters


class Reference:
    """The model's weights are read when logits are first asked for."""

    def __init__(self, base: Path, adapter: Path | None, system: str | None) -> None:
        from pipeline.base_model import load_tokenizer
        from pipeline.vocabulary import TransformersVocabulary

        self.recipe = read_recipe(adapter)
        self.has_adapter = adapter is not None
        self._base = base
        self._adapter = adapter
        self._system = self.recipe.system if system is None and self.recipe else system
        self._tokenizer = load_tokenizer(tokenizer_folder(base, adapter))
        self._vocabulary = TransformersVocabulary(self._tokenizer)
        self._chat_format = ChatFormat(self._tokenizer.chat_template, self._vocabulary, self._system)

    def request(
        self,
        gguf: Path,
        examples: Sequence[Example],
        texts: Sequence[str],
        max_new_tokens: int,
        threads: int | None,
        trained: Sequence[Example] = (),
    ) -> Request:
        """Everything the child is asked; the logits are asked for the ids of this side.

        Of ``examples`` the logits are asked too, of ``trained`` only the ids.
        """
        return Request(
            gguf=gguf.absolute(),
            system=self._system,
            texts=[*self._composed(texts), *control_token_texts(sorted(self._vocabulary.control_tokens))],
            conversations=_conversations(examples),
            examples=[
                ReferenceExample(question=each.question, reasoning=each.reasoning, answer=each.answer)
                for each in [*examples, *trained]
            ],
            evaluate=[_shortened(self._chat_format.encode(each).input_ids) for each in examples],
            question_ids=self._chat_format.question_ids(examples[0].question) if max_new_tokens else [],
            max_new_tokens=max_new_tokens,
            threads=threads,
        )

    def view(self, request: Request, size: int) -> VocabularyView:
        return vocabulary_view(
            request,
            self._vocabulary,
            self._chat_format,
            size,
            [self._tokenizer(text, add_special_tokens=False).input_ids for text in request.texts],
            [self._render(conversation) for conversation in request.conversations],
        )

    def logits(self, ids: Sequence[int], *, adapted: bool = True) -> npt.NDArray[np.float32]:
        """Next-token logits [positions, vocabulary]; not ``adapted`` are those of the base alone."""
        import torch

        with torch.inference_mode(), nullcontext() if adapted else self._model.disable_adapter():
            logits: npt.NDArray[np.float32] = self._model(torch.tensor([list(ids)])).logits[0].numpy()
        return logits

    def text(self, ids: Sequence[int]) -> str:
        """The last tokens of a sequence, to show where something is."""
        return self._vocabulary.decode(ids[-_SHOWN_TOKENS:])

    def _composed(self, texts: Sequence[str]) -> list[str]:
        """Qwen's tokenizers compose accents first (NFC), which llama.cpp cannot; export warns of it."""
        if self._vocabulary.representable(_DECOMPOSED) == _DECOMPOSED:
            return list(texts)
        return [unicodedata.normalize("NFC", text) for text in texts]

    @cached_property
    def _model(self) -> Any:
        """Base + adapter in float32, the adapter not merged, so that merging is checked too."""
        from export.reference_model import load_reference

        return load_reference(self._base, self._adapter)

    def _render(self, conversation: Conversation) -> str | None:
        import jinja2

        try:
            text: str = self._tokenizer.apply_chat_template(
                self._chat_format.chat_template.messages(conversation.messages),
                tokenize=False,
                add_generation_prompt=conversation.add_generation_prompt,
            )
        except jinja2.TemplateError:
            return None
        return text


def _shortened(ids: list[int]) -> list[int]:
    if len(ids) <= _MAX_POSITIONS:
        return ids
    return [*ids[: _MAX_POSITIONS - _KEPT_AT_END], *ids[-_KEPT_AT_END:]]


def _conversations(examples: Sequence[Example]) -> list[Conversation]:
    """The held-out questions, and shapes of conversation that templates treat apart."""
    user = {"role": "user", "content": "Is 5 mg enough?"}
    answer = {"role": "assistant", "content": "<think>\nProbably.\n</think>\n\nYes, it is."}
    system = {"role": "system", "content": "You are a careful physician."}
    shapes = [[user], [user, answer], [user, answer, user], [system, user], [system, user, answer, user]]
    shapes += [[{"role": "user", "content": each.question}] for each in examples]
    return [
        Conversation(messages=messages, add_generation_prompt=prompt) for messages in shapes for prompt in (True, False)
    ]
