"""What each stage of a run will take: seconds, memory, GPU memory, disk. Estimates, with their constants' sources.

Times follow from the work (floating-point operations, bytes, tokens) and the machine's measured or published speed;
``tests/perf/plan_accuracy.py`` compares them with runs, and ``tests/test_estimate.py`` with recorded and published
figures. Memory is what a process holds at its peak, mapped files included.
"""

from __future__ import annotations

import math
import time

from pydantic import BaseModel, ConfigDict

from pipeline.batch_shares import processes_for
from pipeline.checkpoints import KEPT
from pipeline.config import Config
from pipeline.gradient_checkpointing import checkpointing_choice, with_checkpointing
from pipeline.hardware import GIBIBYTE, MEBIBYTE, Hardware
from pipeline.model_size import ModelSize

# Dense tensor-core TFLOP/s in 16 bit, from NVIDIA's data sheets (the P100 has no tensor cores).
_GPU_TERAFLOPS = {
    "T4": 65, "P100": 18.7, "V100": 112, "A10G": 70, "A10": 125, "L4": 121, "L40": 181, "A100": 312, "H100": 989,
    "H200": 989, "RTX 3060": 51, "RTX 3090": 71, "RTX 4060": 60, "RTX 4090": 165, "RTX 5090": 210,
}  # fmt: skip
# Share of those that LoRA training reaches. Held against the TinyLlama project's published 17.6 minutes on a T4.
_GPU_SHARE = 0.10
# Of this CPU's float32 matrix product (measured when planning), what training, a forward pass in float32, and
# llama.cpp's prompt processing and parallel decoding reach. Fitted to the default run (LOG.md, 2026-11-22).
_CPU_TRAINING, _CPU_FORWARD, _CPU_PROMPT, _CPU_DECODE = 0.52, 0.8, 0.45, 0.18
# llama.cpp reads all weights for each token of a single conversation, at about this rate, and needs as long again for
# each layer's start and end.
_MEMORY_BYTES_PER_SECOND, _SECONDS_PER_LAYER = 12e9, 0.27e-3
# Weights a second and core that export reads, merges and quantizes, in AVX-512 (LOG.md, 2026-11-22).
_QUANTIZED_PER_SECOND_AND_CORE = {"K": 40e6, "legacy": 40e6, "copy": 150e6}
_QUANTIZED_WITH_IMATRIX = {"K": 30e6, "legacy": 60e6, "copy": 150e6}
# Python, numba, the tokenizer and the few megabytes of weights under way, without the adapter (LOG.md, 2026-11-22).
_EXPORT_BYTES = 0.3 * GIBIBYTE
# llama.cpp while it measures the importance matrix, beside the mapped file.
_MEASURING_BYTES = 0.55 * GIBIBYTE
_REFERENCE_QUESTIONS = 3  # that every evaluation asks (bench/held_out.py)
# Starting Python and importing: PyTorch and transformers; with Unsloth and TRL on top.
_IMPORT_SECONDS, _IMPORT_TRAINING_SECONDS = 8.0, 20.0
_IMPORT_BYTES, _IMPORT_TRAINING_BYTES = 0.62 * GIBIBYTE, 1.15 * GIBIBYTE
# CUDA's context, cuBLAS' workspace and the allocator's reserve: what is left of Unsloth's published memory table
# (docs.unsloth.ai/basics/unsloth-benchmarks) after weights, adapter and activations.
_CUDA_BYTES = 0.8 * GIBIBYTE
# In RAM beside a GPU: CUDA's libraries, and a shard of the base while it is loaded.
_CUDA_HOST_BYTES = 5 * GIBIBYTE
# Activations of the one layer that is recomputed at a time, per token and per unit of (hidden + feed-forward) width:
# the slope of the same table, at 8B and at 70B.
_LAYER_BYTES = 11.5
_DOWNLOAD_BYTES_PER_SECOND = 50e6
_IMATRIX_TOKENS = 2048  # that an importance matrix is measured on (export/importance.py)
# Verify loads every file and asks it for the vocabulary and the templates.
_VERIFY_SECONDS, _VERIFY_SECONDS_PER_FILE = 12.0, 10.0
# Of bench: the question that is answered in it, and softmax and divergence of one logit.
_BENCH_QUESTION_TOKENS, _SECONDS_PER_COMPARED_LOGIT = 80, 15e-9
_AUTO_BATCH_SHARE = 0.8  # of the memory: an estimate can be off by a quarter
# Tokenizer libraries without a model, and a vocabulary's entry in them.
_PREPARE_BYTES, _TOKEN_BYTES = 0.35 * GIBIBYTE, 1500

UNQUANTIZED = ("F32", "F16", "BF16")


class Workload(BaseModel):
    """What the data ask for. Tokens are per example, prompt and completion."""

    model_config = ConfigDict(frozen=True)
    rows: int
    train_rows: int
    eval_rows: int
    mean_tokens: float
    mean_completion_tokens: float
    longest_tokens: int
    share_with_options: float = 0.0


class StageEstimate(BaseModel):
    """``seconds`` is None where the GPU's speed is not known; ``disk_bytes`` stays, ``cache_bytes`` is downloaded.

    ``mapped_bytes`` of the memory are a mapped file, which the system takes back when it needs the room.
    """

    model_config = ConfigDict(frozen=True)
    stage: str
    seconds: float | None
    memory_bytes: int
    mapped_bytes: int = 0
    gpu_memory_bytes: int = 0
    disk_bytes: int = 0
    cache_bytes: int = 0


def measure_cpu_gflops(seconds: float = 0.4) -> float:
    """GFLOP/s of NumPy's float32 matrix product on all cores: how fast this CPU is today."""
    import numpy as np

    a = np.ones((1024, 1024), dtype=np.float32)
    a @ a  # starts the threads
    started, products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        a @ a
        products += 1
    return products * 2 * 1024**3 / elapsed / 1e9


def gpu_teraflops(hardware: Hardware) -> float | None:
    """Published 16-bit TFLOP/s of the (first) GPU; None for one that is not in the table."""
    name = hardware.gpu_names[0] if hardware.gpu_names else ""
    known = [model for model in _GPU_TERAFLOPS if model in name]
    return _GPU_TERAFLOPS[max(known, key=len)] if known else None


def steps_of(config: Config, train_rows: int) -> int:
    """Optimizer steps of the training: max_steps, or as many as the epochs make."""
    training = config.training
    return training.max_steps or math.ceil(training.epochs * math.ceil(train_rows / training.effective_batch))


class Estimator:
    """Estimates for one configuration on one machine. ``cpu_gflops`` is what ``measure_cpu_gflops`` gives there."""

    def __init__(
        self,
        config: Config,
        size: ModelSize,
        work: Workload,
        hardware: Hardware,
        cpu_gflops: float,
        dtype: str,
        *,
        base_is_here: bool,
    ) -> None:
        self.size = size
        self.work = work
        self.hardware = hardware
        self.cpu_flops = cpu_gflops * 1e9
        self.bytes_per_weight = 4 if dtype == "float32" else 2
        self.base_is_here = base_is_here

        def peak(each: Config) -> float:
            self.config = each
            return self.training_bytes(self.batch_size)

        there = hardware.gpu_memory_bytes or hardware.available_memory_bytes
        self.checkpointing = checkpointing_choice(config, peak, there)
        self.config = with_checkpointing(config, self.checkpointing.value == "on")

    def stages(self) -> list[StageEstimate]:
        return [
            self.prepare(),
            self.train(),
            self.export(),
            self.verify(),
            self.evaluate(),
            self.bench(),
            self.report(),
        ]

    def prepare(self) -> StageEstimate:
        per_row = 1.5e-3 + self.work.mean_tokens * 4e-6
        text = int(self.work.rows * self.work.mean_tokens * 5)  # bytes: about four letters a token, and JSON
        return StageEstimate(
            stage="prepare",
            seconds=_IMPORT_SECONDS + self.work.rows * per_row,
            memory_bytes=int(_PREPARE_BYTES + _TOKEN_BYTES * self.size.vocabulary + 60 * self.work.rows),
            disk_bytes=text,
        )

    def train(self) -> StageEstimate:
        training, on_gpu = self.config.training, self.hardware.device == "cuda"
        tokens = steps_of(self.config, self.work.train_rows) * self._step_tokens()
        held_out = 2 * self.work.eval_rows * self.work.mean_tokens
        # Forward 2, gradients of the activations 2, recomputation 2 more; LoRA needs no gradients of the weights.
        passes = 6 if training.gradient_checkpointing else 4
        operations = self.size.parameters * (passes * tokens + 2 * held_out)
        if on_gpu:
            teraflops = gpu_teraflops(self.hardware)
            # Each GPU computes its share of a step's examples; what they tell each other is the adapter's gradients.
            gpus = int(processes_for(training, len(self.hardware.gpu_names)).value)
            speed = None if teraflops is None else gpus * teraflops * 1e12 * _GPU_SHARE
        else:
            speed = self.cpu_flops * _CPU_TRAINING
        download = self._base_bytes()
        loading = _IMPORT_TRAINING_SECONDS + download / 1e9
        return StageEstimate(
            stage="train",
            seconds=None if speed is None else loading + download / _DOWNLOAD_BYTES_PER_SECOND + operations / speed,
            memory_bytes=int(_CUDA_HOST_BYTES if on_gpu else self.training_bytes(self.batch_size)),
            gpu_memory_bytes=int(self.training_bytes(self.batch_size)) if on_gpu else 0,
            # The adapter, and with the checkpoint being written as many as are ever there; each has the moments too.
            disk_bytes=int(self.size.trained(self.config.lora) * (4 + (KEPT + 1) * (4 + self._moment_bytes))),
            cache_bytes=int(download),
        )

    @property
    def batch_size(self) -> int:
        """Examples at once: as set, or with auto the most that should fit and that divide an optimizer step's."""
        training = self.config.training
        if training.batch_size != "auto":
            return training.batch_size
        memory = _AUTO_BATCH_SHARE * (self.hardware.gpu_memory_bytes or self.hardware.available_memory_bytes)
        sizes = (size for size in range(training.effective_batch, 1, -1) if training.effective_batch % size == 0)
        return next((size for size in sizes if self.training_bytes(size) <= memory), 1)

    def training_bytes(self, batch_size: int) -> float:
        """Where training computes, on the GPU or in RAM: weights, adapter and optimizer, activations, the rest."""
        weights = self.size.weight_bytes(self.config.model.load_in_4bit, self.bytes_per_weight)
        activations = self.activation_bytes(batch_size, self.config.training.gradient_checkpointing is not False)
        held = weights + self._trainable_bytes()
        if self.hardware.device == "cuda":
            return held + activations + _CUDA_BYTES
        # Unsloth's GPU kernels compute the loss in pieces; on the CPU all logits are there, in three copies.
        rows = max(batch_size, self.config.training.eval_batch_size)
        logits = 3 * 4 * self.size.vocabulary * rows * self.work.longest_tokens
        # The allocator keeps what steps of other lengths have freed (pipeline/run.py sets it so: 8 % faster).
        steps = min(steps_of(self.config, max(1, self.work.train_rows)), 1000)
        kept = max(1.0, 0.35 + 0.45 * math.log(steps))
        return held + kept * (activations + logits) + _IMPORT_TRAINING_BYTES

    def activation_bytes(self, batch_size: int, checkpointing: bool) -> float:
        """What the forward pass keeps for the backward pass: one layer with recomputation, else all."""
        tokens = batch_size * self.work.longest_tokens
        layers = 1 if checkpointing else self.size.layers
        return _LAYER_BYTES * (self.size.hidden + self.size.feed_forward) * tokens * layers

    def export(self) -> StageEstimate:
        export = self.config.export
        guided = export.imatrix != "none"
        seconds = sum(self._quantizing_seconds(name, guided) for name in self._files)
        memory = _EXPORT_BYTES + self.size.trained(self.config.lora) * 4
        if export.imatrix == "auto":
            memory = max(memory, self.file_bytes("Q4_K_M") + _MEASURING_BYTES)
            measuring = 2 * self.size.parameters * _IMATRIX_TOKENS / (self.cpu_flops * _CPU_PROMPT)
            seconds += (
                _IMPORT_SECONDS + self._quantizing_seconds("Q4_K_M", False) + self.size.parameters * 2 / 1e9 + measuring
            )
        return StageEstimate(
            stage="export",
            seconds=9 + self.size.parameters * 2 / 1e9 + seconds,
            memory_bytes=int(memory),
            disk_bytes=int(sum(self.file_bytes(name) for name in self._files)),
        )

    def verify(self) -> StageEstimate:
        tokens = (self.config.verify.prompts + 1) * min(self.work.mean_tokens, 512)  # one more for the base
        forward = 2 * self.size.parameters * tokens / (self.cpu_flops * _CPU_FORWARD)
        prompts = len(self.config.export.quantizations) * 2 * self.size.parameters * tokens
        mapped = self.size.parameters * 2
        # The weights of one layer in 32 bit at a time, the largest being the output; logits of 512 positions.
        widened = 4 * self.size.vocabulary * (self.size.hidden + 512)
        return StageEstimate(
            stage="verify",
            seconds=_VERIFY_SECONDS
            + len(self._files) * _VERIFY_SECONDS_PER_FILE
            + self.size.parameters * 4 / 1e9 * 2
            + forward
            + prompts / (self.cpu_flops * _CPU_PROMPT),
            memory_bytes=int(_IMPORT_BYTES + mapped + widened),
            mapped_bytes=mapped,
        )

    def evaluate(self) -> StageEstimate:
        evaluation = self.config.evaluation
        rows = min(evaluation.rows, self.work.eval_rows)
        models = 2 if self.config.export.include_base else 1
        choices = min(rows if evaluation.choice_rows is None else evaluation.choice_rows, rows)
        choices = min(choices, math.ceil(rows * self.work.share_with_options))
        asked = rows + choices + _REFERENCE_QUESTIONS
        # A model that has learned to end its turn writes about as much as the references, its base up to the limit.
        written = asked * (min(1.3 * self.work.mean_completion_tokens, evaluation.max_new_tokens))
        written += (models - 1) * asked * 0.8 * evaluation.max_new_tokens
        read = models * (rows + choices) * 2 * self.work.mean_tokens
        decoding = max(
            self.cpu_flops * _CPU_DECODE / (2 * self.size.parameters), 1 / self._token_seconds(self.config.export.ship)
        )
        reading = 2 * self.size.parameters * read / (self.cpu_flops * _CPU_PROMPT)
        return StageEstimate(
            stage="evaluate",
            seconds=6 + written / decoding + reading,
            memory_bytes=int(models * (self.file_bytes(self.config.export.ship) + 0.15 * GIBIBYTE)),
        )

    def bench(self) -> StageEstimate:
        bench = self.config.bench
        deeper = [depth for depth in bench.depths if depth > 0]
        generated = bench.repeats * bench.generated_tokens
        prompts = (bench.repeats + 1) * bench.prompt_tokens + bench.repeats * _BENCH_QUESTION_TOKENS
        # Each depth is filled for prompt and generation.
        behind = sum(2 * depth + bench.repeats * bench.prompt_tokens for depth in deeper)
        reading = 2 * self.size.parameters / (self.cpu_flops * _CPU_PROMPT)
        seconds = 7.0  # the stage's own start, and the memory's speed
        for name in self._files:
            # Once evaluated and once sampled at depth 0, once evaluated at the others.
            seconds += 3 + (prompts + behind) * reading
            seconds += (2 + len(deeper)) * generated * self._token_seconds(name)
        memory = max(self.file_bytes(name) for name in self._files) + 0.15 * GIBIBYTE
        if bench.transformers:
            token = 4 * self.size.parameters / _MEMORY_BYTES_PER_SECOND + self.size.layers * 5 * _SECONDS_PER_LAYER
            forward = 2 * self.size.parameters / (self.cpu_flops * _CPU_FORWARD)
            seconds += _IMPORT_SECONDS + prompts * forward + 2 * generated * token
            memory = max(memory, _IMPORT_BYTES + 4 * self.size.parameters)
        compared = self.config.export.quantizations
        # Beside each file llama.cpp's and our own logits of 512 positions.
        logits = 2 * 512 * 4 * self.size.vocabulary
        together = sum(self.file_bytes(name) + 0.15 * GIBIBYTE + logits for name in compared)
        if bench.quality_records and len(compared) > 1 and together < 0.9 * self.hardware.memory_bytes:
            tokens = len(compared) * min(bench.quality_records, self.work.eval_rows) * self.work.mean_tokens
            seconds += 4 + tokens * (reading + self.size.vocabulary * _SECONDS_PER_COMPARED_LOGIT)
            memory = max(memory, together)
        return StageEstimate(stage="bench", seconds=seconds, memory_bytes=int(memory))

    def report(self) -> StageEstimate:
        return StageEstimate(stage="report", seconds=2, memory_bytes=int(0.09 * GIBIBYTE), disk_bytes=MEBIBYTE)

    @property
    def _files(self) -> list[str]:
        """The type of every GGUF that export writes."""
        export = self.config.export
        return [*export.quantizations, *([export.ship] if export.include_base else [])]

    def file_bytes(self, quantization: str) -> float:
        """About how large the GGUF gets."""
        return self.size.parameters * _bits_per_weight(quantization, self.size) / 8

    def _step_tokens(self) -> float:
        """Tokens of an optimizer step; a batch is padded to its longest example."""
        spread = self.work.longest_tokens - self.work.mean_tokens
        # The expected longest of n examples moves from the mean towards the longest as n grows.
        padded = self.work.mean_tokens + spread * (1 - 1 / self.batch_size) * 0.6
        return padded * self.config.training.effective_batch

    def _trainable_bytes(self) -> float:
        """Adapter weights and gradients in 32 bit, and Adam's two moments."""
        return self.size.trained(self.config.lora) * (4 + 4 + self._moment_bytes)

    @property
    def _moment_bytes(self) -> int:
        """Both moments of one weight: a byte each if the optimizer is 8-bit, which it is on GPUs only."""
        return 2 if "8bit" in self.config.training.optimizer and self.hardware.device == "cuda" else 8

    def _base_bytes(self) -> float:
        """What has to be downloaded, unless it is here already: the base as its repository holds it."""
        return 0.0 if self.base_is_here else self.size.weight_bytes(self.size.stored_in_4bit, 2)

    def _quantizing_seconds(self, quantization: str, guided: bool) -> float:
        """``guided`` by an importance matrix, ggml's search takes several times as long; Q8_0 takes none."""
        kind = "copy" if quantization in UNQUANTIZED else "K" if self.size.hidden % 256 == 0 else "legacy"
        if quantization in ("Q8_0", "Q4_0"):
            kind = "legacy"
        rates = _QUANTIZED_WITH_IMATRIX if guided and quantization != "Q8_0" else _QUANTIZED_PER_SECOND_AND_CORE
        return self.size.parameters / (rates[kind] * self.hardware.cores)

    def _token_seconds(self, quantization: str) -> float:
        """Seconds a token of one conversation takes under llama.cpp."""
        return self.file_bytes(quantization) / _MEMORY_BYTES_PER_SECOND + self.size.layers * _SECONDS_PER_LAYER


# Bits a weight of the matrices in each file type, K-quants' mixtures included (llama.cpp's tools/quantize/README.md).
_BITS = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.56, "Q5_K_M": 5.7, "Q5_K_S": 5.57, "Q4_K_M": 4.89,
    "Q4_K_S": 4.67, "Q4_0": 4.66, "Q3_K_M": 4.0, "Q2_K": 3.16, "IQ4_XS": 4.46,
}  # fmt: skip
_ODD_WIDTH_FACTOR = 1.28  # a width that is no multiple of 256 makes K-quants fall back to larger types (SmolLM2)


def _bits_per_weight(quantization: str, size: ModelSize) -> float:
    bits = _BITS.get(quantization.upper(), 16.0)
    return bits if size.hidden % 256 == 0 or bits >= 8 else bits * _ODD_WIDTH_FACTOR
