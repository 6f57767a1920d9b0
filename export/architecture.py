"""What a Hugging Face model is in GGUF: its tensors under their GGUF names, its hyperparameters as metadata.

All architectures here are the same dense decoder; a subclass says in what it differs. Follows llama.cpp's
converter (``conversion/base.py``, ``llama.py``, ``qwen.py``) and the key names of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import gguf
import numpy as np

from export.quant_types import ModelShape
from export.weights import FloatRows, RowIndices, check_quantization
from pipeline.errors import MedcotError
from pipeline.json_files import read_json

# Tensors that some checkpoints carry and no model reads.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
# The numbers that each kind of rotary scaling needs, beside the base of its frequencies.
_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


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


class Architecture:
    """A decoder of Llama's kind: RMS norms, rotary positions, grouped attention, gated SiLU feed-forward."""

    name: ClassVar[str]
    hf_name: ClassVar[str]
    tensor_names: ClassVar[gguf.MODEL_ARCH]
    # llama.cpp turns neighbouring dimensions (2i, 2i+1) by one angle in these models; Hugging Face, and llama.cpp
    # in the others, dimensions i and i + head_dim / 2.
    interleaves_rotary: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any], origin: Path) -> None:
        self.config = config
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
        return ModelShape(self.layers, self.heads, self.kv_heads, self.tied, self.name)

    @property
    def biased(self) -> frozenset[str]:
        """The projections that have a bias, by the last part of their Hugging Face name."""
        return frozenset()

    @property
    def remarks(self) -> list[str]:
        """What llama.cpp does otherwise than transformers with this model; sentences for the user."""
        return []

    def resized(self, vocabulary: int, tied: bool) -> Self:
        """The same model with another number of tokens, or with embeddings that are tied no more."""
        return type(self)({**self.config, "vocab_size": vocabulary, "tie_word_embeddings": tied}, self._origin)

    def tensors(self) -> list[ModelTensor]:
        """All tensors in the order in which checkpoints store them, so that shards are read in turn."""
        names = gguf.get_tensor_name_map(self.tensor_names, self.layers)
        tensors = []
        factors = self._rope_factors()
        if factors is not None:
            tensors.append(ModelTensor("rope_freqs.weight", factors.shape, values=factors))
        for source, shape, order in self._sources():
            name = names.get_name(source, try_suffixes=(".weight", ".bias"))
            assert name is not None, source
            tensors.append(ModelTensor(name, shape, source, order))
        return tensors

    def unknown(self, stored: set[str]) -> list[str]:
        """Tensors of the checkpoint that this architecture has no place for; none is lost in silence."""
        known = {source for source, _, _ in self._sources()} | ({OUTPUT} if self.tied else set())
        return sorted(name for name in stored - known if not name.endswith(_IGNORED_SUFFIXES))

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.feed_forward)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        self._add_rope_metadata(writer)
        writer.add_layer_norm_rms_eps(float(self.config.get("rms_norm_eps", 1e-6)))
        if self.config.get("head_dim") is not None:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)

    def _add_rope_metadata(self, writer: gguf.GGUFWriter) -> None:
        kind = self.rope["rope_type"]
        if kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(self._rope_number("factor"))
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(int(self._rope_number("original_max_position_embeddings")))
            for key, add in (
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ):
                if self.rope.get(key) is not None:
                    add(self._rope_number(key))
        writer.add_rope_freq_base(self._rope_number("rope_theta"))

    def _sources(self) -> list[tuple[str, tuple[int, ...], RowIndices | None]]:
        """Hugging Face name, shape and row order of every tensor."""
        sources: list[tuple[str, tuple[int, ...], RowIndices | None]] = [
            (EMBEDDING, (self.vocabulary, self.hidden), None)
        ]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for module, shape, order in self._projections():
                sources.append((f"{prefix}.{module}.weight", shape, order))
                if module.rpartition(".")[2] in self.biased:
                    sources.append((f"{prefix}.{module}.bias", shape[:1], order))
            sources += [
                (f"{prefix}.input_layernorm.weight", (self.hidden,), None),
                (f"{prefix}.post_attention_layernorm.weight", (self.hidden,), None),
            ]
        sources.append(("model.norm.weight", (self.hidden,), None))
        if not self.tied:
            sources.append((OUTPUT, (self.vocabulary, self.hidden), None))
        return sources

    def _projections(self) -> list[tuple[str, tuple[int, int], RowIndices | None]]:
        """The matrices of a layer: name in the layer, shape, row order."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        query_order = _rotary_order(self.heads, self.head_dim) if self.interleaves_rotary else None
        key_order = _rotary_order(self.kv_heads, self.head_dim) if self.interleaves_rotary else None
        return [
            ("self_attn.q_proj", (queries, self.hidden), query_order),
            ("self_attn.k_proj", (keys, self.hidden), key_order),
            ("self_attn.v_proj", (keys, self.hidden), None),
            ("self_attn.o_proj", (self.hidden, queries), None),
            ("mlp.gate_proj", (self.feed_forward, self.hidden), None),
            ("mlp.up_proj", (self.feed_forward, self.hidden), None),
            ("mlp.down_proj", (self.hidden, self.feed_forward), None),
        ]

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

    def _rope_types(self) -> tuple[str, ...]:
        return tuple(_ROPE_NUMBERS)

    def _unsupported(self) -> list[str]:
        """Settings that llama.cpp has no counterpart for in this architecture."""
        found = []
        if self.config.get("hidden_act", "silu") != "silu":
            found.append(f"hidden_act={self.config['hidden_act']}")
        if self.rope["rope_type"] not in self._rope_types():
            found.append(f"rope_type={self.rope['rope_type']}")
        # llama.cpp derives these from the factor; another value would be lost.
        found += [
            f"{key}={self.rope[key]}"
            for key in ("attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor")
            if self.rope.get(key) not in (None, 1.0)
        ]
        return found

    def _check_supported(self) -> None:
        check_quantization(self.config, self._origin)
        unsupported = self._unsupported()
        if unsupported:
            raise MedcotError(
                f"{self._origin} has {', '.join(unsupported)}; export writes {self.hf_name} with SiLU and "
                f"{', '.join(self._rope_types())} rotary scaling, as llama.cpp knows it."
            )
        for key in ("rope_theta", *_ROPE_NUMBERS[self.rope["rope_type"]]):
            self._rope_number(key)
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise MedcotError(
                f"{self._origin}: {self.heads} heads of {self.head_dim} dimensions cannot share {self.kv_heads} "
                "key-value heads: the number of heads must be a multiple of theirs, the dimensions even."
            )

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or value <= 0:
            raise MedcotError(f"{self._origin}: {key} must be a positive integer, found {value!r}.")
        return value

    def _rope_number(self, key: str) -> float:
        value = self.rope.get(key)
        if not isinstance(value, int | float):
            raise MedcotError(f"{self._origin}: the rotary scaling lacks the number {key} (found {value!r}).")
        return float(value)


class LlamaArchitecture(Architecture):
    """Llama 2 and 3, R1-Distill-Llama, TinyLlama, SmolLM2; some relatives have biases."""

    name = "llama"
    hf_name = "LlamaForCausalLM"
    tensor_names = gguf.MODEL_ARCH.LLAMA

    @property
    def biased(self) -> frozenset[str]:
        attention = _ATTENTION if self.config.get("attention_bias") else ()
        return frozenset(attention) | frozenset(_FEED_FORWARD if self.config.get("mlp_bias") else ())

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        super().add_metadata(writer)
        writer.add_vocab_size(self.vocabulary)
        writer.add_rope_dimension_count(self.head_dim)


class MistralArchitecture(LlamaArchitecture):
    """Mistral: to llama.cpp a Llama without biases. Its sliding window is not applied there."""

    hf_name = "MistralForCausalLM"

    @property
    def biased(self) -> frozenset[str]:
        return frozenset()

    @property
    def remarks(self) -> list[str]:
        return _sliding_window_remarks(self.config.get("sliding_window"), self.context)


class Qwen2Architecture(Architecture):
    """Qwen2, Qwen2.5 and R1-Distill-Qwen: biases on queries, keys and values; halves of a head turn together."""

    name = "qwen2"
    hf_name = "Qwen2ForCausalLM"
    tensor_names = gguf.MODEL_ARCH.QWEN2
    interleaves_rotary = False

    @property
    def biased(self) -> frozenset[str]:
        return frozenset(("q_proj", "k_proj", "v_proj"))

    @property
    def remarks(self) -> list[str]:
        window = self.config.get("sliding_window") if self.config.get("use_sliding_window") else None
        return _sliding_window_remarks(window, self.context)

    def _rope_types(self) -> tuple[str, ...]:
        return ("default", "linear", "yarn")

    def _unsupported(self) -> list[str]:
        # llama.cpp takes hidden_size for the width of the queries in this architecture.
        other_width = self.heads * self.head_dim != self.hidden
        return super()._unsupported() + ([f"head_dim={self.head_dim}"] if other_width else [])


ARCHITECTURES: tuple[type[Architecture], ...] = (LlamaArchitecture, Qwen2Architecture, MistralArchitecture)


def read_architecture(base: Path) -> Architecture:
    """The architecture that ``config.json`` names; raises MedcotError for one that export cannot write."""
    path = base / "config.json"
    if not path.is_file():
        raise MedcotError(f"{base} has no config.json: give a Hugging Face model folder.")
    config = read_json(path)
    named = (config.get("architectures") or ["none"])[0]
    for architecture in ARCHITECTURES:
        if architecture.hf_name == named:
            return architecture(config, path)
    known = ", ".join(architecture.hf_name for architecture in ARCHITECTURES)
    raise MedcotError(f"{path} names the architecture {named}; export writes {known}.")


def _sliding_window_remarks(window: Any, context: int) -> list[str]:
    if not isinstance(window, int) or window >= context:
        return []
    return [
        f"The model attends to the last {window} tokens only, llama.cpp to all: beyond {window} tokens of context "
        "the GGUF is not the trained model."
    ]


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
