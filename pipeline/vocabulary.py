"""The two tokenizers that prompts are encoded with: transformers' while training, llama.cpp's for a GGUF.

Control tokens are all added tokens, special or not (R1's ``</think>`` and ``<｜User｜>`` are not), but for those that
are white space: some vocabularies have runs of spaces as added tokens, and that is ordinary text.
"""

from __future__ import annotations

import functools
import itertools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import MedcotError

# Text that no vocabulary merges with what follows; see encode_text.
_ANCHOR = "\n"
_SHORT = 100  # characters
_SPACE_MARK = "\u2581"  # SentencePiece's mark for a space
# A GGUF key of our own: the Unicode form that the tokenizer brings text into first (Qwen2: NFC) and llama.cpp does not.
NORMALIZER_KEY = "medcot.normalizer"


class TransformersVocabulary:
    """A fast tokenizer of transformers, asked for text and control tokens apart.

    Text goes through a copy of the tokenizer from which the control tokens are removed: ``split_special_tokens``
    would still recognise those that are not marked special.
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
        added = description["added_tokens"]
        self._tokenizer = tokenizer
        self.bos_token: str | None = tokenizer.bos_token
        self.eos_token: str = tokenizer.eos_token
        self.control_tokens: Mapping[str, int] = {
            token["content"]: token["id"] for token in added if not _is_white_space(token["content"])
        }
        self.adds_bos = bool(
            tokenizer.bos_token is not None and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
        )
        description["added_tokens"] = [token for token in added if _is_white_space(token["content"])]
        # Without a place in the model's own vocabulary they would get the ids of the tokens that were removed.
        description["model"]["vocab"] |= {token["content"]: token["id"] for token in description["added_tokens"]}
        # A length that was set once when the tokenizer was saved would cut records here.
        description["post_processor"] = description["truncation"] = description["padding"] = None
        self._text = Tokenizer.from_str(json.dumps(description))
        # What a template writes around the contents is the same for every record: two thirds of all calls.
        self._short_ids = functools.lru_cache(maxsize=1024)(self._ids)
        self._composes_accents = (description["normalizer"] or {}).get("type") == "NFC"
        # SentencePiece's own vocabularies fall back to bytes; byte-level BPE never writes the mark.
        self._marks_spaces = bool(description["model"].get("byte_fallback"))

    def encode_text(self, text: str, *, after_text: bool) -> list[int]:
        if after_text:
            return _after_anchor(self, text)
        return list(self._short_ids(text) if len(text) <= _SHORT else self._ids(text))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._text.encode(text, add_special_tokens=False).ids
        return ids

    def representable(self, text: str) -> str:
        """``text`` as this tokenizer can give it back.

        SentencePiece writes a space as U+2581, so that character comes back as a space; and some tokenizers
        (Qwen's) compose accents first (NFC). Everything else comes back as it is.
        """
        if self._composes_accents:
            text = unicodedata.normalize("NFC", text)
        return text.replace(_SPACE_MARK, " ") if self._marks_spaces else text

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class LlamaCppVocabulary:
    """The vocabulary of a GGUF, through a ``llama_cpp.Llama`` that has it loaded (``vocab_only`` is enough)."""

    def __init__(self, llama: Any) -> None:
        import llama_cpp

        vocab = llama_cpp.llama_model_get_vocab(llama.model)
        self._llama = llama
        self._unicode_form = llama.metadata.get(NORMALIZER_KEY)
        if self._unicode_form not in (None, "NFC"):
            raise MedcotError(
                f"The GGUF's {NORMALIZER_KEY} is {self._unicode_form!r}, and medcot writes NFC: export again."
            )
        self._cuts: dict[str, int] = {}
        # CONTROL, USER_DEFINED and UNKNOWN tokens are the ones llama.cpp cuts out of text before merging.
        user_defined = llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        special = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN | user_defined
        attributes = {
            index: attribute
            for index in range(llama_cpp.llama_vocab_n_tokens(vocab))
            if (attribute := llama_cpp.llama_vocab_get_attr(vocab, index)) & special
        }
        texts = {
            index: llama_cpp.llama_vocab_get_text(vocab, index).decode("utf-8", errors="replace")
            for index in attributes
        }
        self.control_tokens: Mapping[str, int] = {
            text: index for index, text in texts.items() if not _is_white_space(text)
        }
        self._user_defined = [
            text
            for index, text in texts.items()
            if attributes[index] & user_defined and len(text) > 1 and not _is_white_space(text)
        ]
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(vocab))
        bos, eos = llama_cpp.llama_vocab_bos(vocab), llama_cpp.llama_vocab_eos(vocab)
        self.bos_token: str | None = texts.get(bos)
        if eos not in texts:
            raise MedcotError("The GGUF names no end-of-turn token (tokenizer.ggml.eos_token_id): export it again.")
        self.eos_token: str = texts[eos]

    def normalized(self, text: str) -> str:
        """``text`` as the tokenizer that trained would see it."""
        return unicodedata.normalize(self._unicode_form, text) if self._unicode_form else text

    def encode_text(self, text: str, *, after_text: bool) -> list[int]:
        text = self.normalized(text)
        if after_text:
            return _after_anchor(self, text)
        # llama.cpp recognises USER_DEFINED tokens even where special tokens are off, so text that spells one is
        # encoded in two halves.
        first, *others = _split_inside(text, {token: self._cut(token) for token in self._user_defined if token in text})
        ids: list[int] = list(self._llama.tokenize(first.encode(), add_bos=False, special=False))
        for part in others:
            ids += _after_anchor(self, part)
        return ids

    def _cut(self, token: str) -> int:
        """Where to cut a token's spelling so that its halves become what the whole would without the token.

        Merges never cross the right place, so the halves have the fewest ids there. Of several such places the
        last is taken: R1's ``</think>`` is cut before ``>``, where its pre-tokenizer cuts anyway.
        """

        def ids(place: int) -> int:
            return len(self.encode_text(token[:place], after_text=True)) + len(
                self.encode_text(token[place:], after_text=True)
            )

        if token not in self._cuts:
            self._cuts[token] = min(range(len(token) - 1, 0, -1), key=ids)
        return self._cuts[token]


def _after_anchor(vocabulary: TransformersVocabulary | LlamaCppVocabulary, text: str) -> list[int]:
    """Ids of ``text`` as they are behind other text: encode with an anchor before it and drop the anchor's ids."""
    anchor = vocabulary.encode_text(_ANCHOR, after_text=False)
    whole = vocabulary.encode_text(_ANCHOR + text, after_text=False)
    if whole[: len(anchor)] == anchor:
        return whole[len(anchor) :]
    return vocabulary.encode_text(text, after_text=False)


def _split_inside(text: str, cuts: Mapping[str, int]) -> list[str]:
    """Cut ``text`` inside every spelled-out token, at the token's own place, so that no part contains one."""
    places = set()
    for token, cut in cuts.items():
        start = text.find(token)
        while start >= 0:
            places.add(start + cut)
            start = text.find(token, start + 1)
    edges = [0, *sorted(places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def _is_white_space(token: str) -> bool:
    return token.replace(_SPACE_MARK, " ").isspace()
