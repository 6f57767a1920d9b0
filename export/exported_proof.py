"""Verification right after an export, where it is possible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from export.merged_weights import WeightedAdapter
from export.weights import BaseWeights
from pipeline.config import VerifyConfig
from pipeline.results import ExportedModels, Verification


def why_not_verifiable(adapters: Sequence[WeightedAdapter], weights: BaseWeights) -> str | None:
    """The sentence that says why the reference cannot be made; None where it can."""
    if len(adapters) > 1 or any(adapter.weight != 1.0 for adapter in adapters):
        return "Not verified: the reference takes one adapter with weight 1, not a combination."
    if any(not isinstance(weights.stored(name).path, Path) for name in weights.names):
        return (
            f"Not verified: the weights of {weights.origin} went by shard after shard, and the reference needs all of "
            "them on this disk; download the base and run medcot verify."
        )
    return None


def verify_written(
    exported: ExportedModels, folder: Path, base: Path, adapters: Sequence[WeightedAdapter]
) -> Verification:
    """Every written file against ``base`` and its adapter, on the packaged cases."""
    from export.verify import verify_exported
    from pipeline.sources import sample_examples

    settings = VerifyConfig.model_validate({})
    adapter = adapters[0].folder if adapters else None
    return verify_exported(folder, exported, base, adapter, sample_examples(settings.prompts), settings)
