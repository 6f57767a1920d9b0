"""A LoRA adapter (peft's files) as the changes it makes to base tensors, rows at a time.

LoRA: W' = W + scale * B A with scale = alpha / r (Hu et al. 2021, https://arxiv.org/abs/2106.09685), or
alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732). DoRA gives every output of
the sum a learned length (Liu et al. 2024, https://arxiv.org/abs/2402.09353). Names of the tensors and of the
settings: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from export.tensor_change import LowRankChange, Magnitude, Replacement, TensorChange, TokenRows, as_matrix
from export.weights import FloatRows, SafetensorsFile
from pipeline.errors import MedcotError
from pipeline.json_files import read_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of peft that change the arithmetic in ways that are not merged here; each is off in plain LoRA.
_UNSUPPORTED = (
    "use_qalora", "use_bdlora", "target_parameters", "layer_replication", "fan_in_fan_out",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
# Initialisations that leave the base weights alone; others (PiSSA, OLoRA, LoftQ, CorDA) change the base too.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_WORKS = "LoRA, rsLoRA and DoRA adapters with modules_to_save, trained tokens and added tokens"


class _Part(NamedTuple):
    """What a tensor of the file is for its module."""

    kind: str
    pattern: re.Pattern[str]


_PARTS = tuple(
    _Part(kind, re.compile(rf"(?P<module>.+?)\.{ending}"))
    for kind, ending in (
        ("a", r"lora_A\.weight"),
        ("b", r"lora_B\.weight"),
        ("bias", r"lora_B\.bias"),
        ("embedding_a", "lora_embedding_A"),
        ("embedding_b", "lora_embedding_B"),
        ("magnitude", r"lora_magnitude_vector(\.weight)?"),
        ("tokens", r"token_adapter\.trainable_tokens_delta"),
        ("underlying_weight", r"(base_layer|token_adapter\.base_layer|original_module)\.weight"),
        ("saved_weight", r"(modules_to_save\.)?weight"),
        ("saved_bias", r"(modules_to_save\.|base_layer\.)?bias"),
    )
)


class LoraAdapter:
    """All changes of one adapter, by the Hugging Face name of the base tensor they are for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = read_json(_existing(folder, CONFIG_NAME))
        _check_supported(folder, self._config)
        self._path = _existing(folder, WEIGHTS_NAME)
        self._file = SafetensorsFile(self._path)
        self.changes = self._read_changes()

    def __len__(self) -> int:
        return len(self.changes)

    @property
    def base_name(self) -> str | None:
        """The base that the adapter says it was trained on: a hub id or a folder."""
        name = self._config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def alpha(self) -> float:
        return _alpha("", self._config)

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]], resizable: frozenset[str] = frozenset()) -> None:
        """Raise MedcotError unless every change has a base tensor of its shape.

        Those in ``resizable`` may be replaced by tensors with another number of rows.
        """
        for name, change in self.changes.items():
            if name not in shapes:
                raise MedcotError(
                    f"{self.folder} is an adapter for another model: it changes {name}, which the base lacks."
                )
            wanted = as_matrix(shapes[name])
            if change.start is not None and name in resizable:
                wanted = (change.start.shape[0], wanted[1])
            trained = [(wanted[0], change.tokens.values.shape[1])] if change.tokens else []
            for shape in change.shapes + trained:
                if shape != wanted:
                    raise MedcotError(
                        f"{self.folder} is an adapter for another model: its change to {name} has shape "
                        f"{list(shape)}, the base tensor {list(wanted)}."
                    )
            if change.tokens is not None and change.tokens.indices.max() >= wanted[0]:
                raise MedcotError(
                    f"{self.folder} trains token {change.tokens.indices.max()} of {name}, which has {wanted[0]} rows."
                )

    def _read_changes(self) -> dict[str, TensorChange]:
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self._file.tensors:
            module, kind = self._part(name)
            modules[module][kind] = name
        changes: dict[str, TensorChange] = {}
        for module, parts in modules.items():
            changes |= self._module_changes(module, parts)
        if not changes:
            raise MedcotError(f"{self._path} holds no LoRA matrices: the adapter is empty.")
        return changes

    def _part(self, name: str) -> tuple[str, str]:
        for part in _PARTS:
            match = part.pattern.fullmatch(name.removeprefix(_PREFIX))
            if match is not None:
                return match["module"], part.kind
        raise MedcotError(f"{self._path} holds {name}, which is no part of what export merges: {_WORKS}.")

    def _module_changes(self, module: str, parts: Mapping[str, str]) -> dict[str, TensorChange]:
        stored = {kind: Replacement(self._file, name) for kind, name in parts.items()}
        low_rank = self._low_rank(module, parts)
        weight = TensorChange(
            underlying=stored.get("underlying_weight"),
            replacement=stored.get("saved_weight"),
            low_rank=low_rank,
            magnitude=self._magnitude(module, parts, low_rank),
            tokens=self._tokens(module, parts),
        )
        bias_change = None
        if "bias" in parts and low_rank is not None:
            # The bias of B is a second LoRA of its own: one column, scaled as the first.
            bias_change = LowRankChange(
                np.ones((1, 1), np.float32), self._values(parts["bias"]).reshape(-1, 1), low_rank.scale
            )
        bias = TensorChange(replacement=stored.get("saved_bias"), low_rank=bias_change)
        return {f"{module}.{end}": change for end, change in (("weight", weight), ("bias", bias)) if not change.empty}

    def _low_rank(self, module: str, parts: Mapping[str, str]) -> LowRankChange | None:
        is_embedding = "embedding_a" in parts or "embedding_b" in parts
        names = [parts.get(f"embedding_{side}" if is_embedding else side) for side in "ab"]
        if names == [None, None]:
            return None
        matrices = [self._values(name, dimensions=2) for name in names if name is not None]
        if len(matrices) != 2 or matrices[0].shape[0] != matrices[1].shape[1]:
            raise MedcotError(f"{self._path}: the two LoRA matrices of {module} are not both there with one rank.")
        a, b = matrices
        scale = _scale(module, a.shape[0], self._config)
        # peft keeps an embedding's matrices for W^T: A is [r, tokens], B [columns, r].
        return (
            LowRankChange(np.ascontiguousarray(b.T), np.ascontiguousarray(a.T), scale)
            if is_embedding
            else (LowRankChange(a, b, scale))
        )

    def _magnitude(self, module: str, parts: Mapping[str, str], low_rank: LowRankChange | None) -> Magnitude | None:
        if "magnitude" not in parts:
            if self._config.get("use_dora") and low_rank is not None:
                raise MedcotError(f"{self._path} lacks the DoRA magnitudes of {module}: save the adapter again.")
            return None
        values = self._values(parts["magnitude"]).reshape(-1)
        of_columns = "embedding_a" in parts
        if low_rank is None or values.shape[0] != low_rank.shape[1 if of_columns else 0]:
            raise MedcotError(f"{self._path}: the {values.shape[0]} DoRA magnitudes of {module} fit no LoRA matrices.")
        return Magnitude(values, of_columns)

    def _tokens(self, module: str, parts: Mapping[str, str]) -> TokenRows | None:
        if "tokens" not in parts:
            return None
        values = self._values(parts["tokens"], dimensions=2)
        chosen = self._config.get("trainable_token_indices")
        if isinstance(chosen, dict):
            # The output that is tied to an embedding has its rows, under a name that is not in the settings.
            by_name = [ids for key, ids in chosen.items() if f".{module}".endswith(f".{key}")]
            chosen = next(iter(by_name or chosen.values()), None)
        known = isinstance(chosen, list) and all(isinstance(each, int) and each >= 0 for each in chosen)
        if not known or not chosen or len(chosen) != values.shape[0]:
            raise MedcotError(
                f"{self._path} holds {values.shape[0]} trained tokens of {module}, {CONFIG_NAME} does not say which "
                "(trainable_token_indices)."
            )
        return TokenRows(np.asarray(chosen, dtype=np.int64), values)

    def _values(self, name: str, dimensions: int | None = None) -> FloatRows:
        """A whole small tensor, in its shape."""
        shape = self._file.tensors[name].shape
        if dimensions not in (None, len(shape)):
            raise MedcotError(f"{self._path}: {name} has shape {list(shape)}, not that of a matrix.")
        values = self._file.rows(name, slice(None)).reshape(shape)
        if not np.isfinite(values).all():
            raise MedcotError(f"{self._path}: {name} holds NaN or infinite values; the training that made it diverged.")
        return values


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").is_file():
        raise MedcotError(
            f"{folder} holds its adapter as adapter_model.bin; export reads safetensors: load it with "
            "PeftModel.from_pretrained and save it with save_pretrained."
        )
    raise MedcotError(f"{folder} holds no {name}: give the folder of a LoRA adapter saved by peft.")


def _check_supported(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise MedcotError(f"{folder} is a {config.get('peft_type')} adapter; export merges {_WORKS}.")
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("init_lora_weights") not in _PLAIN_INITIALISATIONS:
        used.append(f"init_lora_weights={config['init_lora_weights']}")
    if used:
        raise MedcotError(
            f"{folder} uses {', '.join(used)}; export merges {_WORKS}. "
            "Merge it with peft's merge_and_unload and export the result as a base."
        )


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    return _alpha(module, config) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _alpha(module: str, config: Mapping[str, Any]) -> float:
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    try:
        # peft's rule: the pattern matches the end of the module's name, from a dot on; the first one counts.
        alpha = next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), alpha)
    except (AttributeError, re.error) as error:
        raise MedcotError(f"alpha_pattern in {CONFIG_NAME} is not one of peft's ({error}).") from error
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise MedcotError(f"{CONFIG_NAME} names no lora_alpha (found {alpha!r}): the adapter's scale is unknown.")
    return float(alpha)
