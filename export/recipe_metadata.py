"""The GGUF's own record of the prompts it was trained with: the chat template's hash and the system prompt.

Tools that edit metadata (or "fix" templates) change the template without a word; with another one the model is not
the one that was verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.chat_template import template_sha256
from pipeline.errors import MedcotError

if TYPE_CHECKING:
    import gguf  # not among the chat's requirements

TEMPLATE_KEY = "medcot.chat_template.sha256"
SYSTEM_KEY = "medcot.system_prompt"


def add_recipe(writer: gguf.GGUFWriter, chat_template: str, system: str | None) -> None:
    """Record the template that is written into the same file, and the system prompt if there is one."""
    writer.add_string(TEMPLATE_KEY, template_sha256(chat_template))
    if system is not None:
        writer.add_string(SYSTEM_KEY, system)


def check_recorded_template(path: Path, template: str, metadata: Mapping[str, str]) -> None:
    """Refuse a file whose template was changed after export; one without a record is taken as it is."""
    recorded = metadata.get(TEMPLATE_KEY)
    if recorded is not None and template_sha256(template) != recorded:
        raise MedcotError(
            f"The chat template in {path} is not the one it was trained with (sha256 {template_sha256(template)[:12]}"
            f"..., recorded at export {recorded[:12]}...): it was changed after export; export the model again."
        )
