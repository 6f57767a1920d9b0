"""What export would refuse, told before training: called by ``pipeline/feasibility.py``, named in the stage table."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from export.architecture import Architecture, read_architecture
from export.checkpoint_match import check_tensors
from export.checkpoint_shards import INDEX_NAME, SINGLE_NAME
from export.importance_file import AUTO, NONE, read_importance
from export.quant_types import file_type
from export.tokenizer_metadata import read_vocabulary
from export.weights import BaseWeights
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.feasibility import Preview, refusal_of


def export_problems(preview: Preview) -> list[str]:
    """Sentences about types, architecture, rotary scaling, tokenizer, template, local weights, importance matrix."""
    config, base = preview.config, preview.base
    found = [each for name in config.export.quantizations for each in refusal_of(partial(file_type, name))]
    try:
        architecture = read_architecture(base)
    except MedcotError as error:
        return [*found, str(error).removesuffix(".")]
    found += refusal_of(lambda: read_vocabulary(base, architecture.vocabulary))
    if any((base / name).is_file() for name in (INDEX_NAME, SINGLE_NAME)) and Path(config.model.base).is_dir():
        found += refusal_of(lambda: _check_weights(base, architecture))
    return found + refusal_of(lambda: _check_importance(config, architecture))


def _check_weights(base: Path, architecture: Architecture) -> None:
    """Headers only."""
    with BaseWeights(base) as weights:
        check_tensors(architecture, weights)


def _check_importance(config: Config, architecture: Architecture) -> None:
    if config.export.imatrix not in (AUTO, NONE):
        importance = read_importance(Path(config.export.imatrix))
        importance.check_fits({tensor.name: tensor.shape for tensor in architecture.tensors()})
