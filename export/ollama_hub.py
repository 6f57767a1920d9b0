"""A Modelfile's content in the three files that Ollama reads for ``ollama run hf.co/OWNER/NAME``.

Ollama takes no Modelfile from the hub. Format: https://docs.ollama.com/modelfile and
https://huggingface.co/docs/hub/ollama
"""

from __future__ import annotations

import json
import re

TEMPLATE_FILE = "template"
_TEXTS = {"TEMPLATE": TEMPLATE_FILE, "SYSTEM": "system"}
_TEXT = re.compile(r'^(TEMPLATE|SYSTEM) """(.*?)"""$', re.MULTILINE | re.DOTALL)
_STOP = re.compile(r'^PARAMETER stop "(.*)"$', re.MULTILINE)
_NUMBER = re.compile(r"^PARAMETER (\w+) ([\d.]+)$", re.MULTILINE)


def hub_files(modelfile: str) -> dict[str, str]:
    """``template``, ``system`` and ``params`` of a Modelfile that ``export/packages.py`` wrote, where it has them."""
    files = {_TEXTS[keyword]: text for keyword, text in _TEXT.findall(modelfile)}
    settings = _TEXT.sub("", modelfile)
    parameters: dict[str, object] = {name: json.loads(number) for name, number in _NUMBER.findall(settings)}
    if stops := _STOP.findall(settings):
        parameters["stop"] = stops
    if parameters:
        files["params"] = json.dumps(parameters, indent=2, ensure_ascii=False) + "\n"
    return files
