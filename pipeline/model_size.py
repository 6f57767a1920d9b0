"""How large a model is, from its config.json alone: parameters, what LoRA trains, bytes by format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import LoraConfig
from pipeline.errors import MedcotError
from pipeline.json_files import read_json

# NF4 with double quantization: 4 bits, a byte of scale per 64 weights, 4 bytes per 256 scales (QLoRA, Dettmers et
# al. 2023, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class ModelSize:
    """Counts of one model. ``linear`` are the weights of the layers' projections, ``embedding`` those of the token
    table and, where it is not the same, the output layer; norms and biases are in ``parameters`` only."""

    parameters: int
    linear: int
    embedding: int
    layers: int
    hidden: int
    feed_forward: int
    vocabulary: int
    tied: bool
    stored_in_4bit: bool
    projections: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, base: Path) -> ModelSize:
        """Read ``config.json`` of a Llama-shaped model; raises MedcotError when something is missing."""
        path = base / "config.json"
        return cls.from_config(read_json(path), path)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], origin: Path | str = "config.json") -> ModelSize:
        def number(key: str, default: int | None = None) -> int:
            value = config.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise MedcotError(f"{origin}: {key} must be a positive whole number, found {value!r}.")
            return value

        hidden, feed_forward = number("hidden_size"), number("intermediate_size")
        layers, vocabulary = number("num_hidden_layers"), number("vocab_size")
        heads = number("num_attention_heads")
        head_dim = number("head_dim", max(1, hidden // heads))
        query, key_value = heads * head_dim, number("num_key_value_heads", heads) * head_dim
        projections = {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key_value),
            "v_proj": (hidden, key_value),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, feed_forward),
            "up_proj": (hidden, feed_forward),
            "down_proj": (feed_forward, hidden),
        }
        # Qwen2 has biases on queries, keys and values whether or not its configuration says so.
        biased = config.get("attention_bias") or config.get("model_type") == "qwen2"
        biases = query + 2 * key_value if biased else 0
        tied = bool(config.get("tie_word_embeddings"))
        linear = layers * sum(rows * columns for rows, columns in projections.values())
        embedding = vocabulary * hidden * (1 if tied else 2)
        norms = layers * 2 * hidden + hidden
        quantization = config.get("quantization_config")
        return cls(
            parameters=linear + embedding + norms + layers * biases,
            linear=linear,
            embedding=embedding,
            layers=layers,
            hidden=hidden,
            feed_forward=feed_forward,
            vocabulary=vocabulary,
            tied=tied,
            stored_in_4bit=isinstance(quantization, dict) and bool(quantization.get("load_in_4bit")),
            projections=projections,
        )

    def trained(self, lora: LoraConfig) -> int:
        """Parameters of the LoRA matrices: rank x (inputs + outputs) for every target."""
        targets = [self.projections[name] for name in lora.target_modules if name in self.projections]
        return self.layers * lora.r * sum(map(sum, targets))

    def weight_bytes(self, in_4bit: bool, bytes_per_weight: float) -> float:
        """Bytes of the loaded weights; embeddings and output stay in ``bytes_per_weight`` under NF4."""
        if not in_4bit:
            return self.parameters * bytes_per_weight
        return self.linear * NF4_BYTES + (self.parameters - self.linear) * bytes_per_weight
