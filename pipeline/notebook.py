"""What the notebooks in ``notebooks/`` show of a run: its report, and its GGUF to download.

    from pipeline import notebook
    notebook.show_report("deepseek-r1-8b")

Standard library and IPython alone: set-up replaces packages under the kernel that runs this, and a package of which it
holds one half of the old version breaks.
"""

from __future__ import annotations

import contextlib
import json
import os
from html import escape
from pathlib import Path
from typing import Any

from pipeline import platforms
from pipeline.errors import MedcotError
from pipeline.platforms import COLAB, KAGGLE, Platform

_REPORT_HEIGHT = 900  # pixels


def keep_on_drive(platform: Platform | None = None) -> None:
    """On Colab mount Google Drive, where the run is then copied to; Colab asks for permission. Nothing elsewhere."""
    platform = platform or platforms.here()
    if platform.name != COLAB.name:
        print(f"{platform.name} has no Google Drive to mount: runs are in {platform.runs}.")
        return
    from google.colab import drive

    drive.mount("/content/drive")


def use_hub_token(platform: Platform | None = None) -> None:
    """Set HF_TOKEN from the notebook's secrets, unless it is set. Raises MedcotError when there is none."""
    platform = platform or platforms.here()
    if os.environ.get("HF_TOKEN"):
        return
    reason = "none is set"
    try:
        token = _secret(platform, "HF_TOKEN")
    except Exception as error:  # both services raise types of their own for a secret that is absent or not allowed
        token, reason = None, f"{type(error).__name__}: {error}"
    if not token:
        where = {KAGGLE.name: "Add-ons, Secrets", COLAB.name: "the key on the left"}.get(platform.name)
        add = f"add the secret HF_TOKEN ({where}) and allow this notebook to read it" if where else "set HF_TOKEN"
        raise MedcotError(
            f"There is no token for the hub ({reason}): {add}; https://huggingface.co/settings/tokens makes one."
        )
    os.environ["HF_TOKEN"] = token


def show_report(name: str) -> None:
    """The run's report in the notebook. Raises MedcotError when the run has none."""
    from IPython.display import HTML, display

    page = run_dir(name) / "report" / "report.html"
    if not page.is_file():
        raise MedcotError(f"There is no {page}: the run above did not come to its report; its last lines say why.")
    # In a frame of its own: its styles and the notebook's do not meet. In a <div>, or IPython advises its IFrame, which
    # takes an address alone, and services show no local file's.
    frame = (
        f'<div><iframe srcdoc="{escape(page.read_text(encoding="utf-8"))}" '
        f'style="width: 100%; height: {_REPORT_HEIGHT}px; border: 0"></iframe></div>'
    )
    display(HTML(frame))


def offer_download(name: str, platform: Platform | None = None) -> None:
    """A link to the GGUF to chat with; on Colab the download itself. Raises MedcotError when there is none."""
    from IPython.display import FileLink, display

    platform = platform or platforms.here()
    gguf = shipped_gguf(name)
    print(f"{gguf.name}, {gguf.stat().st_size / 1e9:.2f} GB, in {gguf.parent}")
    if platform.name == COLAB.name:
        from google.colab import files

        files.download(str(gguf))
        return
    # A notebook's links begin where it was started, on Kaggle /kaggle/working, and not where %cd has gone since.
    with contextlib.chdir(platform.runs.resolve().parent):
        display(FileLink(os.path.relpath(gguf)))


def shipped_gguf(name: str) -> Path:
    """The GGUF of a run that is to be used. Raises MedcotError when the run has not exported one."""
    folder = run_dir(name) / "gguf"
    try:
        result: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())["result"]
    except FileNotFoundError:
        raise MedcotError(
            f"{folder} holds no finished GGUF: the run above did not come to its export; its last lines say why."
        ) from None
    return folder / result["ship"]


def run_dir(name: str) -> Path:
    """Where the run of a preset is."""
    return platforms.here().runs.resolve() / name


def _secret(platform: Platform, name: str) -> str | None:
    if platform.name == KAGGLE.name:
        from kaggle_secrets import UserSecretsClient

        return str(UserSecretsClient().get_secret(name))
    if platform.name == COLAB.name:
        from google.colab import userdata

        return str(userdata.get(name))
    return None
