"""Whether a checkpoint holds the tensors that its config.json describes."""

from __future__ import annotations

from export.architecture import Architecture
from export.safetensors_file import float_type
from export.weights import BaseWeights
from pipeline.errors import MedcotError

_PACKED = ("NF4", "FP4")  # bitsandbytes' types, as export/bitsandbytes_4bit.py names them


def check_tensors(architecture: Architecture, weights: BaseWeights) -> None:
    """Raise MedcotError for a tensor that is missing, of another shape or type, or without a place in the model."""
    for tensor in architecture.tensors():
        if tensor.source is None:
            continue
        stored = weights.stored(tensor.source)
        if stored.shape != tensor.shape:
            raise MedcotError(
                f"{stored.path}: {tensor.source} has shape {list(stored.shape)}, config.json says "
                f"{list(tensor.shape)}; the checkpoint and its configuration do not belong together."
            )
        if stored.dtype not in _PACKED:
            float_type(tensor.source, stored)
    unknown = architecture.unknown(set(weights.names))
    if unknown:
        raise MedcotError(
            f"{weights.origin} holds {len(unknown)} tensors that {architecture.hf_name} models have no place "
            f"for, such as {unknown[0]}: config.json names the wrong architecture, or the base is quantized."
        )
