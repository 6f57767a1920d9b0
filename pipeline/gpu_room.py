"""Whether several GGUFs fit a GPU's memory together."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.hardware import GIBIBYTE
from pipeline.platforms import nvidia_smi

# Next to each file: keys and values of some thousand tokens, and llama.cpp's buffers with the logits of 512 positions.
_NEXT_TO_A_FILE = 1.2 * GIBIBYTE
_CUDA_CONTEXT = 0.5 * GIBIBYTE


def bytes_together(file_bytes: Sequence[float]) -> float:
    """GPU memory that GGUFs of these sizes take when all are loaded with all their layers."""
    return sum(file_bytes) + len(file_bytes) * _NEXT_TO_A_FILE + _CUDA_CONTEXT


def fit_together(file_bytes: Sequence[float], gpu_memory_bytes: float) -> bool:
    return bytes_together(file_bytes) <= gpu_memory_bytes


def gpu_memory_here() -> int:
    """Bytes of the first GPU, by its driver's tool; 0 where there is none. PyTorch, asked, would keep some of them."""
    told = nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits")
    first = (told or "").strip().splitlines()[:1]
    return int(first[0]) * 1024**2 if first and first[0].strip().isdecimal() else 0
