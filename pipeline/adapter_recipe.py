"""medcot.json beside an adapter: what it was trained on and with which prompts, so that later stages need not be told.

An adapter alone does not say which chat template and system prompt its examples were written with, and with others it
is a worse model. Adapters from elsewhere have no such file; then nothing is compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.artifacts import write_json
from pipeline.chat_template import template_sha256
from pipeline.errors import MedcotError

RECIPE_NAME = "medcot.json"


class AdapterRecipe(BaseModel):
    """``template_sha256`` is ``pipeline.chat_template.template_sha256`` of the training prompts' template."""

    model_config = ConfigDict(frozen=True)
    format: Literal[1] = 1
    base: str
    template_sha256: str
    system: str | None


def write_recipe(adapter: Path, recipe: AdapterRecipe) -> None:
    write_json(adapter / RECIPE_NAME, recipe.model_dump(mode="json"))


def read_recipe(adapter: Path | None) -> AdapterRecipe | None:
    """The recipe in an adapter's folder; None without an adapter or a recipe, MedcotError for one that is damaged."""
    path = adapter / RECIPE_NAME if adapter else None
    if path is None or not path.is_file():
        return None
    try:
        return AdapterRecipe.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise MedcotError(
            f"{path} is damaged or of another version of medcot ({where}: {problem['msg']}): train again, or delete "
            "it to go on without comparing the chat template."
        ) from error
    except OSError as error:
        raise MedcotError(f"{path} cannot be read: {error.strerror}.") from error


def check_template(recipe: AdapterRecipe | None, template: str, where: str) -> None:
    """Refuse a template other than the one the adapter was trained with; without a recipe nothing is compared."""
    if recipe is not None and template_sha256(template) != recipe.template_sha256:
        raise MedcotError(
            f"The chat template in {where} is not the one it was trained with (sha256 {template_sha256(template)[:12]}"
            f"..., trained with {recipe.template_sha256[:12]}...): take the tokenizer that training saved."
        )
