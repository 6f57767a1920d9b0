"""How large a GGUF of a quantization gets, from the model's configuration only."""

from __future__ import annotations

from pipeline.model_size import ModelSize

UNQUANTIZED = ("F32", "F16", "BF16")
# Bits a weight of the matrices in each file type, K-quants' mixtures included (llama.cpp's tools/quantize/README.md).
_BITS = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.56, "Q5_K_M": 5.7, "Q5_K_S": 5.57, "Q4_K_M": 4.89,
    "Q4_K_S": 4.67, "Q4_0": 4.66, "Q3_K_M": 4.0, "Q2_K": 3.16, "IQ4_XS": 4.46,
}  # fmt: skip
_ODD_WIDTH_FACTOR = 1.28  # a width that is no multiple of 256 makes K-quants fall back to larger types (SmolLM2)


def file_bytes(quantization: str, size: ModelSize) -> float:
    """About how large the file gets; a type that is not known counts as 16 bits."""
    bits = _BITS.get(quantization.upper(), 16.0)
    odd = size.hidden % 256 != 0 and bits < 8
    return size.parameters * bits * (_ODD_WIDTH_FACTOR if odd else 1) / 8
