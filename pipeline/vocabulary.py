"""The two tokenizers that prompts are encoded with: transformers' while training, llama.cpp's for a GGUF."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import MedcotError

# Text that no vocabulary merges with what follows; see encode_text.
_ANCHOR = "\n"


class TransformersVocabulary:
    """A fast tokenizer of transformers, asked for text and control tokens apart.

    Text goes through a copy of the tokenizer from which every added token is removed, special or not: R1's
    ``</think>`` and ``<｜User｜>`` are added tokens that are *not* marked special, so ``split_special_tokens``
    would still recognise them.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise MedcotError(
                f"{type(tokenizer).__name__} is a slow tokenizer: medcot needs one with a tokenizer.json."
            )
        if tokenizer.eos_token is None:
            raise MedcotError("The tokenizer names no eos_token: set it in tokenizer_config.json.")
        description = json.loads(backend.to_str())
        self._tokenizer = tokenizer
        self.bos_token: str | None = tokenizer.bos_token
        self.eos_token: str = tokenizer.eos_token
        self.control_tokens: Mapping[str, int] = {
            token["content"]: token["id"] for token in description["added_tokens"]
        }
        self.adds_bos = bool(
            tokenizer.bos_token is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
        )
        description["added_tokens"] = []
        description["post_processor"] = None
        self._text = Tokenizer.from_str(json.dumps(description))

    def encode_text(self, text: str, *, after_text: bool) -> list[int]:
        if not after_text:
            ids: list[int] = self._text.encode(text, add_special_tokens=False).ids
            return ids
        return _after_anchor(self, text)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class LlamaCppVocabulary:
    """The vocabulary of a GGUF, through a ``llama_cpp.Llama`` that has it loaded (``vocab_only`` is enough)."""

    def __init__(self, llama: Any) -> None:
        import llama_cpp

        vocab = llama_cpp.llama_model_get_vocab(llama.model)
        self._llama = llama
        # CONTROL, USER_DEFINED and UNKNOWN tokens are the ones llama.cpp cuts out of text before merging.
        special = (
            llama_cpp.LLAMA_TOKEN_ATTR_CONTROL
            | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
            | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        )
        texts = {
            index: llama_cpp.llama_vocab_get_text(vocab, index).decode("utf-8", errors="replace")
            for index in range(llama_cpp.llama_vocab_n_tokens(vocab))
            if llama_cpp.llama_vocab_get_attr(vocab, index) & special
        }
        self.control_tokens: Mapping[str, int] = {text: index for index, text in texts.items()}
        self._user_defined = [
            text
            for index, text in texts.items()
            if llama_cpp.llama_vocab_get_attr(vocab, index) & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        ]
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(vocab))
        bos, eos = llama_cpp.llama_vocab_bos(vocab), llama_cpp.llama_vocab_eos(vocab)
        self.bos_token: str | None = texts.get(bos)
        if eos not in texts:
            raise MedcotError("The GGUF names no end-of-turn token (tokenizer.ggml.eos_token_id): export it again.")
        self.eos_token: str = texts[eos]

    def encode_text(self, text: str, *, after_text: bool) -> list[int]:
        if after_text:
            return _after_anchor(self, text)
        # llama.cpp recognises USER_DEFINED tokens even where special tokens are off, so text that spells one is
        # encoded in two halves.
        ids: list[int] = []
        for part in _split_inside(text, self._user_defined):
            ids += self._llama.tokenize(part.encode(), add_bos=False, special=False)
        return ids


def _after_anchor(vocabulary: TransformersVocabulary | LlamaCppVocabulary, text: str) -> list[int]:
    """Ids of ``text`` as they are behind other text: encode with an anchor before it and drop the anchor's ids."""
    anchor = vocabulary.encode_text(_ANCHOR, after_text=False)
    whole = vocabulary.encode_text(_ANCHOR + text, after_text=False)
    if whole[: len(anchor)] == anchor:
        return whole[len(anchor) :]
    return vocabulary.encode_text(text, after_text=False)


def _split_inside(text: str, tokens: list[str]) -> list[str]:
    """Cut ``text`` before the last character of every spelled-out token, so that no part contains one.

    Cut there, the parts are those that R1's pre-tokenizer makes of ``</think>`` anyway, so the ids stay the same.
    """
    cuts = set()
    for token in tokens:
        start = text.find(token) if len(token) > 1 else -1
        while start >= 0:
            cuts.add(start + len(token) - 1)
            start = text.find(token, start + 1)
    edges = [0, *sorted(cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges) if a < b]
