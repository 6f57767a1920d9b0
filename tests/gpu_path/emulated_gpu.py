"""Unsloth's CUDA code on CPU tensors: what it would run on a T4, without a GPU.

``UNSLOTH_ALLOW_CPU`` lets it import that code where there is no GPU, and Triton's interpreter runs its kernels. What
asks CUDA about the card is told of a T4; what would put a tensor there puts it into main memory. Not emulated: 4-bit
kernels, offloaded gradient checkpointing, NCCL, asynchrony, speed.

Read in unsloth and unsloth_zoo 2026.10.9, triton 3.9.0. Importing this imports torch; nothing of Unsloth before
``import_unsloth_for_cuda``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["UNSLOTH_ALLOW_CPU"] = "1"
os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
# On a CPU torch.compile runs a C++ compiler for a minute, and shows nothing of what it would write for a GPU.
os.environ["UNSLOTH_COMPILE_DISABLE"] = "1"
# Read when a kernel is defined. Which is compiled instead, tests/gpu_path/compiled_kernels.py asks without it.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

T4 = SimpleNamespace(
    name="Tesla T4",
    total_memory=15_640_000_000,
    major=7,
    minor=5,
    multi_processor_count=40,
    is_integrated=0,
    gcnArchName="",
)


def import_unsloth_for_cuda(generated: Path) -> None:
    """Import Unsloth with everything in place that it puts there on a GPU; its generated trainer goes to a folder."""
    _answer_as_a_t4()
    from pipeline.training.lora_model import import_unsloth

    import_unsloth(generated)
    from unsloth.models import llama, loader, rl
    from unsloth.trainer import _patch_trl_trainer

    # Under UNSLOTH_ALLOW_CPU the import leaves TRL alone. Of its trainers only the one in use is generated here.
    rl._patch_trl_rl_trainers_impl("sft_trainer")
    _patch_trl_trainer()
    # For several processes it would name a CUDA device each.
    loader.prepare_device_map = lambda: (None, False)
    _rotary_cache_in_main_memory(llama)


def _answer_as_a_t4() -> None:
    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda *_: T4,
        "get_device_capability": lambda *_: (T4.major, T4.minor),
        "get_device_name": lambda *_: T4.name,
        "mem_get_info": lambda *_: (T4.total_memory, T4.total_memory),
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def _rotary_cache_in_main_memory(llama: Any) -> None:
    """It keeps cosines and sines for each GPU by the GPU's number, and a CPU tensor's device has none."""
    cache = llama.LlamaRotaryEmbedding
    ensure = cache._ensure_rope_cache

    def build(self: Any, device_index: int) -> None:
        size = self.current_rope_size
        self._set_cos_sin_cache(self._rope_cache_rows(), torch.device("cpu", 0), self._rope_cache_dtype)
        self.current_rope_size = size
        self._rope_cache_versions[device_index] = self._rope_cache_version

    cache._ensure_rope_cache = lambda self, device_index: ensure(self, 0)
    cache._build_rope_cache = build
    llama.DEVICE_COUNT = 1
    llama.get_current_device = lambda: "cpu"


def autocast_in_float16(scale: float, growth_interval: int) -> None:
    """What accelerate does for ``fp16`` on a GPU and leaves out on a CPU: autocast, and a scaler of the gradients."""
    from transformers.trainer import Trainer

    prepare = Trainer.create_accelerator_and_postprocess

    def with_scaler(trainer: Trainer) -> None:
        prepare(trainer)
        accelerator = trainer.accelerator
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)

    Trainer.create_accelerator_and_postprocess = with_scaler
