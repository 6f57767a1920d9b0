"""What runs inside a Hugging Face Space that ``medcot space`` wrote: the page of ``medcot serve``, open to anyone.

    python app.py

The folder's ``space.json`` says which models to show. Other emergency numbers: set the Space's variable MEDCOT_COUNTRY
or MEDCOT_EMERGENCY_NUMBER.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from chat.safety import RedFlagWatch
from chat.terminal import open_model
from chat.web_server import listen, page_app, run_server, url_of
from pipeline.artifacts import sha256_file
from pipeline.errors import MedcotError

SETTINGS_FILE = "space.json"


class SpaceModel(BaseModel):
    """A GGUF: inside the folder, or in the hub's repository ``repo``, from where it is fetched at the start."""

    model_config = ConfigDict(frozen=True)
    name: str
    file: str
    size_bytes: int
    sha256: str
    repo: str | None


class SpaceSettings(BaseModel):
    """``space.json``. ``files`` are the folder's other files with their SHA-256, as they were written."""

    model_config = ConfigDict(frozen=True)
    made_by: Literal["medcot space"]
    models: tuple[SpaceModel, ...]
    n_ctx: int
    max_new_tokens: int
    thought_budget: int | None
    files: dict[str, str]


def read_settings(folder: Path) -> SpaceSettings:
    """Raises MedcotError where the folder is not one that ``medcot space`` wrote."""
    path = folder / SETTINGS_FILE
    try:
        return SpaceSettings.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise MedcotError(f"{path} cannot be read as the settings of a Space: write the folder again.") from error


def run(folder: Path) -> None:
    """Serve the folder's models until interrupted."""
    settings = read_settings(folder)
    # Spaces name their address in Gradio's variables; elsewhere the page is for this machine alone.
    host = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1")
    port = os.environ.get("GRADIO_SERVER_PORT") or os.environ.get("PORT") or "7860"
    if not port.isdecimal():
        raise MedcotError(f"The port {port!r} of GRADIO_SERVER_PORT or PORT is no number.")
    with ExitStack() as stack:
        listener, is_loopback = listen(host, int(port))
        stack.enter_context(listener)
        models = [
            stack.enter_context(open_model(local_file(folder, each), settings.n_ctx, None)) for each in settings.models
        ]
        # Gradio takes seconds to import, so whatever is wrong above is told before.
        from chat.web import WebModel, WebSettings, build_page

        shown = [WebModel(each.name, model) for each, model in zip(settings.models, models, strict=True)]
        defaults = WebSettings(RedFlagWatch.load(), settings.max_new_tokens, settings.thought_budget)
        page = stack.enter_context(build_page(shown, defaults))
        print(f"The page is at {url_of(listener)}", flush=True)
        run_server(page_app(page, only_local=is_loopback), listener)


def local_file(folder: Path, model: SpaceModel) -> Path:
    """The file, fetched if it is not in the folder; raises MedcotError where it is another than the one meant."""
    if model.repo is None:
        path = folder / model.file
        # A clone without Git LFS has a few lines of text in its place.
        if not path.is_file() or path.stat().st_size != model.size_bytes:
            raise MedcotError(f"{path} is missing or not whole: fetch it with `git lfs pull`.")
        return path
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(model.repo, model.file))
    except OSError as error:  # what the hub's client raises, for a missing file as for a missing network
        reason = str(error).strip().splitlines()[0]
        raise MedcotError(f"{model.file} could not be fetched from {model.repo} ({reason:.200}).") from error
    if sha256_file(path) != model.sha256:
        raise MedcotError(f"{model.file} of {model.repo} is not the file this Space was made for: upload that one.")
    return path


def main() -> None:
    """Entry point of app.py: one sentence where the Space cannot start."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as for the other chats, see pipeline/cli.py
    try:
        run(Path(sys.argv[0]).resolve().parent)
    except MedcotError as error:
        sys.exit(f"Error: {error}")
