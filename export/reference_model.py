"""Base + adapter under transformers and peft, computing in 32 bit without holding the weights in 32 bit.

The reference of ``export/verify.py``: nothing of our own export is used here. The base stays mapped from its files in
the type it is stored in, each layer's weights are widened while that layer computes, and the adapter is not merged.
An 8B model takes some 5 GB of memory of its own instead of 32 (LOG.md, 2026-11-22).
"""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

from pipeline.json_files import read_json


def load_reference(base: Path, adapter: Path | None) -> Any:
    """The model in evaluation mode: token ids [batch, length] to float32 logits [batch, length, vocabulary]."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = _adapter_settings(adapter)
    # These read the base's weights themselves, so they have to be in 32 bit beforehand.
    widened_at_once = bool(settings.get("use_dora") or settings.get("trainable_token_indices"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32 if widened_at_once else "auto")
    if adapter:
        from peft import PeftModel

        rows = _embedding_rows(adapter)
        if rows is not None and rows != model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(rows, mean_resizing=False)
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.float()  # peft loads the adapter's into these, in their type
        # peft loads a module that was trained whole into a copy of the base's, in that one's type.
        whole = tuple(settings.get("modules_to_save") or ())
        for name, module in model.named_modules():
            if whole and name.endswith(whole):
                module.float()
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=True)
    if not widened_at_once:
        _compute_in_32_bit(model)
    return model.eval()


def _compute_in_32_bit(model: Any) -> None:
    """Widen the large weights when they are used, and all others for good."""
    from torch import nn

    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = types.MethodType(_widened_linear, module)
        # peft's own module around it, which adds the adapter, is called the same.
        elif type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes."):
            module.forward = types.MethodType(_widened_4bit_linear, module)
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(_widened_output)
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def _widened_linear(self: Any, values: Any) -> Any:
    from torch.nn.functional import linear

    return linear(values.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def _widened_4bit_linear(self: Any, values: Any) -> Any:
    """bitsandbytes' own dequantization, to 32 bit instead of the type that training computed in."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from torch.nn.functional import linear

    state = self.weight.quant_state
    stored, state.dtype = state.dtype, torch.float32
    try:
        weight = dequantize_4bit(self.weight.data, state)
    finally:
        state.dtype = stored
    return linear(values.float(), weight, None if self.bias is None else self.bias.float())


def _widened_output(module: Any, inputs: Any, output: Any) -> Any:
    return output.float()


def _embedding_rows(adapter: Path) -> int | None:
    """The number of tokens of an adapter that was saved with whole embeddings, as one with added tokens is."""
    from safetensors import safe_open

    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "numpy") as file:
        whole = [
            name
            for name in file.keys()  # noqa: SIM118 - this file is no mapping
            if name.endswith(".weight") and "lora_" not in name and re.search(r"\.(embed_tokens|lm_head)\.", name)
        ]
        return file.get_slice(whole[0]).get_shape()[0] if whole else None


def _adapter_settings(adapter: Path | None) -> dict[str, Any]:
    path = adapter / "adapter_config.json" if adapter else None
    settings: dict[str, Any] = read_json(path) if path and path.is_file() else {}
    return settings
