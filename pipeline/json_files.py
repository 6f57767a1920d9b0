"""JSON objects from files that others wrote: a model's settings, a checkpoint's index, a tokenizer's description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import MedcotError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises MedcotError when it is absent or not one."""
    try:
        return json_object(path.read_bytes(), path)
    except OSError as error:
        raise MedcotError(f"{path} cannot be read: {error.strerror}.") from error


def json_object(content: bytes, origin: Path | str) -> dict[str, Any]:
    """A JSON object from bytes; ``origin`` names them in the error."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MedcotError(f"{origin} is not valid JSON ({error}): download it again.") from error
    if not isinstance(value, dict):
        raise MedcotError(f"{origin} holds a JSON {type(value).__name__}, not an object: it is not what it should be.")
    return value
