"""Which ggml type each tensor gets in a file of a given quantization.

The rules are llama.cpp's (``src/llama-quant.cpp``: ``llama_tensor_get_type_impl``, ``tensor_type_fallback``)
for dense models, so that a file is the one ``llama-quantize`` would write.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from gguf import LlamaFileType as F

from pipeline.errors import MedcotError


@dataclass(frozen=True)
class ModelShape:
    """What the choice depends on beside the tensor itself."""

    layers: int
    heads: int
    kv_heads: int
    tied_embeddings: bool
    architecture: str = "llama"
    has_importance: bool = False  # whether an importance matrix guides the quantizers

    @property
    def heads_per_kv_head(self) -> int:
        return self.heads // self.kv_heads

    @property
    def is_70b(self) -> bool:
        """llama.cpp's test for models of 70B and their kin, whose attn_v is small enough for more bits."""
        return self.layers == 80 and (self.architecture == "qwen2" or self.heads != self.kv_heads)


# A rule gives the type of a tensor in layer i, or None for the file's default.
Rule = Callable[[int, ModelShape], T | None]


@dataclass(frozen=True)
class FileType:
    """One quantization: the default type of its matrices, and rules for those that matter more or less."""

    name: str
    number: F
    default: T
    rules: dict[str, Rule] = field(default_factory=dict)


def _always(ggml_type: T) -> Rule:
    return lambda layer, shape: ggml_type


def _use_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _more_bits(ggml_type: T) -> Rule:
    return lambda layer, shape: ggml_type if _use_more_bits(layer, shape.layers) else None


def _first_layers(count: int, ggml_type: T, then: T | None = None) -> Rule:
    return lambda layer, shape: ggml_type if layer < count else then


def _first_share(parts: int, ggml_type: T, then: T | None = None) -> Rule:
    """The first ``1 / parts`` of the layers."""
    return lambda layer, shape: ggml_type if layer < shape.layers // parts else then


def _if_grouped(ggml_type: T, otherwise: T | None = None) -> Rule:
    """Models in which at least four heads share a key-value head."""
    return lambda layer, shape: ggml_type if shape.heads_per_kv_head >= 4 else otherwise


def _if_importance(given: bool, rule: Rule) -> Rule:
    """A rule for files made with an importance matrix only, or for those made without one."""
    return lambda layer, shape: rule(layer, shape) if shape.has_importance is given else None


FILE_TYPES = {
    file_type.name: file_type
    for file_type in (
        FileType("F32", F.ALL_F32, T.F32),
        FileType("F16", F.MOSTLY_F16, T.F16),
        FileType("BF16", F.MOSTLY_BF16, T.BF16),
        FileType("Q8_0", F.MOSTLY_Q8_0, T.Q8_0),
        FileType("Q6_K", F.MOSTLY_Q6_K, T.Q6_K),
        FileType("Q5_K_M", F.MOSTLY_Q5_K_M, T.Q5_K, {"attn_v": _more_bits(T.Q6_K), "ffn_down": _more_bits(T.Q6_K)}),
        FileType("Q5_K_S", F.MOSTLY_Q5_K_S, T.Q5_K),
        FileType("Q4_K_M", F.MOSTLY_Q4_K_M, T.Q4_K, {"attn_v": _more_bits(T.Q6_K), "ffn_down": _more_bits(T.Q6_K)}),
        FileType(
            "Q4_K_S",
            F.MOSTLY_Q4_K_S,
            T.Q4_K,
            {"attn_v": _first_layers(4, T.Q5_K), "ffn_down": _first_share(8, T.Q5_K)},
        ),
        FileType(
            "Q3_K_M",
            F.MOSTLY_Q3_K_M,
            T.Q3_K,
            {
                "attn_v": _first_layers(2, T.Q5_K, then=T.Q4_K),
                "attn_output": _always(T.Q4_K),
                "ffn_down": _first_share(16, T.Q5_K, then=T.Q4_K),
            },
        ),
        FileType(
            "Q2_K",
            F.MOSTLY_Q2_K,
            T.Q2_K,
            {
                "attn_v": _if_grouped(T.Q4_K, otherwise=T.Q3_K),
                "attn_output": _always(T.Q3_K),
                "ffn_down": _always(T.Q3_K),
            },
        ),
        FileType(
            "IQ4_XS",
            F.MOSTLY_IQ4_XS,
            T.IQ4_XS,
            {"attn_v": _if_grouped(T.Q5_K), "ffn_down": _if_importance(False, _first_share(8, T.Q5_K))},
        ),
        FileType("Q4_0", F.MOSTLY_Q4_0, T.Q4_0, {"ffn_down": _if_importance(True, _first_share(8, T.Q4_1))}),
    )
}

# What a matrix gets whose width is no multiple of 256: a type with blocks of 32.
_NARROW = {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0, T.IQ4_XS: T.IQ4_NL}
_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def file_type(name: str) -> FileType:
    """Look a quantization up by name; raises MedcotError listing those that work."""
    try:
        return FILE_TYPES[name.upper()]
    except KeyError:
        raise MedcotError(
            f"{name} is no quantization that export writes: choose among {', '.join(FILE_TYPES)}."
        ) from None


def tensor_type(file_type: FileType, name: str, shape: tuple[int, ...], model: ModelShape) -> T:
    """The type of tensor ``name`` (GGUF name, shape as [rows, columns]) in a file of the given type."""
    if len(shape) < 2 or not name.endswith(".weight"):
        return T.F32
    default = file_type.default
    if default in (T.F32, T.F16, T.BF16):
        return default
    return _fitting(_wanted(file_type, name, shape[-1], model), shape[-1])


def _wanted(file_type: FileType, name: str, columns: int, model: ModelShape) -> T:
    default = file_type.default
    if name == "output.weight" or (name == "token_embd.weight" and model.tied_embeddings):
        return T.Q8_0 if default is T.Q8_0 or not _divides(default, columns) else T.Q6_K
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        return default
    layer, part = int(match[1]), match[2]
    rule = file_type.rules.get(part)
    chosen = (rule(layer, model) if rule else None) or default
    if part == "attn_v" and model.is_70b and chosen in (T.Q3_K, T.Q4_K):
        return T.Q5_K
    return chosen


def _fitting(ggml_type: T, columns: int) -> T:
    if _divides(ggml_type, columns):
        return ggml_type
    narrow = _NARROW.get(ggml_type, ggml_type)
    return narrow if _divides(narrow, columns) else T.F16


def _divides(ggml_type: T, columns: int) -> bool:
    return columns % GGML_QUANT_SIZES[ggml_type][0] == 0
