"""An adapter alone as GGUF, for llama.cpp's ``--lora``: small, and the base file stays as it is.

Follows llama.cpp's ``convert_lora_to_gguf.py``. llama.cpp adds ``alpha / r * B A x`` to a product ``W x``, one alpha
for the whole file; so rsLoRA, alphas by pattern and weights go into B, where that converter leaves them out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import gguf
import numpy as np

from export.architecture import EMBEDDING, OUTPUT, Architecture
from export.lora import LoraAdapter
from export.tensor_change import LowRankChange, TensorChange
from export.weights import FloatRows
from pipeline.errors import MedcotError

AdapterType = Literal["F32", "F16"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Weighted = tuple[LoraAdapter, float]


def write_adapter_gguf(
    path: Path, title: str, architecture: Architecture, adapters: Sequence[Weighted], adapter_type: AdapterType
) -> None:
    """Write the sum of ``adapters`` as one adapter; ``architecture`` is the base's.

    Raises MedcotError where llama.cpp has no form for what an adapter does.
    """
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(title)
        _add_base(writer, adapters)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _alpha(adapters))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, values in adapter_tensors(architecture, adapters):
            writer.add_tensor(name, _stored(name, values, adapter_type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def check_expressible(architecture: Architecture, adapters: Sequence[Weighted]) -> None:
    """Raise MedcotError unless llama.cpp can apply the adapters to a base GGUF."""
    for adapter, _ in adapters:
        for name, change in adapter.changes.items():
            what = _inexpressible(name, change, architecture)
            if what is not None:
                raise MedcotError(
                    f"{adapter.folder} trains {what} ({name}), which llama.cpp cannot take from an adapter GGUF: "
                    "leave out --adapter-gguf and use the merged GGUF."
                )


def _inexpressible(name: str, change: TensorChange, architecture: Architecture) -> str | None:
    if change.magnitude:
        return "DoRA magnitudes"
    if change.tokens:
        return "single tokens"
    if name == EMBEDDING or (name == OUTPUT and architecture.tied):
        return "embeddings"
    if name.endswith(".bias"):
        return "biases"
    resized = change.underlying is not None and change.underlying.shape[0] != architecture.vocabulary
    return "whole tensors" if change.replacement or resized or not change.low_rank else None


def adapter_tensors(architecture: Architecture, adapters: Sequence[Weighted]) -> list[tuple[str, FloatRows]]:
    """GGUF name and content of every matrix: A [r, columns] and B [rows, r], B's rows in GGUF's order."""
    check_expressible(architecture, adapters)
    alpha = _alpha(adapters)
    tensors = []
    for tensor in architecture.tensors():
        changes = [
            (adapter.changes[tensor.source].low_rank, weight)
            for adapter, weight in adapters
            if tensor.source in adapter.changes
        ]
        present = [(change, weight) for change, weight in changes if change is not None]
        if not present:
            continue
        a, b = _joined(present, alpha)
        tensors.append((f"{tensor.name}.lora_a", a))
        tensors.append((f"{tensor.name}.lora_b", b if tensor.order is None else b[tensor.order]))
    return tensors


def _alpha(adapters: Sequence[Weighted]) -> float:
    """The first adapter's own; to llama.cpp 0 means that no alpha is given, so it cannot stand for 0."""
    return adapters[0][0].alpha or 1.0


def _joined(changes: Sequence[tuple[LowRankChange, float]], alpha: float) -> tuple[FloatRows, FloatRows]:
    """One A and B for the sum of several: ranks side by side, what llama.cpp's alpha / r leaves over put into B."""
    rank = sum(change.a.shape[0] for change, _ in changes)
    a = np.concatenate([change.a for change, _ in changes])
    b = np.concatenate(
        [change.b * np.float32(weight * change.scale * rank / alpha) for change, weight in changes], axis=1
    )
    return a, b


def _stored(name: str, values: FloatRows, adapter_type: AdapterType) -> np.ndarray:
    if adapter_type == "F32":
        return values
    if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise MedcotError(f"{name} does not fit F16; write the adapter GGUF as F32.")
    return values.astype(np.float16)


def _add_base(writer: gguf.GGUFWriter, adapters: Sequence[Weighted]) -> None:
    name = adapters[0][0].base_name
    if name is None:
        return
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, name.rpartition("/")[2])
    if _HUB_ID.fullmatch(name):
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{name}")
