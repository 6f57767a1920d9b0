"""What a training holds at its peak, on the GPU or in RAM: weights, adapter, optimizer, activations, losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.hardware import GIBIBYTE, Hardware
from pipeline.model_size import ModelSize
from pipeline.training.piecewise_loss import PIECE_POSITIONS

# CUDA's context, cuBLAS' workspace and the allocator's reserve: what is left of Unsloth's published memory table
# (docs.unsloth.ai/basics/unsloth-benchmarks) after weights, adapter and activations.
_CUDA_BYTES = 0.8 * GIBIBYTE
# Activations of one layer, per token and per unit of (hidden + feed-forward) width: the slope of the same table, at 8B
# and at 70B, where one layer at a time is recomputed. A forward pass without gradients holds one layer's as well.
_LAYER_BYTES = 11.5
# In 32 bit: the logits, their logarithms or gradients, and what is made of them.
_LOGIT_COPIES, _LOGIT_BYTES = 3, 4
_IMPORT_BYTES = 1.15 * GIBIBYTE  # PyTorch, transformers, Unsloth and TRL
_AUTO_BATCH_SHARE = 0.8  # of the memory: an estimate can be off by a quarter


@dataclass(frozen=True)
class TrainingMemory:
    """``longest``: tokens of the longest example; ``steps``: optimizer steps; ``weight_bytes``: of a loaded weight."""

    config: Config
    size: ModelSize
    hardware: Hardware
    longest: int
    steps: int
    weight_bytes: int

    def peak(self, batch_size: int) -> float:
        """Bytes at the peak, in a step or in an evaluation on the held-out records."""
        if self.hardware.device == "cuda":
            return max(self.in_step(batch_size), self.held_out(batch_size))
        # Unsloth's CPU path has all labelled logits of a step at once. The allocator keeps what steps of other lengths
        # have freed (pipeline/run.py sets it so: 8 % faster).
        logits = self._logits(batch_size * self.longest)
        kept = max(1.0, 0.35 + 0.45 * math.log(min(self.steps, 1000)))
        held_out = max(0.0, self._held_out_logits(batch_size) - logits)  # of a few evaluations: nothing is kept of them
        return self._held + kept * (self.activations(batch_size) + logits) + held_out + _IMPORT_BYTES

    def in_step(self, batch_size: int) -> float:
        """On a GPU, where Unsloth's kernels compute the loss of a step in pieces that are part of the table's slope."""
        return self._held + self.activations(batch_size) + _CUDA_BYTES

    def held_out(self, batch_size: int) -> float:
        """On a GPU, without gradients: one layer's activations, and the logits of a piece of the positions."""
        activations = self.activations(self.held_out_rows(batch_size), checkpointing=True)
        return self._held + activations + self._held_out_logits(batch_size) + _CUDA_BYTES

    def activations(self, batch_size: int, checkpointing: bool | None = None) -> float:
        """What the forward pass keeps for the backward pass: one layer with recomputation, else all."""
        recomputed = self.config.training.gradient_checkpointing if checkpointing is None else checkpointing
        layers = 1 if recomputed else self.size.layers
        return _LAYER_BYTES * (self.size.hidden + self.size.feed_forward) * batch_size * self.longest * layers

    def held_out_rows(self, batch_size: int) -> int:
        training = self.config.training
        together = training.eval_batch_size
        return min(together, batch_size) if training.batch_size == "auto" else together

    @property
    def batch_size(self) -> int:
        """Examples at once: as set, or with auto the most that should fit and that divide an optimizer step's."""
        training = self.config.training
        if training.batch_size != "auto":
            return training.batch_size
        there = _AUTO_BATCH_SHARE * (self.hardware.gpu_memory_bytes or self.hardware.available_memory_bytes)
        sizes = (size for size in range(training.effective_batch, 1, -1) if training.effective_batch % size == 0)
        return next((size for size in sizes if self.peak(size) <= there), 1)

    @property
    def moment_bytes(self) -> int:
        """Both of Adam's moments of one weight: a byte each if the optimizer is 8-bit, which it is on GPUs only."""
        return 2 if "8bit" in self.config.training.optimizer and self.hardware.device == "cuda" else 8

    @property
    def _held(self) -> float:
        """The base's weights; the adapter with gradients in 32 bit, and Adam's moments."""
        weights = self.size.weight_bytes(self.config.model.load_in_4bit, self.weight_bytes)
        return weights + self.size.trained(self.config.lora) * (4 + 4 + self.moment_bytes)

    def _logits(self, positions: int) -> float:
        return _LOGIT_COPIES * _LOGIT_BYTES * self.size.vocabulary * positions

    def _held_out_logits(self, batch_size: int) -> float:
        return self._logits(min(PIECE_POSITIONS, self.held_out_rows(batch_size) * self.longest))
