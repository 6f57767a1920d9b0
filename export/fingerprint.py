"""What the bytes of an export depend on, as one hash: only an export with the same hash may be gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.gguf_file import GgufPlan
from export.importance_file import ImportanceMatrix
from export.lora import CONFIG_NAME, WEIGHTS_NAME
from export.merged_weights import WeightedAdapter
from export.weights import BaseWeights
from pipeline import __version__
from pipeline.artifacts import package_versions, sha256_file, sha256_json
from pipeline.errors import MedcotError

# numpy multiplies the adapters' matrices, gguf lays out the head, llama-cpp-python brings ggml's quantizers.
_PACKAGES = ("numpy", "gguf", "llama-cpp-python")


def export_fingerprint(
    plans: Mapping[str, GgufPlan], base: Path, weights: BaseWeights, adapters: Sequence[WeightedAdapter]
) -> str:
    """SHA-256 over everything that decides a byte of the files ``plans`` (by file name).

    Local shards count by name, size and time of change, since hashing gigabytes would cost what going on saves; those
    on the hub by the commit, which names the folder ``base`` in the hub's cache. Raises MedcotError where a file
    cannot be read.
    """
    return sha256_json(
        {
            "files": {name: _planned(plan) for name, plan in plans.items()},
            "base": _base(base, weights),
            "adapters": [_adapter(adapter) for adapter in adapters],
            "versions": {"medcot": __version__, **package_versions(_PACKAGES)},
        }
    )


def model_fingerprint(base: Path, weights: BaseWeights, adapters: Sequence[WeightedAdapter]) -> str:
    """SHA-256 over what the merged weights are made of; as in ``export_fingerprint``."""
    return sha256_json({"base": _base(base, weights), "adapters": [_adapter(adapter) for adapter in adapters]})


def _planned(plan: GgufPlan) -> list[Any]:
    return [hashlib.sha256(plan.head).hexdigest(), plan.importance and _importance(plan.importance)]


def _importance(importance: ImportanceMatrix) -> str:
    digest = hashlib.sha256()
    for name, matrix in sorted(importance.matrices.items()):
        digest.update(f"{name} {matrix.tokens} ".encode())
        digest.update(matrix.square_sums.tobytes())
    return digest.hexdigest()


def _base(base: Path, weights: BaseWeights) -> dict[str, Any]:
    stored = {name: weights.stored(name) for name in weights.names}
    files = {each.path for each in stored.values()}
    try:
        return {
            "tensors": [
                [name, str(each.path).rpartition("/")[2], each.dtype, each.shape, each.begin, each.end]
                for name, each in stored.items()
            ],
            "local": sorted([path.name, *_state(path)] for path in files if isinstance(path, Path)),
            "hub": sorted([path, base.name] for path in files if isinstance(path, str)),
        }
    except OSError as error:
        raise MedcotError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _adapter(adapter: WeightedAdapter) -> list[Any]:
    try:
        hashes = [sha256_file(adapter.folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    except OSError as error:
        raise MedcotError(f"{error.filename} cannot be read: {error.strerror}.") from error
    return [*hashes, adapter.weight]
