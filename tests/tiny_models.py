"""Tiny random models, adapters and tokenizers for the tests of every stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARED = Path("../shared")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = [
    "The patient was given 250 mg of metformin; it's well tolerated.\n\nShe'll return in 12 weeks.",
    "def f(x):\n    return x * 2.5  # naïve",
    "Боль в груди 胸痛 😀",
]


def save_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer in SmolLM2's manner; returns its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    controls = [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=controls, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )
    fast.save_pretrained(folder)
    return len(fast)


def save_model(
    folder: Path,
    *,
    hidden: int = 64,
    feed_forward: int = 160,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = True,
    dtype: torch.dtype = torch.float16,
    vocabulary: int | None = None,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **config: object,
) -> Path:
    """A Llama with random weights; with the tokenizer above unless ``vocabulary`` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    size = vocabulary or save_tokenizer(folder) + 5
    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        **config,
    )
    model = LlamaForCausalLM(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def save_adapter(folder: Path, base: Path, **settings: object) -> Path:
    """A LoRA adapter whose B is random too, so that it changes the model visibly."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": LORA_TARGETS, "task_type": "CAUSAL_LM", **settings}
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(folder)
    return folder


def read_tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def read_metadata(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def tensor_bytes(tensor: gguf.ReaderTensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1)


_QUANTIZE = """
import ctypes, json, sys, llama_cpp
source, jobs = sys.argv[1], json.loads(sys.argv[2])
for target, number in jobs:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = number, 1
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    if status:
        sys.exit(f"llama_model_quantize failed for {target}")
"""


def quantize_with_libllama(source: Path, jobs: list[tuple[str, int]]) -> None:
    """libllama's own quantizer from an F32 GGUF to (path, file type number), in a child process."""
    import json

    subprocess.run([sys.executable, "-c", _QUANTIZE, str(source), json.dumps(jobs)], check=True, capture_output=True)
