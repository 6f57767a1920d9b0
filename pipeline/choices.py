"""What training does on this machine, each choice with its reason."""

from __future__ import annotations

import importlib.util

from pydantic import BaseModel, ConfigDict

from pipeline.batch_shares import processes_for
from pipeline.config import Config
from pipeline.estimate import Estimator
from pipeline.hardware import GIBIBYTE, Choice, Hardware

_FLASH_ATTENTION_CAPABILITY = (8, 0)


class NamedChoice(BaseModel):
    model_config = ConfigDict(frozen=True)
    name: str
    value: str
    reason: str


def training_choices(
    config: Config, hardware: Hardware, dtype: Choice, estimator: Estimator, memory_bytes: int
) -> list[NamedChoice]:
    """The choices that decide speed and memory of the training; ``memory_bytes`` is what it may take."""
    attention = _attention(hardware)
    return [
        NamedChoice(name="device", value=_device(hardware), reason=_device_reason(config, hardware)),
        NamedChoice(name="computation", value=dtype.value, reason=dtype.reason),
        _weights(config, estimator),
        NamedChoice(name="attention", value=attention.value, reason=attention.reason),
        _batch(config, estimator, memory_bytes),
        _checkpointing(estimator),
    ]


def _device(hardware: Hardware) -> str:
    return hardware.gpu_names[0] if hardware.gpu_names else f"{hardware.cpu}, {hardware.cores} cores"


def _device_reason(config: Config, hardware: Hardware) -> str:
    gpus = len(hardware.gpu_names)
    if gpus > 1:
        return f"{processes_for(config.training, gpus).value} of {gpus} GPUs train, a process each"
    return "the only GPU" if hardware.gpu_names else "there is no CUDA GPU: small models only"


def _attention(hardware: Hardware) -> Choice:
    if not hardware.gpu_names:
        return Choice("sdpa", "PyTorch's own; FlashAttention needs a CUDA GPU")
    capability = hardware.gpu_capability or (0, 0)
    if capability < _FLASH_ATTENTION_CAPABILITY:
        return Choice(
            "xformers or sdpa",
            f"FlashAttention 2 needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}; Unsloth "
            "takes xformers where it is installed",
        )
    if importlib.util.find_spec("flash_attn"):
        return Choice("flash_attention_2", "flash_attn is installed and the GPU is new enough")
    return Choice("sdpa", "flash_attn is not installed; PyTorch's own attention calls the same kernels on this GPU")


def _weights(config: Config, estimator: Estimator) -> NamedChoice:
    four, sixteen = (estimator.size.weight_bytes(in_4bit, 2) / GIBIBYTE for in_4bit in (True, False))
    value = "4 bit (NF4)" if config.model.load_in_4bit else "not quantized"
    return NamedChoice(
        name="base weights",
        value=value,
        reason=f"set by model.load_in_4bit: {four:.1f} GiB in 4 bit, {sixteen:.1f} in 16",
    )


def _batch(config: Config, estimator: Estimator, memory_bytes: int) -> NamedChoice:
    training, size = config.training, estimator.batch_size
    effective = training.effective_batch
    how = (
        "training.step_examples says"
        if training.batch_size == "auto"
        else "training.batch_size and gradient_accumulation say"
    )
    most = largest_batch(config, estimator, memory_bytes)
    fits = f"up to {most} of them fit at once" if most else "not even one fits"
    return NamedChoice(
        name="batch",
        value=f"{size} x {effective // size}",
        reason=f"{effective} examples an optimizer step, as {how}; {fits}",
    )


def largest_batch(config: Config, estimator: Estimator, memory_bytes: int) -> int:
    """The largest power of two of examples of the longest kind that should fit; 0 where none does."""
    batch, largest = 1, 0
    while batch <= 512 and estimator.training_memory.peak(batch) <= memory_bytes:
        largest, batch = batch, batch * 2
    return largest


def _checkpointing(estimator: Estimator) -> NamedChoice:
    with_it, without = (
        estimator.training_memory.activations(estimator.batch_size, checkpointing) / GIBIBYTE
        for checkpointing in (True, False)
    )
    return NamedChoice(
        name="gradient checkpointing",
        value=estimator.checkpointing.value,
        reason=f"{estimator.checkpointing.reason}; activations take {with_it:.1f} GiB with it and {without:.1f} "
        "without, and it costs a third of the speed",
    )
