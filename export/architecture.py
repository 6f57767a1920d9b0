"""What a Hugging Face model is in GGUF: its tensors under their GGUF names, its hyperparameters as metadata.

Follows llama.cpp's converter (``conversion/llama.py``) and the key names of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from export.quant_types import ModelShape
from export.weights import FloatRows, RowIndices, read_json
from pipeline.errors import MedcotError

SUPPORTED = ("LlamaForCausalLM",)
# Tensors that some checkpoints carry and no model reads.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of the GGUF: ``source`` is its Hugging Face name, or ``values`` its content where computed.

    ``order`` lists the source's rows in the order that GGUF wants them; None leaves them as they are.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None = None
    order: RowIndices | None = None
    values: FloatRows | None = None


class LlamaArchitecture:
    """LlamaForCausalLM: Llama 2 and 3, R1-Distill-Llama, TinyLlama, SmolLM2."""

    name = "llama"

    def __init__(self, config: Mapping[str, Any], origin: Path) -> None:
        self._config = config
        self._origin = origin
        self.layers = self._integer("num_hidden_layers")
        self.hidden = self._integer("hidden_size")
        self.feed_forward = self._integer("intermediate_size")
        self.heads = self._integer("num_attention_heads")
        self.kv_heads = self._integer("num_key_value_heads", self.heads)
        self.head_dim = self._integer("head_dim", self.hidden // self.heads)
        self.vocabulary = self._integer("vocab_size")
        self.context = self._integer("max_position_embeddings", 2048)
        self.tied = bool(config.get("tie_word_embeddings", False))
        self.rope = _rope_parameters(config)
        self._check_supported()

    @property
    def shape(self) -> ModelShape:
        return ModelShape(self.layers, self.heads, self.kv_heads, self.tied)

    def tensors(self) -> list[ModelTensor]:
        """All tensors in the order in which checkpoints store them, so that shards are read in turn."""
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, self.layers)
        tensors = []
        factors = self._rope_factors()
        if factors is not None:
            tensors.append(ModelTensor("rope_freqs.weight", factors.shape, values=factors))
        for source, shape, order in self._sources():
            name = names.get_name(source, try_suffixes=(".weight",))
            assert name is not None, source
            tensors.append(ModelTensor(name, shape, source, order))
        return tensors

    def unknown(self, stored: set[str]) -> list[str]:
        """Tensors of the checkpoint that this architecture has no place for; none is lost in silence."""
        known = {source for source, _, _ in self._sources()} | ({"lm_head.weight"} if self.tied else set())
        return sorted(name for name in stored - known if not name.endswith(_IGNORED_SUFFIXES))

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.feed_forward)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        if self.rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self._rope_number("factor"))
        writer.add_rope_freq_base(self._rope_number("rope_theta"))
        writer.add_layer_norm_rms_eps(float(self._config.get("rms_norm_eps", 1e-6)))
        if self._config.get("head_dim") is not None:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)
        writer.add_vocab_size(self.vocabulary)
        writer.add_rope_dimension_count(self.head_dim)

    def _sources(self) -> list[tuple[str, tuple[int, ...], RowIndices | None]]:
        """Hugging Face name, shape and row order of every tensor."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        query_order, key_order = (
            _rotary_order(self.heads, self.head_dim),
            _rotary_order(self.kv_heads, self.head_dim),
        )
        sources: list[tuple[str, tuple[int, ...], RowIndices | None]] = [
            ("model.embed_tokens.weight", (self.vocabulary, self.hidden), None)
        ]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            sources += [
                (f"{prefix}.self_attn.q_proj.weight", (queries, self.hidden), query_order),
                (f"{prefix}.self_attn.k_proj.weight", (keys, self.hidden), key_order),
                (f"{prefix}.self_attn.v_proj.weight", (keys, self.hidden), None),
                (f"{prefix}.self_attn.o_proj.weight", (self.hidden, queries), None),
                (f"{prefix}.mlp.gate_proj.weight", (self.feed_forward, self.hidden), None),
                (f"{prefix}.mlp.up_proj.weight", (self.feed_forward, self.hidden), None),
                (f"{prefix}.mlp.down_proj.weight", (self.hidden, self.feed_forward), None),
                (f"{prefix}.input_layernorm.weight", (self.hidden,), None),
                (f"{prefix}.post_attention_layernorm.weight", (self.hidden,), None),
            ]
        sources.append(("model.norm.weight", (self.hidden,), None))
        if not self.tied:
            sources.append(("lm_head.weight", (self.vocabulary, self.hidden), None))
        return sources

    def _rope_factors(self) -> FloatRows | None:
        """Llama 3's divisors of the rotary frequencies, one a pair of dimensions; None without that scaling.

        Long wavelengths are slowed by ``factor``, short ones left alone, those between interpolated:
        ``_compute_llama3_parameters`` in transformers' modeling_rope_utils.py.
        """
        if self.rope["rope_type"] != "llama3":
            return None
        factor = self._rope_number("factor")
        low, high = self._rope_number("low_freq_factor"), self._rope_number("high_freq_factor")
        trained_context = self._rope_number("original_max_position_embeddings")
        dimensions = np.arange(0, self.head_dim, 2, dtype=np.float32)
        frequencies = np.float32(1) / np.float32(self._rope_number("rope_theta")) ** (dimensions / self.head_dim)
        wavelengths = np.float32(2 * math.pi) / frequencies
        smooth = (trained_context / wavelengths - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors = np.where(wavelengths < trained_context / high, 1.0, between)
        return np.where(wavelengths > trained_context / low, factor, factors).astype(np.float32)

    def _check_supported(self) -> None:
        unsupported = [
            f"{key}={self._config[key]}"
            for key, plain in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False))
            if self._config.get(key, plain) != plain
        ]
        if self.rope["rope_type"] not in ("default", "linear", "llama3"):
            unsupported.append(f"rope_type={self.rope['rope_type']}")
        if self._config.get("quantization_config"):
            method = self._config["quantization_config"].get("quant_method", "unknown")
            raise MedcotError(
                f"{self._origin} is quantized ({method}); export reads 16- and 32-bit bases. Give the unquantized one."
            )
        if unsupported:
            raise MedcotError(
                f"{self._origin} has {', '.join(unsupported)}; export writes Llama models with SiLU, no "
                "biases, and default, linear or llama3 rotary scaling."
            )

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or value <= 0:
            raise MedcotError(f"{self._origin}: {key} must be a positive integer, found {value!r}.")
        return value

    def _rope_number(self, key: str) -> float:
        value = self.rope.get(key)
        if not isinstance(value, int | float):
            raise MedcotError(f"{self._origin}: the rotary scaling lacks the number {key} (found {value!r}).")
        return float(value)


def read_architecture(base: Path) -> LlamaArchitecture:
    """The architecture that ``config.json`` names; raises MedcotError for one that export cannot write."""
    path = base / "config.json"
    if not path.is_file():
        raise MedcotError(f"{base} has no config.json: give a Hugging Face model folder.")
    config = read_json(path)
    named = config.get("architectures") or []
    if not named or named[0] not in SUPPORTED:
        found = named[0] if named else "none"
        raise MedcotError(f"{path} names the architecture {found}; export writes {', '.join(SUPPORTED)}.")
    return LlamaArchitecture(config, path)


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``."""
    merged = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = merged.get("rope_type") or merged.get("type") or "default"
    theta = merged.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {**merged, "rope_type": kind, "rope_theta": theta}


def _rotary_order(heads: int, head_dim: int) -> RowIndices:
    """Row order of q and k in GGUF: Hugging Face keeps a head's halves apart, GGUF interleaves them."""
    rows = np.arange(heads * head_dim, dtype=np.int64).reshape(heads, 2, head_dim // 2)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)
