"""A smaller and older GPU, emulated on the one that is here, for the PyTorch of this process.

Emulated: what libraries ask PyTorch before they decide (compute capability, bfloat16, total memory), how much memory
PyTorch's allocator gives out, and which of PyTorch's attention kernels there are. Not emulated: speed, memory outside
PyTorch's allocator, and machine code for the older architecture (a kernel is compiled for the GPU that runs it).
Without a GPU nothing is changed.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.machines import MACHINES


class Card(BaseModel):
    """Sizes in bytes: ``total_bytes`` is what the GPU reports, ``usable_bytes`` what PyTorch may take of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    total_bytes: int
    usable_bytes: int
    capability: tuple[int, int]


# CUDA's own context takes what PyTorch may not.
T4 = Card(total_bytes=MACHINES["kaggle-t4"].gpu_memory_bytes, usable_bytes=15_000_000_000, capability=(7, 5))
EIGHT_GB = Card(total_bytes=8 * 2**30, usable_bytes=8_000_000_000, capability=(8, 6))
# A GPU on which another program holds two thirds of the memory: what fits by the card's size does not.
EIGHT_OF_24_GB = Card(total_bytes=24 * 2**30, usable_bytes=8_000_000_000, capability=(8, 6))


def report_as(card: Card) -> None:
    """Called before Unsloth is imported, which chooses its types and kernels while it is imported."""
    import torch

    if not torch.cuda.is_available():
        return
    properties = torch.cuda.get_device_properties
    torch.cuda.get_device_properties = lambda device=None: _Properties(properties(device), card.total_bytes)
    torch.cuda.get_device_capability = lambda device=None: card.capability
    if card.capability < (8, 0):
        torch.cuda.is_bf16_supported = lambda including_emulation=True: False


def confine_to(card: Card) -> None:
    """Called after Unsloth is imported, which configures the allocator, and before anything is on the GPU."""
    import torch
    from torch._dynamo.device_interface import CudaInterface

    if not torch.cuda.is_available():
        return
    real = torch.cuda.get_device_properties(0).real
    torch.cuda.set_per_process_memory_fraction(min(1.0, card.usable_bytes / real.total_memory))
    # torch.compile generates machine code for what this answers, and that code has to run here.
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: real.major * 10 + real.minor)
    if card.capability < (8, 0):
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)


class _Properties:
    """A GPU's ``real`` properties as PyTorch gives them, but for the total memory (bytes)."""

    def __init__(self, real: Any, total_memory: int) -> None:
        self.real, self.total_memory = real, total_memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)
