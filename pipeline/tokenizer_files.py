"""The files of a model's tokenizer, read the same by every stage: plan, prepare, train, export, verify and evaluate.

``tokenizer.json`` is taken as it stands, whatever class ``tokenizer_config.json`` names: DeepSeek's repositories name
LlamaTokenizerFast over a byte-level vocabulary, and transformers 5 then rebuilds the tokenizer and loses every space
(huggingface/transformers#45488). A folder without tokenizer.json is turned into one that has it, once, in the cache
(``pipeline/tokenizer_conversion.py``).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.cache import cache_dir, made_once
from pipeline.errors import MedcotError
from pipeline.json_files import read_json

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
VOCAB_AND_MERGES = ("vocab.json", "merges.txt")
# All that a tokenizer may consist of; config.json says how vocab.json and merges.txt are meant, and is no part of it.
TOKENIZER_FILES = (
    TOKENIZER_JSON, SENTENCEPIECE_MODEL, TOKENIZER_CONFIG, ADDED_TOKENS, CHAT_TEMPLATE, *VOCAB_AND_MERGES,
    SPECIAL_TOKENS_MAP,
)  # fmt: skip
SPECIAL_ROLES = ("bos", "eos", "unk", "pad")
# Raise when the conversion changes, so that cached folders are made again.
_CONVERSION_VERSION = 2


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` holds a vocabulary, in any of the three forms that are read."""
    whole = any((folder / name).is_file() for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL))
    return whole or all((folder / name).is_file() for name in VOCAB_AND_MERGES)


def complete_tokenizer(folder: Path) -> Path:
    """The folder to read a tokenizer from: ``folder`` itself, or its conversion in the cache.

    There tokenizer.json holds the whole vocabulary, every added token included. Raises MedcotError when ``folder``
    holds no tokenizer, or one that cannot be turned into a tokenizer.json without changing what it does.
    """
    if not has_tokenizer(folder):
        raise MedcotError(
            f"{folder} holds no tokenizer: there is no {TOKENIZER_JSON}, no {SENTENCEPIECE_MODEL} and no "
            f"{' with '.join(VOCAB_AND_MERGES)}. Copy them from the model it was made of."
        )
    path = folder / TOKENIZER_JSON
    if path.is_file() and not _left_out(folder, read_tokenizer_json(folder)):
        return folder

    def convert(into: Path) -> None:
        from pipeline.tokenizer_conversion import convert_tokenizer

        convert_tokenizer(folder, into)

    digest = hashlib.sha256(f"{_CONVERSION_VERSION} {importlib.metadata.version('tokenizers')}".encode())
    for name in (*TOKENIZER_FILES, "config.json"):
        if (folder / name).is_file():
            digest.update(f"{name} {(folder / name).stat().st_size} ".encode() + (folder / name).read_bytes())
    return made_once(cache_dir() / "tokenizers" / f"{folder.name}-{digest.hexdigest()[:16]}", TOKENIZER_JSON, convert)


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json counted as transformers counts it.

    The map's entries replace the configuration's where that has no ``added_tokens_decoder`` (transformers 5,
    ``PreTrainedTokenizerBase._from_pretrained``); newer files have one, and the map is history.
    """
    config = _optional_json(folder / TOKENIZER_CONFIG)
    if "added_tokens_decoder" not in config:
        config |= _optional_json(folder / SPECIAL_TOKENS_MAP)
    return config


def token_text(token: Any) -> str | None:
    """The text of a special token as configurations name it: a string, or a mapping with its content."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def numbered_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """Added tokens beside tokenizer.json, by id: of the configuration's added_tokens_decoder, else added_tokens.json.

    Raises MedcotError where an id is no number or a token no text.
    """
    config = tokenizer_config(folder)
    if "added_tokens_decoder" in config:
        entries, origin = config["added_tokens_decoder"], folder / TOKENIZER_CONFIG
        listed = entries.items() if isinstance(entries, Mapping) else [("?", entries)]
    else:
        origin = folder / ADDED_TOKENS
        others = config.get("additional_special_tokens")
        named = named_tokens(folder) | {token_text(token) for token in (others if isinstance(others, list) else [])}
        listed = [
            (index, {"content": text, "special": text in named, "normalized": text not in named})
            for text, index in _optional_json(origin).items()
        ]
    tokens = {}
    for index, token in listed:
        if not str(index).isdecimal() or not isinstance(token, Mapping) or not isinstance(token.get("content"), str):
            raise MedcotError(f"{origin}: added token {index!r} is {token!r}; a whole number and a text are expected.")
        tokens[int(index)] = dict(token)
    return tokens


def read_tokenizer_json(folder: Path) -> dict[str, Any]:
    """The description in ``folder``'s tokenizer.json; raises MedcotError where it is none."""
    path = folder / TOKENIZER_JSON
    description = read_json(path)
    model, added = description.get("model"), description.get("added_tokens") or []
    if not isinstance(model, Mapping) or not isinstance(model.get("vocab"), Mapping | list):
        raise MedcotError(f"{path} describes no vocabulary (model.vocab): copy it from the model it was made of.")
    for token in added if isinstance(added, list) else [added]:
        whole = isinstance(token, Mapping) and isinstance(token.get("content"), str)
        if not whole or not isinstance(token.get("id"), int):
            raise MedcotError(
                f"{path}: added token {token!r:.80} has no text or no id: copy it from the original model."
            )
    return description


def tokenizer_json_ids(description: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json with its id; added tokens before the vocabulary's of the same text."""
    vocabulary = description.get("model", {}).get("vocab")
    ids = dict(vocabulary) if isinstance(vocabulary, Mapping) else {}
    return ids | {token["content"]: token["id"] for token in description.get("added_tokens") or []}


def default_chat_template(folder: Path) -> str | None:
    """The chat template called "default", or None: chat_template.jinja before the configuration's own.

    Several named templates stand as a list in tokenizer_config.json, or next to chat_template.jinja in the folder
    additional_chat_templates, which is never the default. Raises MedcotError where only others are named.
    """
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8") or None
        except (OSError, UnicodeDecodeError) as error:
            raise MedcotError(f"{path} cannot be read as UTF-8 ({error}): download it again.") from error
    given = _optional_json(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, Mapping)}
    if isinstance(given, Mapping):
        if given and not given.get("default"):
            names = ", ".join(sorted(str(name) for name in given))
            raise MedcotError(
                f"{folder / TOKENIZER_CONFIG} has the chat templates {names}, and none called default: write the one "
                f"to use into {CHAT_TEMPLATE} next to it."
            )
        given = given.get("default")
    return given if isinstance(given, str) and given else None


def special_token_ids(folder: Path, ids: Mapping[str, int]) -> dict[str, int]:
    """Ids of bos, eos, unk and pad as the configuration names them; raises MedcotError for a name without an id."""
    config = tokenizer_config(folder)
    special = {}
    for role in SPECIAL_ROLES:
        text = token_text(config.get(f"{role}_token"))
        if text is None:
            continue
        if text not in ids:
            raise MedcotError(f"{folder}: {role}_token is {text!r}, which is not in the vocabulary.")
        special[role] = ids[text]
    return special


def named_tokens(folder: Path) -> set[str]:
    """Texts of the tokens that the configuration gives a role."""
    config = tokenizer_config(folder)
    return {text for role in SPECIAL_ROLES if (text := token_text(config.get(f"{role}_token"))) is not None}


def _left_out(folder: Path, description: Mapping[str, Any]) -> bool:
    """Whether tokens that text is cut at stand next to tokenizer.json only."""
    ids = tokenizer_json_ids(description)
    added = {token["content"] for token in description.get("added_tokens") or []}
    numbered = {token["content"] for token in numbered_tokens(folder).values()}
    return not numbered <= ids.keys() or not (named_tokens(folder) & ids.keys()) <= added


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
