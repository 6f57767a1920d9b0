"""Models for the benchmark's tests: a tiny random one, as a folder, an adapter and a GGUF, and one faked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.engines import EngineName
from pipeline.prompts import ChatFormat

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = "What is the mechanism of action of metformin? It lowers the production of glucose in the liver. "


class ByteVocabulary:
    """One token a byte, two control tokens above them."""

    bos_token: str | None = None
    eos_token = "<|im_end|>"
    adds_bos = False
    control_tokens: Mapping[str, int] = {"<|im_start|>": 256, "<|im_end|>": 257}

    def encode_text(self, text: str, *, after_text: bool) -> list[int]:
        return list(text.encode())


class FakeEngine:
    """Gives every token the log-probability -0.5 and writes the same output for every prompt."""

    name: EngineName = "llama.cpp"
    weights = "F16"
    file_bytes = 1000
    vocabulary_size = 258

    def __init__(self, output: str = "<think>\nbecause\n</think>\n\nso", log_probability: float = -0.5) -> None:
        self.chat_format = ChatFormat(CHATML, ByteVocabulary())
        self.asked: list[str] = []
        self._output = output
        self._log_probability = log_probability

    def token_log_probabilities(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        return np.full(len(ids) - 1, self._log_probability)

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        self.asked.append(bytes(token for token in ids if token < 256).decode())
        return list(self._output.encode())[:max_new_tokens]

    def generate_many(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
        for index, prompt in enumerate(prompts):
            yield index, self.generate(prompt, max_new_tokens)

    def text(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()

    def prompt_seconds(self, ids: Sequence[int]) -> float:
        return 0.5

    def decode_seconds(self, ids: Sequence[int]) -> float:
        return 2.0

    def close(self) -> None:
        pass

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def make_tiny_model(folder: Path) -> Path:
    """A random Llama of two layers with a byte-level tokenizer, laid out as Hugging Face does."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        initializer_range=0.2,  # large enough for the logits to differ clearly
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path) -> Path:
    """A random LoRA adapter for ``base`` whose change is large enough to be seen."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(folder)
    return folder
