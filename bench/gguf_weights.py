"""What a GGUF's tensors take: bits per weight, and the bytes that generation reads for every token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.errors import MedcotError

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class GgufWeights:
    """``bytes_per_token``: all weights but an embedding that is not the output matrix too, of which one row is read."""

    bits_per_weight: float
    bytes_per_token: int


def is_model(path: Path) -> bool:
    """False for the other things that GGUFs hold: adapters, importance matrices. Of a damaged file loading tells."""
    import gguf

    try:
        kind = gguf.GGUFReader(path).fields.get(gguf.Keys.General.TYPE)
    except (ValueError, IndexError, OSError):
        return True
    return kind is None or kind.contents() == gguf.GGUFType.MODEL


@cache
def weights_of(path: Path) -> GgufWeights:
    """Raises MedcotError for a file that is not a whole GGUF."""
    import gguf

    from export.gguf_model import check_is_gguf

    check_is_gguf(path)
    try:
        tensors = gguf.GGUFReader(path).tensors
    except (ValueError, IndexError, OSError) as error:
        raise MedcotError(f"{path} is truncated or damaged ({error}): download or export it again.") from error
    if not tensors:
        raise MedcotError(f"{path} holds no tensors: it is a vocabulary, not a model.")
    size = {tensor.name: int(tensor.n_bytes) for tensor in tensors}
    weights = sum(math.prod(map(int, tensor.shape)) for tensor in tensors)
    unread = size.get(_EMBEDDING, 0) if _OUTPUT in size else 0
    return GgufWeights(8 * sum(size.values()) / weights, sum(size.values()) - unread)
