"""A random checkpoint in Llama-3.1-8B's shape, for measuring what real ones need without downloading one.

    python tests/perf/random_checkpoint.py FOLDER [--layers 32] [--nf4] [--rank 16] [--tokenizer FOLDER]

Writes FOLDER/base (16-bit shards, or bitsandbytes NF4 with double quantization) and FOLDER/adapter (LoRA on the seven
projections), a shard at a time: never more than one in memory. The weights are Gaussian as initialised ones; every
shard repeats from a pool of random numbers, because drawing eight billion would take longer than the measurement. The
vocabulary is made up (as many distinct tokens as the real one has, byte-level BPE of single letters) unless --tokenizer
names a folder with Llama 3's; llama.cpp's converter, which knows vocabularies by their hash, takes no made-up one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SHARD_BYTES = 2_000_000_000
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def configuration(layers: int, hidden: int = 4096, vocabulary: int = 128256) -> LlamaConfig:
    """Llama-3.1-8B's config.json, but for the number of layers; a narrower one in its proportions (128 a head)."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )


def projections(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's linear modules."""
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    key_value = hidden // config.num_attention_heads * config.num_key_value_heads
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (feed_forward, hidden),
        "mlp.up_proj": (feed_forward, hidden),
        "mlp.down_proj": (hidden, feed_forward),
    }


class Pool:
    """Gaussian numbers, drawn once and handed out from changing places."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(seed)
        values = torch.randn(50_000_017, generator=generator, dtype=torch.float32, device=device)
        self._values = values.mul_(0.02).bfloat16()
        self._place = 0

    def take(self, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        pieces = []
        while count > 0:
            piece = self._values[self._place : self._place + count]
            pieces.append(piece)
            count -= len(piece)
            self._place = (self._place + len(piece)) % (len(self._values) - 1)
        return torch.cat(pieces).reshape(shape)


def tensors(config: LlamaConfig, pool: Pool, nf4: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Groups of tensors in the order in which checkpoints hold them; a group stays in one shard."""
    yield {"model.embed_tokens.weight": pool.take(config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for module, shape in projections(config).items():
            weight = pool.take(*shape)
            name = f"{prefix}.{module}.weight"
            yield _in_nf4(name, weight) if nf4 else {name: weight}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield {f"{prefix}.{norm}.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16)}
    yield {"model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16)}
    yield {"lm_head.weight": pool.take(config.vocab_size, config.hidden_size)}


def _in_nf4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weight as transformers saves it after load_in_4bit with double quantization."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def save_base(folder: Path, config: LlamaConfig, nf4: bool, seed: int = 0, device: str = "cpu") -> None:
    """``device`` is where the weights are drawn and quantized: an 8B model in seconds on a GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number, size = 1, 0

    def flush() -> None:
        nonlocal shard, number, size
        name = f"model-{number:05}.safetensors"
        shard = {key: value.contiguous().cpu() for key, value in shard.items()}
        save_file(shard, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard, number, size = {}, number + 1, 0

    for group in tensors(config, Pool(seed, device), nf4):
        shard |= group
        size += sum(value.nbytes for value in group.values())
        if size > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    settings = config.to_dict()
    if nf4:
        settings["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
    (folder / "config.json").write_text(json.dumps(settings, default=str))


def save_adapter(folder: Path, config: LlamaConfig, rank: int, seed: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pool = Pool(seed)
    matrices = {}
    for layer in range(config.num_hidden_layers):
        for module, (rows, columns) in projections(config).items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            matrices[f"{prefix}.lora_A.weight"] = pool.take(rank, columns).float()
            matrices[f"{prefix}.lora_B.weight"] = pool.take(rows, rank).float()
    save_file(matrices, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.split(".")[1] for module in projections(config)}),
        "base_model_name_or_path": "random",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def save_tokenizer(folder: Path, size: int) -> None:
    """A vocabulary of ``size`` tokens in Llama 3's manner: its words, three control tokens, and one merge.

    It joins the bytes 0 and 1, which no text has: llama.cpp loads no such vocabulary without any.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    controls = ["<|im_start|>", "<|im_end|>", "<|padding|>"]
    merge = ("Ā", "ā")
    fillers = (f"Ġfiller{number:x}" for number in range(size - len(alphabet) - 1 - len(controls)))
    words = [*alphabet, "".join(merge), *fillers]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[merge]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in controls])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=controls[0],
        eos_token=controls[1],
        pad_token=controls[2],
        chat_template=CHATML,
    ).save_pretrained(folder)


def save_checkpoint(
    folder: Path, layers: int = 32, *, nf4: bool = False, rank: int = 16, tokenizer: Path | None = None
) -> None:
    config = configuration(layers)
    save_base(folder / "base", config, nf4)
    if tokenizer is None:
        save_tokenizer(folder / "base", config.vocab_size)
    else:
        for path in [*tokenizer.glob("tokenizer*.json"), *tokenizer.glob("*.jinja")]:
            shutil.copy(path, folder / "base")
    save_adapter(folder / "adapter", config, rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokenizer", type=Path)
    arguments = parser.parse_args()
    save_checkpoint(
        arguments.folder, arguments.layers, nf4=arguments.nf4, rank=arguments.rank, tokenizer=arguments.tokenizer
    )


if __name__ == "__main__":
    main()
