"""A quantized file's weights against those of the most exact file of the same export, tensor by tensor.

What logits show of one damaged tensor depends on the model and drowns in the error of a coarse type; the error of the
tensor itself does not: it is a property of its ggml type, within narrow bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

_SAMPLED_WEIGHTS = 1 << 18  # of each tensor, in whole rows from its first to its last

# Largest error of a tensor, |a - b| / |a|, by type. About three times the largest of all of SmolLM2's tensors, which
# stands behind each (LOG.md); one that is zeroed has 1, one of another model about 1.4.
_LIMITS = {
    T.F32: 1e-6,
    T.F16: 1e-3,  # 0.0002
    T.BF16: 6e-3,  # 0.0017
    T.Q8_0: 0.02,  # 0.0064
    T.Q6_K: 0.06,  # 0.019
    T.Q5_K: 0.12,  # 0.033
    T.Q5_0: 0.16,  # 0.051
    T.Q5_1: 0.16,  # 0.052
    T.Q4_K: 0.25,  # 0.047; 0.07 for normally distributed weights
    T.IQ4_XS: 0.25,  # 0.080
    T.IQ4_NL: 0.25,  # 0.085
    T.Q4_0: 0.3,  # 0.102
    T.Q4_1: 0.3,
    T.Q3_K: 0.45,  # 0.159
}
_COARSEST_LIMIT = 0.8  # Q2_K: about 0.3 for normally distributed weights


@dataclass(frozen=True)
class TensorErrors:
    """``worst`` is the tensor with the largest share of its limit, ``error`` its |a - b| / |a|.

    ``fault`` is a sentence about the first tensor that is wrong, if any.
    """

    tensors: int
    worst: str
    error: float
    fault: str | None


def compare_tensors(exact: Path, other: Path) -> TensorErrors:
    """Compare every tensor of ``other`` with the one of that name in ``exact``, on rows spread over the tensor."""
    references = {tensor.name: tensor for tensor in GGUFReader(exact).tensors}
    tensors = {tensor.name: tensor for tensor in GGUFReader(other).tensors}
    if differing := sorted(references.keys() ^ tensors.keys()):
        return TensorErrors(len(tensors), "", 0.0, f"{differing[0]} is in one of the files only")
    worst, worst_share, worst_error, fault = "", -1.0, 0.0, None
    for name, reference in references.items():
        tensor = tensors[name]
        if tensor.shape.tolist() != reference.shape.tolist():
            return TensorErrors(len(tensors), name, 0.0, f"{name} has shape {tensor.shape.tolist()[::-1]}")
        error, limit = _error(reference, tensor), _limit(reference) + _limit(tensor)
        if not error <= limit and fault is None:
            fault = f"{name} ({tensor.tensor_type.name}) differs by {error:.3g} of its size, limit {limit:.3g}"
        if error / limit > worst_share:
            worst, worst_share, worst_error = f"{name} ({tensor.tensor_type.name})", error / limit, error
    return TensorErrors(len(tensors), worst, worst_error, fault)


def _limit(tensor: ReaderTensor) -> float:
    return _LIMITS.get(tensor.tensor_type, _COARSEST_LIMIT)


def _error(reference: ReaderTensor, tensor: ReaderTensor) -> float:
    expected, found = _sample(reference), _sample(tensor)
    size = float(np.square(expected).sum())
    difference = float(np.square(expected - found).sum())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float(np.sqrt(difference / size))


def _sample(tensor: ReaderTensor) -> npt.NDArray[np.float64]:
    data = tensor.data if tensor.data.ndim > 1 else tensor.data[None]
    columns = int(tensor.shape[0])
    count = min(len(data), max(1, _SAMPLED_WEIGHTS // columns))
    rows = np.linspace(0, len(data) - 1, count).astype(np.int64)
    return dequantize(np.ascontiguousarray(data[rows]), tensor.tensor_type).astype(np.float64)
