"""The model that is trained: a frozen base with LoRA matrices. Unsloth loads and wraps it, on GPUs and on the CPU."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.adapter_recipe import AdapterRecipe, write_recipe
from pipeline.artifacts import write_text
from pipeline.chat_template import template_sha256
from pipeline.config import Config
from pipeline.errors import MedcotError

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def import_unsloth(compiled: Path) -> None:
    """Unsloth patches transformers, trl and peft, so it has to be imported before them.

    On a GPU it writes modules that it generates into ``compiled``, where the user names no other folder; its own
    choice, one in the current folder, two trainings at once would write over for each other.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(compiled))
    try:
        import unsloth  # noqa: F401
    except ImportError as error:
        raise MedcotError(
            f"Unsloth is not usable here ({error}): install requirements-gpu.txt, "
            "or requirements-cpu.txt on a machine without a GPU."
        ) from error


def load_lora_model(config: Config, base: Path, dtype: str) -> Any:
    import torch
    from unsloth import FastLanguageModel

    checkpointing: bool | str = "unsloth" if config.training.gradient_checkpointing is not False else False
    model, _ = FastLanguageModel.from_pretrained(
        str(base),
        max_seq_length=config.model.max_seq_length,
        dtype=getattr(torch, dtype),
        load_in_4bit=config.model.load_in_4bit,
        use_gradient_checkpointing=checkpointing,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules),
        use_gradient_checkpointing=checkpointing,
        random_state=config.seed,
        max_seq_length=config.model.max_seq_length,
    )


def turn_on_checkpointing(model: Any) -> None:
    """For a model that was loaded without gradient checkpointing; the trainer's arguments have to say it too."""
    from unsloth import FastLanguageModel

    model.enable_input_require_grads()  # a layer whose inputs need no gradient would not be computed again
    FastLanguageModel.for_training(model, use_gradient_checkpointing=True)


def count_parameters(model: Any) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts its logical elements, not its packed bytes."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += math.prod(state.shape) if state is not None else parameter.numel()
    return trainable, total


def adapter_in_float32(model: Any) -> None:
    """TRL casts the adapter of a 4-bit model to bfloat16, and peft casts it back to float32 when a checkpoint is
    loaded: a resumed training would not be the same one. In bfloat16 small updates are lost besides."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def autocast_asked_of(device: str) -> Iterator[None]:
    """``torch.is_autocast_enabled()`` without an argument means ``device``, and not CUDA.

    peft and Unsloth ask so before they compute an adapter. On the CPU they hear no, and widen input and output of every
    adapted layer to the adapter's 32 bit, which autocast narrows again: but for dropout the same numbers, for more time
    and memory.
    """
    import torch

    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device_type=device: asked(device_type)
    try:
        yield
    finally:
        torch.is_autocast_enabled = asked


def adapter_weights(model: Any) -> dict[str, Any]:
    """A copy of the LoRA matrices, in main memory."""
    from peft import get_peft_model_state_dict

    return {name: value.detach().cpu().clone() for name, value in get_peft_model_state_dict(model).items()}


def load_checkpoint_weights(model: Any, checkpoint: Path) -> None:
    from safetensors.torch import load_file

    set_adapter_weights(model, load_file(checkpoint / ADAPTER_WEIGHTS))


def set_adapter_weights(model: Any, weights: dict[str, Any]) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, weights)


def save_adapter(config: Config, model: Any, tokenizer: Any, out_dir: Path) -> None:
    """Adapter, tokenizer and recipe; the adapter names its base as configured, not as a folder of this machine."""
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    path = out_dir / "adapter_config.json"
    adapter_config = json.loads(path.read_text())
    adapter_config["base_model_name_or_path"] = config.model.base
    write_text(path, json.dumps(adapter_config, indent=2, sort_keys=True) + "\n")
    (out_dir / "README.md").unlink(missing_ok=True)  # peft's empty model card
    write_recipe(
        out_dir,
        AdapterRecipe(
            base=config.model.base,
            template_sha256=template_sha256(tokenizer.chat_template),
            system=config.prompt.system,
        ),
    )
