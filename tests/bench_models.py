"""Models for the benchmark's tests: a tiny random one, as a folder, an adapter and a GGUF, and one faked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tiny_models import save_adapter, save_model

from bench.engines import EngineName
from pipeline.prompts import ChatFormat

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ByteVocabulary:
    """One token a byte, two control tokens above them."""

    bos_token: str | None = None
    eos_token = "<|im_end|>"
    adds_bos = False
    strips_left: frozenset[str] = frozenset()
    strips_right: frozenset[str] = frozenset()
    control_tokens: Mapping[str, int] = {"<|im_start|>": 256, "<|im_end|>": 257}

    def encode_text(self, text: str, after: str) -> list[int]:
        return list(text.encode())


class FakeEngine:
    """Gives every token the log-probability -0.5 and writes the same output for every prompt."""

    name: EngineName = "llama.cpp"
    weights = "F16"
    file_bytes = 1000
    vocabulary_size = 258
    on_gpu = False
    bytes_per_token = 900

    def __init__(
        self,
        output: str = "<think>\nbecause\n</think>\n\nso",
        log_probability: float = -0.5,
        likely_letter: str = "B",
    ) -> None:
        self.chat_format = ChatFormat(CHATML, ByteVocabulary())
        self.asked: list[str] = []
        self.scored: list[str] = []
        self.likely_letter = likely_letter
        self._output = output
        self._log_probability = log_probability

    def token_log_probabilities(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        return np.full(len(ids) - 1, self._log_probability)

    def next_log_probabilities(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """``likely_letter`` stands out, whatever the ids."""
        self.scored.append(bytes(token for token in ids if token < 256).decode())
        values = np.full(self.vocabulary_size, -10.0, dtype=np.float32)
        values[ord(self.likely_letter)] = -0.5
        return values

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        self.asked.append(bytes(token for token in ids if token < 256).decode())
        return list(self._output.encode())[:max_new_tokens]

    def generate_many(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
        for index, prompt in enumerate(prompts):
            yield index, self.generate(prompt, max_new_tokens)

    def text(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()

    def prompt_seconds(self, ids: Sequence[int], repeats: int, before: Sequence[int] = ()) -> list[float]:
        return [0.5] * repeats

    def decode_seconds(self, ids: Sequence[int], repeats: int, before: Sequence[int] = ()) -> list[float]:
        return [2.0] * repeats

    def answer_times(self, prompt: Sequence[int], max_new_tokens: int, seed: int) -> list[float]:
        return [0.5 + 0.25 * token for token in range(max_new_tokens)]

    def close(self) -> None:
        pass

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def make_tiny_model(folder: Path) -> Path:
    """A random Llama of two layers; its logits differ clearly, so that greedy decoding is stable."""
    return save_model(folder, layers=2, dtype=torch.float32)


def make_adapter(base: Path, folder: Path) -> Path:
    """A random LoRA adapter for ``base`` whose change is large enough to be seen."""
    return save_adapter(folder, base, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
