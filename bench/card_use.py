"""The model card's part on how to use the model: from the files beside it, or from a repository of the hub."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from pipeline.config import Config

_QUESTION = "A 54-year-old has crushing chest pain that spreads to the left arm. What should be done first?"
_CONTEXT = 4096  # tokens: a question, its thought and its answer, with room for a second one


@dataclass(frozen=True)
class Repository:
    """Where a card is published, and what is there beside it."""

    name: str
    ggufs: tuple[str, ...]
    adapter: str | None  # the adapter's folder there
    ollama_template: bool  # the file that tells Ollama how turns are written


def use_notes(config: Config) -> tuple[str, ...]:
    note = "The chat template is inside the GGUF; use it, or the model is not the one that was measured."
    if config.prompt.system is not None:
        note += " The model was trained with the system prompt shown here."
    return (note,)


def use_commands(config: Config, file: str, repository: Repository | None) -> tuple[tuple[str, str, str], ...]:
    """For the GGUF named ``file``: what each is for, its language and its text."""
    system = f" -sys {shlex.quote(config.prompt.system)}" if config.prompt.system is not None else ""
    fetch = () if repository is None else (("Fetch the file", "sh", _fetch(repository, shlex.quote(file))),)
    return (
        *fetch,
        ("medcot, which shows thought and answer apart", "sh", f"medcot chat {shlex.quote(file)}"),
        _ollama(config.name.lower(), file, repository),
        ("llama.cpp", "sh", f"llama-cli -m {shlex.quote(file)} --jinja -cnv -c {_CONTEXT}{system}"),
        ("Python, with llama-cpp-python", "python", _python(config, file)),
        *_adapter(config, repository),
    )


def _fetch(repository: Repository, what: str) -> str:
    return f"hf download {repository.name} {what} --local-dir ."


def _ollama(name: str, file: str, repository: Repository | None) -> tuple[str, str, str]:
    if repository is not None and repository.ollama_template:
        # A file's whole name as the tag: its type alone may be that of two files.
        # https://huggingface.co/docs/hub/ollama
        return ("Ollama, from this repository", "sh", f"ollama run {shlex.quote(f'hf.co/{repository.name}:{file}')}")
    fetch = "" if repository is None else f"{_fetch(repository, 'Modelfile')}\n"
    create = f"{fetch}ollama create {name} -f Modelfile\nollama run {name}"
    return ("Ollama, with the Modelfile beside the GGUF", "sh", create)


def _python(config: Config, file: str) -> str:
    messages = [{"role": "user", "content": _QUESTION}]
    if config.prompt.system is not None:
        messages.insert(0, {"role": "system", "content": config.prompt.system})
    return (
        "from llama_cpp import Llama\n\n"
        f"model = Llama({json.dumps(file, ensure_ascii=False)}, n_ctx={_CONTEXT})\n"
        f"messages = {json.dumps(messages, indent=4, ensure_ascii=False)}\n"
        'print(model.create_chat_completion(messages)["choices"][0]["message"]["content"])'
    )


def _adapter(config: Config, repository: Repository | None) -> tuple[tuple[str, str, str], ...]:
    if repository is None or repository.adapter is None:
        return ()
    folder = repository.adapter
    fetch = _fetch(repository, f"--include {shlex.quote(f'{folder}/*')}")
    export = f"medcot export --base {shlex.quote(config.model.base)} --adapter {folder} --out gguf --quant Q8_0"
    return (("The adapter alone, to write GGUFs of other types", "sh", f"{fetch}\n{export}"),)
