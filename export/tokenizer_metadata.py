"""A Hugging Face tokenizer as GGUF metadata: tokens, types, merges or scores, special ids, chat template.

Two kinds exist: byte-level BPE (``tokenizer.ggml.model`` = gpt2: SmolLM2, Llama 3, Qwen2, R1-Distill) and
SentencePiece (= llama: Llama 2, TinyLlama, Mistral 7B). What is written equals what llama.cpp's converter writes
(``conversion/base.py``), but is read from the tokenizer's own description instead of guessed from hashes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from pipeline.errors import MedcotError
from pipeline.json_files import read_json
from pipeline.prompts import ChatFormat
from pipeline.tokenizer_files import (
    CHAT_TEMPLATE,
    SENTENCEPIECE_MODEL,
    SPECIAL_ROLES,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    complete_tokenizer,
    default_chat_template,
    numbered_tokens,
    read_tokenizer_json,
    special_token_ids,
)
from pipeline.vocabulary import (
    LSTRIP_KEY,
    NORMALIZER_KEY,
    RSTRIP_KEY,
    SPACE_SCHEME_KEY,
    Preceding,
    SpaceScheme,
    space_scheme,
)

_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a byte-level tokenizer cuts text into words -> the name llama.cpp knows that rule by.
_PRE_TOKENIZERS = {
    ("Digits", "ByteLevel"): "smollm",
    (f"Split {_LLAMA3_SPLIT}", "ByteLevel without words"): "llama-bpe",
    (f"Split {_QWEN2_SPLIT}", "ByteLevel without words"): "qwen2",
    (f"Split {_TEKKEN_SPLIT}", "ByteLevel without words"): "tekken",
    ("ByteLevel",): "gpt-2",
}


@dataclass(frozen=True)
class Vocabulary:
    """Everything ``tokenizer.*`` that a GGUF holds; scores belong to SentencePiece, merges and pre to BPE."""

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] | None
    merges: list[str] | None
    special_ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str
    normalizer: str | None = None  # what the tokenizer does to text first and llama.cpp does not: NFC in Qwen2
    space_scheme: SpaceScheme | None = None
    strips_left: tuple[int, ...] = ()  # ids of control tokens that swallow the white space before them,
    strips_right: tuple[int, ...] = ()  # and after them

    @property
    def remarks(self) -> list[str]:
        """What llama.cpp does otherwise than the tokenizer; sentences for the user."""
        remarks = []
        if self.normalizer is not None:
            remarks.append(
                f"The tokenizer brings text into the Unicode form {self.normalizer} first; medcot does so too, other "
                "programs do not: give them composed characters (é as one, not as e and an accent)."
            )
        if self.space_scheme == "first":
            remarks.append(
                "llama.cpp puts a space before the text that follows a control token, which the tokenizer does not: "
                "medcot writes the prompts that trained, other programs write one more token at those places."
            )
        if strips := sorted({*self.strips_left, *self.strips_right}):
            others = f" and {len(strips) - 1} more" if len(strips) > 1 else ""
            remarks.append(
                f"The tokenizer drops the white space next to the control token {self.tokens[strips[0]]}{others}, and "
                "llama.cpp keeps it: medcot writes the prompts that trained, other programs write that white space too."
            )
        return remarks

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([token.encode() for token in self.tokens])
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for role, add in (
            ("bos", writer.add_bos_token_id),
            ("eos", writer.add_eos_token_id),
            ("unk", writer.add_unk_token_id),
            ("pad", writer.add_pad_token_id),
            ("eot", writer.add_eot_token_id),
        ):
            if role in self.special_ids:
                add(self.special_ids[role])
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        writer.add_chat_template(self.chat_template)
        if self.normalizer is not None:
            writer.add_string(NORMALIZER_KEY, self.normalizer)
        if self.space_scheme not in (None, "each"):  # llama.cpp's own
            writer.add_string(SPACE_SCHEME_KEY, self.space_scheme)
        for key, ids in ((LSTRIP_KEY, self.strips_left), (RSTRIP_KEY, self.strips_right)):
            if ids:
                writer.add_string(key, " ".join(map(str, ids)))


@dataclass
class _SpecialTexts:
    """As much of a vocabulary as finding the end of a turn in a chat template needs (``pipeline.prompts``)."""

    bos_token: str | None
    eos_token: str
    control_tokens: Mapping[str, int]
    adds_bos: bool
    strips_left: frozenset[str] = frozenset()
    strips_right: frozenset[str] = frozenset()

    def encode_text(self, text: str, after: Preceding) -> list[int]:
        raise NotImplementedError("rendering needs no tokens")


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer in ``folder``, padded with unused tokens to the model's ``size``.

    Raises MedcotError for a tokenizer llama.cpp could not follow, or one without eos or chat template.
    """
    return _with_end_of_turn(_read_vocabulary(folder, size))


def chat_format(vocabulary: Vocabulary) -> ChatFormat:
    """The chat template in the hands of its vocabulary, to render with; MedcotError where it is not valid Jinja."""
    special, tokens = vocabulary.special_ids, vocabulary.tokens
    control_types = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    control = {
        text: index
        for index, (text, kind) in enumerate(zip(tokens, vocabulary.types, strict=True))
        if kind in control_types and not text.isspace()
    }
    texts = _SpecialTexts(
        tokens[special["bos"]] if "bos" in special else None, tokens[special["eos"]], control, vocabulary.add_bos
    )
    return ChatFormat(vocabulary.chat_template, texts)


def _with_end_of_turn(vocabulary: Vocabulary) -> Vocabulary:
    """The vocabulary with ``eot`` where the template ends an answer with another token than EOS (Llama 3).

    llama.cpp stops at EOS and EOT; without EOT it guesses by the tokens' names.
    """
    try:
        chat = chat_format(vocabulary)
        end = chat.end_of_turn
    except MedcotError:
        # A template that cannot be rendered has no end of turn; that it cannot is what verify says.
        return vocabulary
    if end == chat.vocabulary.eos_token:
        return vocabulary
    return replace(vocabulary, special_ids={**vocabulary.special_ids, "eot": chat.vocabulary.control_tokens[end]})


def _read_vocabulary(folder: Path, size: int) -> Vocabulary:
    complete = complete_tokenizer(folder)
    description = read_tokenizer_json(complete)
    model = description.get("model", {})
    if model.get("type") != "BPE":
        path, kind = folder / TOKENIZER_JSON, model.get("type")
        raise MedcotError(f"{path} is a {kind} tokenizer; export writes BPE and SentencePiece.")
    if not model.get("byte_fallback"):
        return _byte_level_bpe(folder, description, size)
    # A tokenizer.json that was made of tokenizer.model does the same as that, and only there are the scores.
    if complete != folder and not (folder / TOKENIZER_JSON).is_file():
        return _sentencepiece(folder, description, numbered_tokens(folder), _pieces_of_model(folder), size)
    added = {token["id"]: token for token in description.get("added_tokens", [])}
    return _sentencepiece(folder, description, added, _pieces_of_description(description), size)


def with_special_ids(vocabulary: Vocabulary, model_config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary with the special ids that only the model's config.json numbers (Qwen2's BOS)."""
    numbered = {role: model_config.get(f"{role}_token_id") for role in SPECIAL_ROLES}
    known = {role: number for role, number in numbered.items() if isinstance(number, int)}
    return replace(vocabulary, special_ids=known | vocabulary.special_ids)


def _byte_level_bpe(folder: Path, description: Mapping[str, Any], size: int) -> Vocabulary:
    pre = _pre_tokenizer_name(folder, description)
    texts: dict[int, str] = {index: text for text, index in description["model"]["vocab"].items()}
    types = dict.fromkeys(texts, TokenType.NORMAL)
    for token in description.get("added_tokens", []):
        texts[token["id"]] = token["content"]
        types[token["id"]] = _added_type(token)
    tokens, token_types = _padded(folder, texts, types, size)
    special = _special_ids(folder, {text: index for index, text in texts.items()})
    add_bos, add_eos = _added_by_template(description, special, texts)
    if pre == "qwen2" and add_bos:
        # The same rule by another name: llama.cpp's converter knows tokenizers by a hash of ids, BOS among them.
        pre = "deepseek-r1-qwen"
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=token_types,
        scores=None,
        merges=[_merge_text(merge) for merge in description["model"]["merges"]],
        special_ids=special,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=False,
        chat_template=_chat_template(folder),
        normalizer=(description.get("normalizer") or {}).get("type"),
        strips_left=_stripping(description.get("added_tokens") or [], "lstrip"),
        strips_right=_stripping(description.get("added_tokens") or [], "rstrip"),
    )


Pieces = dict[int, tuple[str, float, TokenType]]


def _sentencepiece(
    folder: Path, description: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], pieces: Pieces, size: int
) -> Vocabulary:
    for index, token in added.items():
        known = pieces.get(index)
        if known is None or known[2] is not TokenType.UNKNOWN:
            pieces[index] = (token["content"], _ADDED_SCORE, _added_type(token))
    texts = {index: text for index, (text, _, _) in pieces.items()}
    tokens, types = _padded(folder, texts, {index: kind for index, (_, _, kind) in pieces.items()}, size)
    special = _special_ids(folder, {text: index for index, text in texts.items()})
    add_bos, add_eos = _added_by_template(description, special, texts)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=[pieces[index][1] if index in pieces else _PADDING_SCORE for index in range(size)],
        merges=None,
        special_ids=special,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=_adds_space(description),
        chat_template=_chat_template(folder),
        space_scheme=space_scheme(description),
        strips_left=_stripping(description.get("added_tokens") or [], "lstrip"),
        strips_right=_stripping(description.get("added_tokens") or [], "rstrip"),
    )


def _pieces_of_model(folder: Path) -> Pieces:
    """Text, score and type of each piece of a SentencePiece model file."""
    from sentencepiece import SentencePieceProcessor

    path = folder / SENTENCEPIECE_MODEL
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise MedcotError(f"{path} is not a SentencePiece model ({error}): download it again.") from error

    def kind(index: int) -> TokenType:
        if model.IsUnknown(index):
            return TokenType.UNKNOWN
        if model.IsControl(index):
            return TokenType.CONTROL
        if model.IsUnused(index):
            return TokenType.UNUSED
        return TokenType.BYTE if model.IsByte(index) else TokenType.NORMAL

    return {
        index: (model.IdToPiece(index), model.GetScore(index), kind(index)) for index in range(model.GetPieceSize())
    }


def _pieces_of_description(description: Mapping[str, Any]) -> Pieces:
    """The pieces of a SentencePiece vocabulary that was saved as tokenizer.json, where its scores are lost.

    llama.cpp merges the pair with the highest score first, transformers the pair whose merge comes first, so
    a piece's score is minus the place of the first merge that makes it.
    """
    model = description["model"]
    places: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        places.setdefault(left + right, place)
    unknown = model.get("unk_token")

    def kind(text: str) -> TokenType:
        if text == unknown:
            return TokenType.UNKNOWN
        return TokenType.BYTE if _is_byte_piece(text) else TokenType.NORMAL

    unmergeable = float(-len(model["merges"]) - 1)
    return {
        index: (text, float(-places[text]) if text in places else unmergeable, kind(text))
        for text, index in model["vocab"].items()
    }


def _is_byte_piece(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _pre_tokenizer_name(folder: Path, description: Mapping[str, Any]) -> str:
    outline = _pre_tokenizer_outline(description.get("pre_tokenizer") or {})
    name = _PRE_TOKENIZERS.get(outline)
    normalizer = (description.get("normalizer") or {}).get("type")
    if name is None or (normalizer and (name, normalizer) != ("qwen2", "NFC")):
        found = " + ".join([*outline, f"normalizer {normalizer}"] if normalizer else outline) or "no rule"
        raise MedcotError(
            f"{folder / 'tokenizer.json'} splits text in a way export does not know ({found}); "
            f"it knows {', '.join(_PRE_TOKENIZERS.values())}."
        )
    return name


def _pre_tokenizer_outline(step: Mapping[str, Any]) -> tuple[str, ...]:
    """The steps that decide where text is cut, each in words; unknown settings show up in the words."""
    kind = step.get("type")
    if kind == "Sequence":
        return tuple(part for inner in step["pretokenizers"] for part in _pre_tokenizer_outline(inner))
    if kind == "ByteLevel":
        words = "" if step.get("use_regex", True) else " without words"
        return (f"ByteLevel{words}{' with prefix space' if step.get('add_prefix_space') else ''}",)
    if kind == "Digits":
        return ("Digits" if step.get("individual_digits") else "Digits in groups",)
    if kind == "Split":
        plain = step.get("behavior") == "Isolated" and not step.get("invert")
        return (f"Split {step['pattern'].get('Regex')}" if plain else "Split otherwise",)
    return (str(kind),) if kind else ()


def _added_type(token: Mapping[str, Any]) -> TokenType:
    """llama.cpp's rule: an added token is a control token when marked special or written like one."""
    text = token["content"]
    looks_special = (text[:2], text[-2:]) in (("<|", "|>"), ("<｜", "｜>"))
    return TokenType.CONTROL if token.get("special") or looks_special else TokenType.USER_DEFINED


def _stripping(added: Sequence[Mapping[str, Any]], side: str) -> tuple[int, ...]:
    """Ids of the control tokens that swallow white space on that side."""
    return tuple(token["id"] for token in added if token.get(side) and not token["content"].isspace())


def _padded(
    folder: Path, texts: Mapping[int, str], types: Mapping[int, TokenType], size: int
) -> tuple[list[str], list[TokenType]]:
    """Lists of the model's size; rows of the embedding beyond the tokenizer become unused tokens."""
    if max(texts) >= size:
        raise MedcotError(
            f"The tokenizer in {folder} has ids up to {max(texts)}, the model {size} rows: tokens were added "
            "without resizing the model, or the tokenizer belongs to another one."
        )
    return (
        [texts.get(index, f"[PAD{index}]") for index in range(size)],
        [types.get(index, TokenType.UNUSED) for index in range(size)],
    )


def _special_ids(folder: Path, ids: Mapping[str, int]) -> dict[str, int]:
    """Ids of bos, eos, unk and pad, as tokenizer_config.json names them or else config.json numbers them."""
    path = folder / "config.json"
    model_config = read_json(path) if path.is_file() else {}
    numbered = {role: model_config.get(f"{role}_token_id") for role in SPECIAL_ROLES}
    special = {role: number for role, number in numbered.items() if isinstance(number, int)}
    special |= special_token_ids(folder, ids)
    if "eos" not in special:
        raise MedcotError(f"{folder / TOKENIZER_CONFIG} names no eos_token: the model could not end its turn.")
    return special


def _added_by_template(
    description: Mapping[str, Any], special: Mapping[str, int], texts: Mapping[int, str]
) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before a text and EOS behind it."""
    post_processor = description.get("post_processor") or {}
    for step in post_processor.get("processors", [post_processor]):
        if step.get("type") == "TemplateProcessing":
            single = [part.get("SpecialToken", {}).get("id") for part in step["single"]]
            bos, eos = texts.get(special.get("bos", -1)), texts[special["eos"]]
            return bos is not None and single[0] == bos, single[-1] == eos
    return False, False


def _adds_space(description: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the first word."""
    pre_tokenizer = description.get("pre_tokenizer") or {}
    if pre_tokenizer.get("type") == "Metaspace":
        return bool(pre_tokenizer.get("prepend_scheme") != "never")
    normalizer = description.get("normalizer") or {}
    return any(step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer]))


def _merge_text(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _chat_template(folder: Path) -> str:
    template = default_chat_template(folder)
    if template is None:
        raise MedcotError(f"{folder} holds no chat template ({CHAT_TEMPLATE}): the GGUF could not be chatted with.")
    return template
