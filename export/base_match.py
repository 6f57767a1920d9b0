"""Whether an adapter was trained on the base it is given, as far as names can tell."""

from __future__ import annotations

import re
from pathlib import Path

from export.architecture import Architecture
from export.lora import LoraAdapter

# Unsloth's copies of a model in 4 bit: the adapter names the copy, the base to merge into is the original.
_COPY_SUFFIX = re.compile(r"(-unsloth)?(-bnb-4bit)?$")
_HUB_FOLDER = "models--"  # huggingface_hub's cache: models--<owner>--<name>/snapshots/<commit>


def base_mismatch(adapter: LoraAdapter, base: Path, given_as: str | None, architecture: Architecture) -> str | None:
    """A sentence when the adapter names another base than ``base``, a folder that was ``given_as`` a hub id or path.

    Names may differ where models are the same, so it is no error; that shapes fit is checked elsewhere.
    """
    trained_on = adapter.base_name
    if trained_on is None:
        return None
    names = {given_as, base.name, base.resolve().name, architecture.config.get("_name_or_path")}
    names |= {part.rpartition("--")[2] for part in base.parts if part.startswith(_HUB_FOLDER)}
    if _model_name(trained_on) in {_model_name(name) for name in names if isinstance(name, str) and name}:
        return None
    return (
        f"{adapter.folder} was trained on {trained_on}, the base given is {given_as or base}: the shapes fit, but "
        "merged into another model the adapter is worthless."
    )


def _model_name(name: str) -> str:
    """The last part of a hub id or a path, without what marks a copy."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return _COPY_SUFFIX.sub("", last.lower())
