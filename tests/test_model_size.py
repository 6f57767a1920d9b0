"""Counts from config.json alone, against published ones and against PyTorch's own."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pipeline.config import load_config
from pipeline.errors import MedcotError
from pipeline.model_size import ModelSize

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_2_7B = LLAMA_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    ("architecture", "preset", "total", "trained"),
    [
        (LLAMA_8B, "deepseek-r1-8b", 8_030_261_248, 41_943_040),
        (TINYLLAMA, "tinyllama-flashcards", 1_100_048_384, 12_615_680),
    ],
)
def test_parameter_counts_are_the_published_ones(
    architecture: dict[str, int], preset: str, total: int, trained: int
) -> None:
    size = ModelSize.from_config(architecture)
    assert (size.parameters, size.trained(load_config(preset).lora)) == (total, trained)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "llama with biases", "qwen2"])
def test_counts_are_those_of_the_built_model(kind: str, tied: bool) -> None:
    settings = LLAMA_8B | {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": tied,
    }  # fmt: skip
    with torch.device("meta"):
        if kind == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**settings))
        else:
            model = LlamaForCausalLM(LlamaConfig(**settings, attention_bias="biases" in kind))
    found = ModelSize.from_config(model.config.to_dict())
    # transformers' attention_bias puts one on the output projection too; Qwen2 has none there.
    extra = 2 * 64 if "biases" in kind else 0
    assert found.parameters + extra == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "holds a JSON list, not an object"),
        ("{}", "hidden_size must be a positive whole number, found None"),
        (json.dumps(LLAMA_8B | {"num_hidden_layers": "32"}), "num_hidden_layers must be"),
        (json.dumps(LLAMA_8B | {"num_attention_heads": 0}), "num_attention_heads must be"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(MedcotError, match=message):
        ModelSize.of(tmp_path)


def test_a_missing_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(MedcotError, match="cannot be read"):
        ModelSize.of(tmp_path)


def test_the_size_of_a_saved_model(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    stored = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert ModelSize.of(base).parameters * 2 == pytest.approx(stored, rel=0.1)
