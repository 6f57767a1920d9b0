"""A tokenizer.json for a folder that has none, or whose tokenizer.json leaves out added tokens.

Three forms: a SentencePiece model (tokenizer.model), vocab.json with merges.txt, and a tokenizer.json with further
tokens in added_tokens.json or tokenizer_config.json. What comes out is proven: a SentencePiece model against
SentencePiece itself, and every added token has the id that its file gives it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import MedcotError
from pipeline.json_files import read_json
from pipeline.tokenizer_files import (
    CHAT_TEMPLATE,
    SENTENCEPIECE_MODEL,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCAB_AND_MERGES,
    default_chat_template,
    named_tokens,
    numbered_tokens,
    tokenizer_config,
)

# Text in which tokenizers differ: spaces in runs and at the edges, line breaks, digits, accents, no letters at all.
PROBE_TEXTS = (
    "The patient's BP was 120/80 mmHg.", " a", "a  b", "  two", "a   b    c", "   ", "x ", "\n\nx", "tab\tx",
    "word \n  indented\n    more" + " " * 40 + "far", "é e\u0301 胸痛 🫀", "1234567", "HELLO it's",
    "def f(x):\n\treturn x",
)  # fmt: skip
_SPACE = "\u2581"
# How text is cut before merging stands in neither vocab.json nor merges.txt; these classes of transformers say it.
_CLASSES = {"Qwen2Tokenizer": "Qwen2Tokenizer", "GPT2Tokenizer": "GPT2Tokenizer"}
_CLASS_OF_MODEL = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece_model.proto
_BPE = 2


def convert_tokenizer(folder: Path, into: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template for the tokenizer in ``folder``.

    Raises MedcotError with the reason when there is no tokenizer.json that does the same.
    """
    from tokenizers import AddedToken, Tokenizer

    if (folder / TOKENIZER_JSON).is_file():
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    elif (folder / SENTENCEPIECE_MODEL).is_file():
        tokenizer = _from_sentencepiece(folder)
    else:
        tokenizer = _from_vocab_and_merges(folder)
    _add_numbered_tokens(tokenizer, folder)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for text in named_tokens(folder) - known:
        if tokenizer.token_to_id(text) is not None:
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=True)])
    tokenizer.save(str(into / TOKENIZER_JSON))
    config = {**tokenizer_config(folder), "tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("chat_template", None)
    (into / TOKENIZER_CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    template = default_chat_template(folder)
    if template is not None:
        (into / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def _add_numbered_tokens(tokenizer: Any, folder: Path) -> None:
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for index, token in sorted(numbered_tokens(folder).items()):
        text = token["content"]
        known = tokenizer.token_to_id(text)
        if known is None or index not in tokenizer.get_added_tokens_decoder():
            tokenizer.add_tokens([AddedToken(text, **{flag: bool(token.get(flag, False)) for flag in flags})])
        if (found := tokenizer.token_to_id(text)) != index:
            raise MedcotError(
                f"{folder} gives the added token {text!r} the id {index}, and the vocabulary next to it {found}: the "
                "files are not of one tokenizer; copy all of them from the model it was made of."
            )


def _from_sentencepiece(folder: Path) -> Any:
    """A SentencePiece BPE model in the words of ``tokenizers``.

    A space is put before every stretch of text, behind a control token too, as the tokenizer.json of Llama 2 says
    (``Prepend`` and ``Replace``) and llama.cpp does; with ``legacy: false`` only before the first, as transformers has
    it for such folders. Its own conversion is not taken: in 5.17 it orders merges by id, not by score.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import import_protobuf

    path = folder / SENTENCEPIECE_MODEL
    try:
        reference = SentencePieceProcessor(model_file=str(path))
        # transformers' own choice among the two copies of this class: one process can import only one of them.
        proto = import_protobuf().ModelProto.FromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError is no ValueError in every version
        raise MedcotError(f"{path} is not a SentencePiece model ({error}): download it again.") from error
    if proto.trainer_spec.model_type != _BPE:
        raise MedcotError(f"{path} is not a BPE model: GGUF vocabularies of this kind are not written.")
    if proto.normalizer_spec.precompiled_charsmap:
        raise MedcotError(
            f"{path} rewrites characters first ({proto.normalizer_spec.name}), which llama.cpp does not do: use a "
            "model with another tokenizer."
        )
    pieces = list(proto.pieces)
    config = tokenizer_config(folder)
    given = config.get("add_prefix_space")
    prefix = proto.normalizer_spec.add_dummy_prefix if given is None else bool(given)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(pieces)},
            merges=_merges({piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}),
            unk_token=next((piece.piece for piece in pieces if piece.type == _UNKNOWN), None),
            fuse_unk=True,
            byte_fallback=any(piece.type == _BYTE for piece in pieces),
        )
    )
    replaced = normalizers.Replace(" ", _SPACE)
    once = prefix and config.get("legacy") is False
    if once:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replaced] if prefix else [replaced])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type != _USER_DEFINED)
            for piece in pieces
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    ends = [
        (reference.IdToPiece(index), index) if config.get(key, default) and index >= 0 else None
        for key, index, default in (
            ("add_bos_token", reference.bos_id(), True),
            ("add_eos_token", reference.eos_id(), False),
        )
    ]
    bos, eos = ([f"{end[0]}:%d"] if end else [] for end in ends)
    if bos or eos:
        first, second = (" ".join([*bos, f"${name}:%d", *eos]).replace("%d", str(n)) for n, name in enumerate("AB"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=first, pair=f"{first} {second}", special_tokens=[end for end in ends if end]
        )
    if prefix == proto.normalizer_spec.add_dummy_prefix:
        # Metaspace takes a space that the text begins with for its own.
        for text in (text for text in PROBE_TEXTS if not (once and text.startswith(" "))):
            if tokenizer.encode(text, add_special_tokens=False).ids != reference.EncodeAsIds(text):
                raise MedcotError(
                    f"{path} cannot be turned into a {TOKENIZER_JSON}: {text!r} would become other tokens than "
                    f"SentencePiece makes of it. Copy {TOKENIZER_JSON} from the model it was made of."
                )
    return tokenizer


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose whole has the highest score, the leftmost of equals; BPE takes its merges in
    order. Of pieces with one score (runs of spaces) the longest left half comes first, which grows from the left."""
    merges = [
        (score, len(left), len(right), left, right)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in scores and (right := piece[cut:]) in scores
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


def _from_vocab_and_merges(folder: Path) -> Any:
    import transformers
    from tokenizers import AddedToken, Tokenizer

    config = tokenizer_config(folder)
    named = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    path = folder / "config.json"
    model_type = str(read_json(path).get("model_type")) if path.is_file() else ""
    chosen = _CLASSES.get(named) or _CLASS_OF_MODEL.get(model_type)
    if chosen is None:
        raise MedcotError(
            f"{folder} has {' and '.join(VOCAB_AND_MERGES)} but no {TOKENIZER_JSON}, and neither tokenizer_class "
            f"({named or 'none'}) nor model_type ({model_type or 'none'}) says how text is cut before merging: copy "
            f"{TOKENIZER_JSON} from the model it was made of."
        )
    vocab, merges = (str(folder / name) for name in VOCAB_AND_MERGES)
    try:
        tokenizer = getattr(transformers, chosen)(vocab=vocab, merges=merges)
    except Exception as error:  # tokenizers raises Exception itself for a damaged file
        raise MedcotError(f"{vocab} and {Path(merges).name} are no vocabulary with its merges: {error}.") from error
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["added_tokens"] = []  # those that the class has by default
    restored = Tokenizer.from_str(json.dumps(description))
    # An entry that no merge makes can only have been an added token: a control token, whose mark is lost here.
    model = description["model"]
    made = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model["merges"]}
    lost = [text for text in model["vocab"] if len(text) > 1 and text not in made]
    restored.add_tokens([AddedToken(text, normalized=False, special=True) for text in lost])
    return restored
