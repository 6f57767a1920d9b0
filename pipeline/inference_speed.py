"""How long a model takes to read and to write a token under llama.cpp and transformers, on a CPU or a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.hardware import Hardware
from pipeline.model_size import ModelSize
from pipeline.speeds import (
    CPU_BYTES_PER_SECOND,
    CPU_DECODE,
    CPU_FORWARD,
    CPU_PROMPT,
    CPU_SECONDS_PER_LAYER,
    GPU_PROMPT,
    GPU_READING,
    GPU_TOGETHER,
    STEP_SECONDS,
    TRANSFORMERS_LAYER_SECONDS,
    UNPACKED_4BIT_BYTES,
    gpu_model,
)

# What bench/parallel_decoding.py and bench/engines.py take: conversations at once, and bytes for all their keys and
# values under llama.cpp.
_TOGETHER, CACHE_BYTES = 16, 1e9


@dataclass(frozen=True)
class InferenceSpeed:
    """Of one model on one machine; ``cpu_flops`` is the CPU's float32 matrix product (FLOP/s)."""

    size: ModelSize
    hardware: Hardware
    cpu_flops: float

    def prompt_seconds(self, *, on_gpu: bool = False) -> float | None:
        """A token of a prompt under llama.cpp; None for a GPU whose speed is not known."""
        if not on_gpu:
            return 2 * self.size.parameters / (self.cpu_flops * CPU_PROMPT)
        model = gpu_model(self.hardware)
        return None if model is None else 2 * self.size.parameters / (model.teraflops * 1e12 * GPU_PROMPT)

    def token_seconds(self, file_bytes: float, *, on_gpu: bool = False) -> float | None:
        """A token of one conversation under llama.cpp."""
        if not on_gpu:
            return file_bytes / CPU_BYTES_PER_SECOND + self.size.layers * CPU_SECONDS_PER_LAYER
        model = gpu_model(self.hardware)
        return None if model is None else file_bytes / (model.gigabytes * 1e9 * GPU_READING)

    def token_seconds_together(self, file_bytes: float, length: float, *, on_gpu: bool) -> float | None:
        """A token where as many conversations of ``length`` tokens are written at once as their cache holds."""
        alone, read = self.token_seconds(file_bytes, on_gpu=on_gpu), self.prompt_seconds(on_gpu=on_gpu)
        if alone is None or read is None:
            return None
        if not on_gpu:
            return min(2 * self.size.parameters / (self.cpu_flops * CPU_DECODE), alone)
        cached = 4 * self.size.layers * self.size.projections["k_proj"][1] * length
        together = max(1, min(_TOGETHER, int(CACHE_BYTES / cached)))
        return (GPU_TOGETHER * (alone + together * read) + STEP_SECONDS) / together

    def transformers_token_seconds(self, *, in_4bit: bool) -> float | None:
        """The same under transformers on the GPU, the adapter next to the weights."""
        model = gpu_model(self.hardware)
        if model is None:
            return None
        weights = self.size.linear * (UNPACKED_4BIT_BYTES if in_4bit else 2)
        weights += (self.size.parameters - self.size.linear) * 2
        step = weights / (model.gigabytes * 1e9 * GPU_READING) + self.size.layers * TRANSFORMERS_LAYER_SECONDS
        return step / _TOGETHER

    def float32_forward_seconds(self) -> float:
        """A token of a forward pass under transformers on the CPU, in 32 bit."""
        return 2 * self.size.parameters / (self.cpu_flops * CPU_FORWARD)

    def float32_token_seconds(self) -> float:
        """A token written under transformers on the CPU, in 32 bit."""
        return 4 * self.size.parameters / CPU_BYTES_PER_SECOND + self.size.layers * 5 * CPU_SECONDS_PER_LAYER
