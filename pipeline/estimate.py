"""What each stage of a run will take: seconds, memory, GPU memory, disk. Estimates, with their constants' sources.

Times follow from the work (floating-point operations, bytes, tokens) and the speeds of ``pipeline/speeds.py``;
``tests/perf/plan_accuracy.py`` compares them with runs, and ``tests/test_estimate.py`` with recorded and published
figures. Memory is what a process holds at its peak, mapped files included.
"""

from __future__ import annotations

import math
from functools import cached_property

from pipeline.answer_engine import answer_engine
from pipeline.batch_shares import processes_for
from pipeline.checkpoints import KEPT
from pipeline.config import Config
from pipeline.export_speed import compile_seconds, weight_seconds
from pipeline.file_sizes import file_bytes
from pipeline.gpu_room import bytes_together, fit_together
from pipeline.gradient_checkpointing import checkpointing_choice, with_checkpointing
from pipeline.hardware import GIBIBYTE, MEBIBYTE, Hardware
from pipeline.inference_speed import CACHE_BYTES, InferenceSpeed
from pipeline.model_size import ModelSize
from pipeline.platforms import service_named
from pipeline.speeds import (
    CACHED_BYTES_PER_SECOND,
    CPU_TRAINING,
    DOWNLOAD_BYTES_PER_SECOND,
    GPU_LAYER_SECONDS,
    GPU_TRAINING,
    HOSTED_DISK_BYTES_PER_SECOND,
    MEASURED_CORE_GFLOPS,
    gpu_model,
)
from pipeline.stage_estimate import StageEstimate, Workload, steps_of
from pipeline.training_memory import TrainingMemory

# Python, numba, the tokenizer and the few megabytes of weights under way, without the adapter (LOG.md, 2026-11-22).
_EXPORT_BYTES = 0.3 * GIBIBYTE
# llama.cpp while it measures the importance matrix, beside the mapped file.
_MEASURING_BYTES = 0.55 * GIBIBYTE
_REFERENCE_QUESTIONS = 3  # that every evaluation asks (bench/held_out.py)
# Starting Python and importing: PyTorch and transformers; with Unsloth and TRL on top.
_IMPORT_SECONDS, _IMPORT_TRAINING_SECONDS = 8.0, 20.0
_IMPORT_BYTES = 0.62 * GIBIBYTE
# In RAM beside a GPU: CUDA's libraries, and a shard of the base while it is loaded.
_CUDA_HOST_BYTES = 5 * GIBIBYTE
_CUDA_BYTES = 0.8 * GIBIBYTE  # on the GPU: context, workspaces and buffers of a model that answers
# Verify loads every file and asks it for the vocabulary and the templates.
_VERIFY_SECONDS, _VERIFY_SECONDS_PER_FILE = 12.0, 10.0
_VERIFY_POSITIONS = 512  # of a conversation whose logits are compared (export/verify_reference.py)
# Of bench: the question that is answered in it, and softmax and divergence of one logit.
_BENCH_QUESTION_TOKENS, _SECONDS_PER_COMPARED_LOGIT = 80, 15e-9
# Tokenizer libraries without a model, and a vocabulary's entry in them.
_PREPARE_BYTES, _TOKEN_BYTES = 0.35 * GIBIBYTE, 1500


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
        self.base_is_here = base_is_here
        self.llama_on_gpu = hardware.device == "cuda" and hardware.llama_on_gpu
        self.speed = InferenceSpeed(size, hardware, self.cpu_flops)

        def memory(each: Config) -> TrainingMemory:
            return TrainingMemory(
                each,
                size,
                hardware,
                longest=work.longest_tokens,
                steps=steps_of(config, max(1, work.train_rows)),
                weight_bytes=4 if dtype == "float32" else 2,
            )

        there = hardware.gpu_memory_bytes or hardware.available_memory_bytes
        self.checkpointing = checkpointing_choice(
            config, lambda each: memory(each).peak(memory(each).batch_size), there
        )
        self.config = with_checkpointing(config, self.checkpointing.value == "on")
        self.training_memory = memory(self.config)

    def stages(self) -> list[StageEstimate]:
        return [
            self.prepare(),
            self.train(),
            self.export(),
            self.verify(),
            self.evaluate().within(self.config.evaluation.max_minutes),
            self.bench().within(self.config.bench.max_minutes),
            self.report(),
        ]

    @property
    def batch_size(self) -> int:
        return self.training_memory.batch_size

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
        memory = self.training_memory
        steps = steps_of(self.config, self.work.train_rows)
        held_out = 2 * self.work.eval_rows * self.work.mean_tokens
        # Forward 2, gradients of the activations 2, recomputation 2 more; LoRA needs no gradients of the weights.
        passes = 6 if training.gradient_checkpointing else 4
        operations = self.size.parameters * (passes * steps * self._step_tokens() + 2 * held_out)
        if on_gpu:
            model = gpu_model(self.hardware)
            # Each GPU computes its share of a step's examples; what they tell each other is the adapter's gradients.
            gpus = int(processes_for(training, len(self.hardware.gpu_names)).value)
            layers = steps * training.effective_batch / memory.batch_size * self.size.layers / gpus
            waiting = layers * GPU_LAYER_SECONDS * passes / 6  # a recomputation that is not made starts no kernels
            computing = None if model is None else waiting + operations / (gpus * model.teraflops * 1e12 * GPU_TRAINING)
        else:
            computing = operations / (self.cpu_flops * CPU_TRAINING)
        download = 0.0 if self.base_is_here else self._base_bytes
        loading = _IMPORT_TRAINING_SECONDS + download / DOWNLOAD_BYTES_PER_SECOND
        if not self.base_is_here or on_gpu:
            loading += self._read_seconds(self._base_bytes)
        peak = memory.peak(memory.batch_size)
        return StageEstimate(
            stage="train",
            seconds=None if computing is None else loading + computing,
            memory_bytes=int(_CUDA_HOST_BYTES if on_gpu else peak),
            gpu_memory_bytes=int(peak) if on_gpu else 0,
            # The adapter, and with the checkpoint being written as many as are ever there; each has the moments too.
            disk_bytes=int(self.size.trained(self.config.lora) * (4 + (KEPT + 1) * (4 + memory.moment_bytes))),
            cache_bytes=int(download),
        )

    def export(self) -> StageEstimate:
        export = self.config.export
        guided = export.imatrix != "none"
        cores = self.cpu_flops / 1e9 / MEASURED_CORE_GFLOPS  # of the measured machine's kind

        def written(files: list[str], guided: bool) -> float:
            """Seconds to read the base once and write these files of it."""
            work = weight_seconds(files, guided=guided, stored_in_4bit=self.size.stored_in_4bit)
            return self._read_seconds(self._base_bytes) + self.size.parameters * work / cores

        seconds = 9 + written(self._files, guided)
        seconds += compile_seconds(guided=guided) * self.hardware.cores / cores
        memory = _EXPORT_BYTES + self.size.trained(self.config.lora) * 4
        if export.imatrix == "auto":
            memory = max(memory, self.file_bytes("Q4_K_M") + _MEASURING_BYTES)
            seconds += _IMPORT_SECONDS + written(["Q4_K_M"], False)
            seconds += export.imatrix_tokens * (self.speed.prompt_seconds() or 0)
        return StageEstimate(
            stage="export",
            seconds=seconds,
            memory_bytes=int(memory),
            disk_bytes=int(sum(map(self.file_bytes, self._files))),
        )

    def verify(self) -> StageEstimate:
        tokens = min(self.work.mean_tokens, _VERIFY_POSITIONS)
        prompts = self.config.verify.prompts
        # The reference once without the adapter; of the base's file one conversation.
        forwards = prompts + 1
        evaluated = len(self.config.export.quantizations) * prompts + self.config.export.include_base
        mapped = self.size.parameters * 2
        # The weights of one layer in 32 bit at a time, the largest being the output; logits of 512 positions.
        widened = 4 * self.size.vocabulary * (self.size.hidden + _VERIFY_POSITIONS)
        again = 0.0 if self._fits_memory(mapped) else forwards * self._read_seconds(mapped)
        return StageEstimate(
            stage="verify",
            seconds=_VERIFY_SECONDS
            + len(self._files) * _VERIFY_SECONDS_PER_FILE
            + self.size.parameters * 4 / CACHED_BYTES_PER_SECOND * 2
            + again
            + forwards * tokens * self.speed.float32_forward_seconds()
            + evaluated * tokens * (self.speed.prompt_seconds() or 0),
            memory_bytes=int(_IMPORT_BYTES + mapped + widened),
            mapped_bytes=mapped,
        )

    def evaluate(self) -> StageEstimate:
        evaluation, export = self.config.evaluation, self.config.export
        rows = min(evaluation.rows, self.work.eval_rows)
        models = 2 if export.include_base else 1
        choices = min(rows if evaluation.choice_rows is None else evaluation.choice_rows, rows)
        choices = min(choices, math.ceil(rows * self.work.share_with_options))
        asked = rows + choices + _REFERENCE_QUESTIONS
        # A model that has learned to end its turn writes about as much as the references, its base up to the limit.
        written = asked * (min(1.3 * self.work.mean_completion_tokens, evaluation.max_new_tokens))
        written += (models - 1) * asked * 0.8 * evaluation.max_new_tokens
        read = models * (rows + choices) * 2 * self.work.mean_tokens
        on_gpu, llama_on_gpu = self.hardware.device == "cuda", self.llama_on_gpu
        engine = answer_engine(evaluation.engine, has_gpu=on_gpu, llama_on_gpu=llama_on_gpu).value
        shipped = self.file_bytes(export.ship)
        gpu_memory, starting = 0.0, 6.0
        if engine == "transformers" and on_gpu:
            in_4bit = self.config.model.load_in_4bit
            token = self.speed.transformers_token_seconds(in_4bit=in_4bit)
            starting += _IMPORT_SECONDS + self._read_seconds(self._base_bytes)
            gpu_memory = self.size.weight_bytes(in_4bit, 2) + _CUDA_BYTES
        else:
            length = 2 * (self.work.mean_tokens - self.work.mean_completion_tokens) + evaluation.max_new_tokens
            token = self.speed.token_seconds_together(shipped, length, on_gpu=llama_on_gpu)
        if llama_on_gpu:
            starting += models * self._read_seconds(shipped)
            gpu_memory = max(gpu_memory, shipped + CACHE_BYTES + _CUDA_BYTES)
        reading = self.speed.prompt_seconds(on_gpu=llama_on_gpu)
        known = token is not None and reading is not None
        # Both models at once where they take less than half of the memory (bench/evaluation_processes.py).
        both_fit = models * shipped < self.hardware.available_memory_bytes / 2
        at_once = models if both_fit and not llama_on_gpu else 1
        return StageEstimate(
            stage="evaluate",
            seconds=starting + written * (token or 0) + read * (reading or 0) if known else None,
            memory_bytes=int(at_once * (shipped + 0.15 * GIBIBYTE)),
            gpu_memory_bytes=int(gpu_memory),
        )

    def bench(self) -> StageEstimate:
        bench = self.config.bench
        on_gpu = bench.gpu_layers != 0 and self.llama_on_gpu
        deeper = [depth for depth in bench.depths if depth > 0]
        generated = bench.repeats * bench.generated_tokens
        prompts = (bench.repeats + 1) * bench.prompt_tokens + bench.repeats * _BENCH_QUESTION_TOKENS
        # Each depth is filled for prompt and generation.
        behind = sum(2 * depth + bench.repeats * bench.prompt_tokens for depth in deeper)
        reading = self.speed.prompt_seconds(on_gpu=on_gpu)
        tokens = [self.speed.token_seconds(self.file_bytes(name), on_gpu=on_gpu) for name in self._files]
        seconds = 7.0  # the stage's own start, and the memory's speed
        for token in tokens:
            # Once evaluated and once sampled at depth 0, once evaluated at the others.
            seconds += 3 + (prompts + behind) * (reading or 0)
            seconds += (2 + len(deeper)) * generated * (token or 0)
        largest = max(map(self.file_bytes, self._files))
        memory = largest + 0.15 * GIBIBYTE
        if bench.transformers:
            seconds += _IMPORT_SECONDS + prompts * self.speed.float32_forward_seconds()
            seconds += 2 * generated * self.speed.float32_token_seconds()
            memory = max(memory, _IMPORT_BYTES + 4 * self.size.parameters)
        # All at once where they fit, else each other file with the most exact one, else none (bench/quality.py). Beside
        # each file llama.cpp's and our own logits of 512 positions.
        logits = 2 * 512 * 4 * self.size.vocabulary
        exact, *others = sorted(map(self.file_bytes, self.config.export.quantizations), reverse=True)
        free = 0.9 * self.hardware.available_memory_bytes
        gpu_memory = largest + _CUDA_BYTES
        compared = [exact, *others]
        compared_on_gpu = on_gpu and fit_together(compared, self.hardware.gpu_memory_bytes)
        comparing = self.speed.prompt_seconds(on_gpu=compared_on_gpu)
        if compared_on_gpu and bench.quality_records and others:
            gpu_memory = max(gpu_memory, bytes_together(compared))
        for files in ([exact, *others], [exact, *others[:1]]):
            together = sum(files) + len(files) * (0.15 * GIBIBYTE + logits)
            if bench.quality_records and others and together < free:
                read = (len(others) + 1) * min(bench.quality_records, self.work.eval_rows) * self.work.mean_tokens
                seconds += 4 + read * ((comparing or 0) + self.size.vocabulary * _SECONDS_PER_COMPARED_LOGIT)
                memory = max(memory, together)
                break
        known = reading is not None and None not in tokens
        return StageEstimate(
            stage="bench",
            seconds=seconds if known else None,
            memory_bytes=int(memory),
            gpu_memory_bytes=int(gpu_memory) if on_gpu else 0,
        )

    def report(self) -> StageEstimate:
        return StageEstimate(stage="report", seconds=2, memory_bytes=int(0.09 * GIBIBYTE), disk_bytes=MEBIBYTE)

    @property
    def _files(self) -> list[str]:
        """The type of every GGUF that export writes."""
        export = self.config.export
        return [*export.quantizations, *([export.ship] if export.include_base else [])]

    def file_bytes(self, quantization: str) -> float:
        """About how large the GGUF gets."""
        return file_bytes(quantization, self.size)

    def _step_tokens(self) -> float:
        """Tokens of an optimizer step; a batch is padded to its longest example."""
        spread = self.work.longest_tokens - self.work.mean_tokens
        # The expected longest of n examples moves from the mean towards the longest as n grows.
        padded = self.work.mean_tokens + spread * (1 - 1 / self.batch_size) * 0.6
        return padded * self.config.training.effective_batch

    @cached_property
    def _base_bytes(self) -> float:
        """The base as its repository holds it."""
        return self.size.weight_bytes(self.size.stored_in_4bit, 2)

    def _fits_memory(self, size: float) -> bool:
        """Whether the system can keep a file of this size in memory, so that it is read from the disk once."""
        return size < self.hardware.available_memory_bytes

    def _read_seconds(self, size: float) -> float:
        """A file that an earlier stage has read or written: from memory where that can hold it, else from the disk."""
        hosted = service_named(self.hardware.platform) is not None
        slow = hosted and not self._fits_memory(size)
        return size / (HOSTED_DISK_BYTES_PER_SECOND if slow else CACHED_BYTES_PER_SECOND)
