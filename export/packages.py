"""What makes a GGUF usable elsewhere: an Ollama Modelfile beside it.

Format: https://github.com/ollama/ollama/blob/main/docs/modelfile.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from export.tokenizer_metadata import Vocabulary
from pipeline.artifacts import write_text
from pipeline.errors import MedcotError
from pipeline.prompts import ChatFormat


@dataclass(frozen=True)
class OllamaFormat:
    """One family of chat templates in Ollama's terms. ``marks`` are what its Jinja template must contain."""

    marks: tuple[str, ...]
    template: str
    stop: tuple[str, ...]
    parameters: tuple[tuple[str, str], ...] = ()


# R1's sampling is DeepSeek's advice; greedy decoding makes it repeat itself. Ollama itself puts BOS in front.
_FORMATS = (
    OllamaFormat(
        marks=("<｜User｜>", "<｜Assistant｜>"),
        template=(
            "{{- if .System }}{{ .System }}{{ end }}"
            "{{- range $index, $message := .Messages }}"
            '{{- if eq .Role "user" }}<｜User｜>{{ .Content }}'
            '{{- else if eq .Role "assistant" }}<｜Assistant｜>{{ .Content }}<｜end▁of▁sentence｜>{{ end }}'
            "{{- if and (eq (len (slice $.Messages $index)) 1) "
            '(ne .Role "assistant") }}<｜Assistant｜><think>\n{{ end }}{{ end }}'
        ),
        stop=("<｜end▁of▁sentence｜>", "<｜User｜>"),
        parameters=(("temperature", "0.6"), ("top_p", "0.95")),
    ),
    OllamaFormat(
        marks=("<|im_start|>", "<|im_end|>"),
        template=(
            "{{- if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
            "{{- range .Messages }}"
            '{{- if ne .Role "system" }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
            "{{- end }}<|im_start|>assistant\n"
        ),
        stop=("<|im_end|>", "<|im_start|>"),
    ),
    OllamaFormat(
        marks=("<|user|>", "<|assistant|>", "eos_token"),
        template=(
            "{{- if .System }}<|system|>\n{{ .System }}</s>\n{{ end }}"
            "{{- range .Messages }}"
            '{{- if ne .Role "system" }}<|{{ .Role }}|>\n{{ .Content }}</s>\n{{ end }}'
            "{{- end }}<|assistant|>\n"
        ),
        stop=("</s>", "<|user|>", "<|system|>"),
    ),
)


@dataclass
class _SpecialTexts:
    """As much of a vocabulary as rendering a chat template needs."""

    bos_token: str | None
    eos_token: str
    adds_bos: bool = False
    control_tokens: Mapping[str, int] = field(default_factory=dict)

    def encode_text(self, text: str, *, after_text: bool) -> list[int]:
        raise NotImplementedError("rendering needs no tokens")


def write_modelfile(path: Path, gguf_name: str, vocabulary: Vocabulary, system: str | None = None) -> None:
    """Write the Modelfile for ``gguf_name`` beside it, for ``ollama create NAME -f Modelfile``.

    An unknown chat template is left to Ollama, which then guesses from the GGUF's own; the file says so.
    """
    lines = [f"FROM ./{gguf_name}"]
    known = next((each for each in _FORMATS if all(mark in vocabulary.chat_template for mark in each.marks)), None)
    if known is None:
        lines.append("# The chat template is of no known family; Ollama uses the one inside the GGUF as far as it can.")
    else:
        lines.append(f'TEMPLATE """{known.template}"""')
    system = system if system is not None else _default_system(vocabulary)
    if system:
        lines.append(f'SYSTEM """{system}"""')
    stop = known.stop if known else (vocabulary.tokens[vocabulary.special_ids["eos"]],)
    lines += [f'PARAMETER stop "{text}"' for text in stop]
    lines += [f"PARAMETER {key} {value}" for key, value in (known.parameters if known else ())]
    write_text(path, "\n".join(lines) + "\n")


def _default_system(vocabulary: Vocabulary) -> str | None:
    """The system prompt that a ChatML template writes where a conversation has none (SmolLM2's does)."""
    bos = vocabulary.special_ids.get("bos")
    texts = _SpecialTexts(
        vocabulary.tokens[bos] if bos is not None else None, vocabulary.tokens[vocabulary.special_ids["eos"]]
    )
    try:
        rendered = ChatFormat(vocabulary.chat_template, texts).render([{"role": "user", "content": "x"}])
    except MedcotError:
        return None
    match = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", rendered, re.DOTALL)
    return match[1] if match else None
