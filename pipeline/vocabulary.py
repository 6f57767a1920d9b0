"""The two tokenizers that prompts are encoded with: transformers' while training, llama.cpp's for a GGUF.

Control tokens are all added tokens, special or not (R1's ``</think>`` and ``<｜User｜>`` are not), but for those that
are white space: some vocabularies have runs of spaces as added tokens, and that is ordinary text.
"""

from __future__ import annotations

import functools
import itertools
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from pipeline.errors import MedcotError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What stands before a text: nothing, a control token, or other text.
Preceding = Literal["nothing", "control", "text"]
# Where SentencePiece's space is put before a text. "each": before every text that is not preceded by text, also before
# one that begins with a space (tokenizers' normalizer Prepend; llama.cpp). "always" and "first" are the prepend schemes
# of tokenizers' Metaspace, which puts none before a space that is there: before each, or only where nothing precedes.
SpaceScheme = Literal["each", "always", "first"]
# Text that is not merged with what follows: SentencePiece's vocabularies spell a private character in bytes, and
# byte-level ones cut words behind a line break.
_SENTENCEPIECE_ANCHOR, _BYTE_LEVEL_ANCHOR = "\ue020", "\n"
_SHORT = 100  # characters
_SPACE_MARK = "\u2581"  # SentencePiece's mark for a space
_CONTROL_MARK = "\ue020control\ue021"  # stands in for any control token, in texts of ours only
# GGUF keys of our own, written where the tokenizer does what llama.cpp does not: the Unicode form that it brings text
# into first (Qwen2: NFC), where it puts spaces, and the ids of the tokens that swallow white space beside them.
NORMALIZER_KEY = "medcot.normalizer"
SPACE_SCHEME_KEY = "medcot.space_scheme"
LSTRIP_KEY, RSTRIP_KEY = "medcot.lstrip_tokens", "medcot.rstrip_tokens"


class TransformersVocabulary:
    """A fast tokenizer of transformers, asked for text and control tokens apart.

    Text goes through a copy of the tokenizer from which the control tokens are removed: ``split_special_tokens``
    would still recognise those that are not marked special.
    """

    def __init__(self, tokenizer: Any) -> None:
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
        stripping: list[frozenset[str]] = [
            frozenset(token["content"] for token in added if token[side] and token["content"] in self.control_tokens)
            for side in ("lstrip", "rstrip")
        ]
        self.strips_left, self.strips_right = stripping
        self._text = _text_tokenizer(description)
        # What a template writes around the contents is the same for every record: two thirds of all calls.
        self._short_ids = functools.lru_cache(maxsize=1024)(self._ids)
        self._composes_accents = (description["normalizer"] or {}).get("type") == "NFC"
        # SentencePiece's own vocabularies fall back to bytes; byte-level BPE never writes the mark.
        self._marks_spaces = bool(description["model"].get("byte_fallback"))
        self._anchor = _SENTENCEPIECE_ANCHOR if self._marks_spaces else _BYTE_LEVEL_ANCHOR
        self._space_scheme = _space_scheme(self._text) if self._marks_spaces else None

    def encode_text(self, text: str, after: Preceding) -> list[int]:
        if after == "text" or (after == "control" and self._space_scheme == "first"):
            return _after_anchor(self._start_ids, text, self._anchor)
        return self._start_ids(text)

    def whole(self, text: str) -> list[int]:
        """Ids of a rendered conversation as transformers has them: control tokens recognised, BOS not added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _start_ids(self, text: str) -> list[int]:
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
        ours = any(key.startswith("medcot.") for key in llama.metadata)
        self.strips_left, self.strips_right = (
            frozenset(
                text
                for index, text in texts.items()
                if (str(index) in llama.metadata.get(key, "").split() if ours else attributes[index] & attribute)
            )
            for key, attribute in (
                (LSTRIP_KEY, llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP),
                (RSTRIP_KEY, llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP),
            )
        )
        is_sentencepiece = llama.metadata.get("tokenizer.ggml.model") == "llama"
        self._anchor = _SENTENCEPIECE_ANCHOR if is_sentencepiece else _BYTE_LEVEL_ANCHOR
        self._space_scheme = llama.metadata.get(SPACE_SCHEME_KEY, "each")
        if self._space_scheme not in get_args(SpaceScheme):
            raise MedcotError(
                f"The GGUF's {SPACE_SCHEME_KEY} is {self._space_scheme!r}, which this version of medcot does not know: "
                "export the model again."
            )
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

    def encode_text(self, text: str, after: Preceding) -> list[int]:
        text = self.normalized(text)
        has_space = self._space_scheme != "each" and text.startswith((" ", _SPACE_MARK))
        if after == "text" or has_space or (after == "control" and self._space_scheme == "first"):
            return _after_anchor(self._start_ids, text, self._anchor)
        return self._start_ids(text)

    def _start_ids(self, text: str) -> list[int]:
        # llama.cpp recognises USER_DEFINED tokens even where special tokens are off, so text that spells one is
        # encoded in two halves.
        first, *others = _split_inside(text, {token: self._cut(token) for token in self._user_defined if token in text})
        ids: list[int] = list(self._llama.tokenize(first.encode(), add_bos=False, special=False))
        for part in others:
            ids += _after_anchor(self._start_ids, part, self._anchor)
        return ids

    def _cut(self, token: str) -> int:
        """Where to cut a token's spelling so that its halves become what the whole would without the token.

        Merges never cross the right place, so the halves have the fewest ids there. Of several such places the
        last is taken: R1's ``</think>`` is cut before ``>``, where its pre-tokenizer cuts anyway.
        """

        def ids(place: int) -> int:
            return sum(
                len(_after_anchor(self._start_ids, part, self._anchor)) for part in (token[:place], token[place:])
            )

        if token not in self._cuts:
            self._cuts[token] = min(range(len(token) - 1, 0, -1), key=ids)
        return self._cuts[token]


def _text_tokenizer(description: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a tokenizer.json without control tokens and without what it puts around a text."""
    from tokenizers import Tokenizer

    added = [token for token in description.get("added_tokens") or [] if _is_white_space(token["content"])]
    # Without a place in the model's own vocabulary they would get the ids of the tokens that were removed.
    vocabulary = description["model"]["vocab"] | {token["content"]: token["id"] for token in added}
    model = {**description["model"], "vocab": vocabulary}
    # A length that was set once when the tokenizer was saved would cut records here.
    nothing = dict.fromkeys(("post_processor", "truncation", "padding"))
    return Tokenizer.from_str(json.dumps({**description, "added_tokens": added, "model": model, **nothing}))


def space_scheme(description: Mapping[str, Any]) -> SpaceScheme | None:
    """Where the SentencePiece tokenizer of a tokenizer.json puts spaces; None where it puts none."""
    return _space_scheme(_text_tokenizer(description))


def _space_scheme(text_tokenizer: Tokenizer) -> SpaceScheme | None:
    """Found out by trying, because a normalizer, a pre-tokenizer or both may put the space there."""
    from tokenizers import AddedToken, Tokenizer

    def encode(text: str) -> list[int]:
        ids: list[int] = text_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    if encode("x") == _after_anchor(encode, "x", _SENTENCEPIECE_ANCHOR):
        return None
    marked = Tokenizer.from_str(text_tokenizer.to_str())
    marked.add_special_tokens([AddedToken(_CONTROL_MARK, special=True, normalized=False)])
    after_control = marked.encode(f"{_CONTROL_MARK}x", add_special_tokens=False).ids[1:]
    if after_control == _after_anchor(encode, "x", _SENTENCEPIECE_ANCHOR):
        return "first"
    return "always" if encode(" x") == _after_anchor(encode, " x", _SENTENCEPIECE_ANCHOR) else "each"


def _after_anchor(encode: Callable[[str], list[int]], text: str, anchor: str) -> list[int]:
    """Ids of ``text`` as they are behind other text: encode with an anchor before it and drop the anchor's ids."""
    before = encode(anchor)
    whole = encode(anchor + text)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return encode(text)


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
