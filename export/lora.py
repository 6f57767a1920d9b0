"""A LoRA adapter (peft's files) as the change it makes to one base tensor, rows at a time.

LoRA: W' = W + scale * B A with scale = alpha / r (Hu et al. 2021, https://arxiv.org/abs/2106.09685), or
alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.weights import FloatRows, RowIndices, SafetensorsFile, read_json
from pipeline.errors import MedcotError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Settings of peft that change the arithmetic in ways that are not merged here; each is off in plain LoRA.
_UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "modules_to_save", "trainable_token_indices", "target_parameters",
    "layer_replication", "lora_bias", "fan_in_fan_out", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
# Initialisations that leave the base weights alone; others (PiSSA, OLoRA, LoftQ, CorDA) change the base too.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRankChange:
    """``scale * B A`` for one base tensor: A is [r, columns], B is [rows, r]."""

    a: FloatRows
    b: FloatRows
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def rows(self, rows: RowIndices | slice) -> FloatRows:
        """The chosen rows of the change, float32 [n, columns]."""
        change = self.b[rows] @ self.a
        change *= np.float32(self.scale)
        return change


class LoraAdapter:
    """All changes of one adapter, by the Hugging Face name of the base tensor they are for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = read_json(_existing(folder, CONFIG_NAME))
        _check_supported(folder, config)
        self.changes = _read_changes(_existing(folder, WEIGHTS_NAME), config)

    def __len__(self) -> int:
        return len(self.changes)

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise MedcotError unless every change has a base tensor of its shape."""
        for name, change in self.changes.items():
            if name not in shapes:
                raise MedcotError(
                    f"{self.folder} is an adapter for another model: it changes {name}, which the base lacks."
                )
            if change.shape != shapes[name]:
                raise MedcotError(
                    f"{self.folder} is an adapter for another model: its change to {name} has shape "
                    f"{list(change.shape)}, the base tensor {list(shapes[name])}."
                )


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise MedcotError(f"{folder} holds no {name}: give the folder of a LoRA adapter saved by peft.")
    return path


def _check_supported(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise MedcotError(f"{folder} is a {config.get('peft_type')} adapter; export merges LoRA adapters.")
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append(f"bias={config['bias']}")
    if config.get("init_lora_weights") not in _PLAIN_INITIALISATIONS:
        used.append(f"init_lora_weights={config['init_lora_weights']}")
    if used:
        raise MedcotError(
            f"{folder} uses {', '.join(used)}; export merges plain LoRA and rsLoRA adapters of linear "
            "layers. Merge it with peft's merge_and_unload and export the result as a base."
        )


def _read_changes(path: Path, config: Mapping[str, Any]) -> dict[str, LowRankChange]:
    file = SafetensorsFile(path)
    matrices: dict[str, dict[str, FloatRows]] = {}
    for name in file.tensors:
        match = _MATRIX.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            raise MedcotError(
                f"{path} holds {name}, which is no LoRA matrix of a linear layer; export merges plain LoRA "
                "and rsLoRA adapters of linear layers."
            )
        values = file.rows(name, slice(None))
        if not np.isfinite(values).all():
            raise MedcotError(f"{path}: {name} holds NaN or infinite values; the training that made it diverged.")
        matrices.setdefault(match["module"], {})[match["side"]] = values
    changes = {}
    for module, sides in matrices.items():
        if set(sides) != {"A", "B"} or sides["A"].shape[0] != sides["B"].shape[1]:
            raise MedcotError(f"{path}: the two LoRA matrices of {module} are not both there with one rank.")
        scale = _scale(module, sides["A"].shape[0], config)
        changes[f"{module}.weight"] = LowRankChange(sides["A"], sides["B"], scale)
    if not changes:
        raise MedcotError(f"{path} holds no LoRA matrices: the adapter is empty.")
    return changes


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # peft's rule: the pattern matches the end of the module's name, from a dot on.
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    if not isinstance(alpha, int | float):
        raise MedcotError(f"{CONFIG_NAME} names no lora_alpha (found {alpha!r}): the adapter's scale is unknown.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
