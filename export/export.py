"""Base weights and adapter to GGUF files, in one pass over the base.

    medcot export --base BASE --adapter DIR --out DIR --quant F16 --quant Q4_K_M

Each tensor is read a block of rows at a time, the adapter's change is added in 32 bit, and every file gets
the block in its own type; neither a merged checkpoint nor a whole tensor is ever in memory.
"""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from export.architecture import LlamaArchitecture, ModelTensor, read_architecture
from export.ggml import quantize
from export.gguf_file import GgufFile, GgufPlan
from export.lora import LoraAdapter
from export.packages import write_modelfile
from export.quant_types import file_type
from export.tokenizer_metadata import TOKENIZER_FILES, Vocabulary, read_vocabulary
from export.weights import BaseWeights, FloatRows
from pipeline.artifacts import atomic_path
from pipeline.config import Config
from pipeline.errors import MedcotError
from pipeline.results import ExportedFile, ExportedModels

Role = Literal["tuned", "base"]
# Called with the tensor at hand, the parameters done and their total.
Progress = Callable[[str, int, int], None]
# Weights handled at a time: 64 MB in float32, so that an 8B model's embedding needs no gigabytes.
_BLOCK_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class Output:
    """One file to write: where, from which weights, and what it will hold."""

    path: Path
    role: Role
    plan: GgufPlan


def export(config: Config, inputs: dict[str, Path], out_dir: Path) -> ExportedModels:
    """Stage: the trained adapter (``inputs["train"]``) and its base to GGUF files in ``out_dir``."""
    from pipeline.base_model import local_base

    with _progress_bar() as progress:
        return export_models(
            local_base(config.model.base, config.model.revision),
            inputs["train"],
            out_dir,
            config.name,
            config.export.quantizations,
            config.export.ship if config.export.include_base else None,
            progress,
            ship=config.export.ship,
            system=config.prompt.system,
        )


def export_models(
    base: Path,
    adapter: Path | None,
    out_dir: Path,
    name: str,
    quantizations: Sequence[str],
    base_quantization: str | None = None,
    progress: Progress | None = None,
    *,
    ship: str | None = None,
    system: str | None = None,
) -> ExportedModels:
    """Write ``<name>-<QUANT>.gguf`` for each quantization, ``<name>-base-<QUANT>.gguf`` and a Modelfile.

    ``base`` is a folder as Hugging Face lays it out. The tokenizer and chat template come from the adapter's
    folder where it has them. ``ship`` is the quantization that the Modelfile names (default: the last one).
    All files appear together at the end, or none; raises MedcotError.
    """
    architecture = read_architecture(base)
    weights = BaseWeights(base)
    tensors = architecture.tensors()
    _check_tensors(architecture, weights, tensors)
    lora = LoraAdapter(adapter) if adapter else None
    if lora:
        lora.check_fits({tensor.source: tensor.shape for tensor in tensors if tensor.source})
    vocabulary = read_vocabulary(tokenizer_folder(base, adapter), architecture.vocabulary)
    outputs = _outputs(out_dir, name, quantizations, base_quantization, architecture, vocabulary, tensors)
    _make_room(out_dir, outputs)
    merged = _write_files(outputs, weights, lora, tensors, progress or (lambda tensor, done, total: None))
    shipped = f"{name}-{file_type(ship or quantizations[-1]).name}.gguf"
    write_modelfile(out_dir / "Modelfile", shipped, vocabulary, system)
    return ExportedModels(
        architecture=architecture.name,
        parameters=outputs[0].plan.parameters,
        adapter_matrices_merged=merged,
        ship=shipped,
        base=next((output.path.name for output in outputs if output.role == "base"), None),
        files=[
            ExportedFile(
                name=output.path.name,
                role=output.role,
                quantization=output.plan.file_type.name,
                size_bytes=output.path.stat().st_size,
                bits_per_weight=output.plan.bits_per_weight,
                tensor_types=output.plan.type_counts,
            )
            for output in outputs
        ],
    )


def tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """The folder whose tokenizer trained: the adapter's where it was saved beside it, else the base's."""
    if adapter and any((adapter / file).is_file() for file in TOKENIZER_FILES):
        return adapter
    return base


def _check_tensors(architecture: LlamaArchitecture, weights: BaseWeights, tensors: Sequence[ModelTensor]) -> None:
    for tensor in tensors:
        if tensor.source is None:
            continue
        stored = weights.stored(tensor.source)
        if stored.shape != tensor.shape:
            raise MedcotError(
                f"{stored.path}: {tensor.source} has shape {list(stored.shape)}, config.json says "
                f"{list(tensor.shape)}; the checkpoint and its configuration do not belong together."
            )
    unknown = architecture.unknown(set(weights.names))
    if unknown:
        raise MedcotError(
            f"{weights.folder} holds {len(unknown)} tensors that {architecture.name} models have no place "
            f"for, such as {unknown[0]}: config.json names the wrong architecture, or the base is quantized."
        )


def _outputs(
    out_dir: Path,
    name: str,
    quantizations: Sequence[str],
    base_quantization: str | None,
    architecture: LlamaArchitecture,
    vocabulary: Vocabulary,
    tensors: Sequence[ModelTensor],
) -> list[Output]:
    if not quantizations:
        raise MedcotError("No quantization is asked for: name at least one, for example Q4_K_M.")
    wanted: dict[str, tuple[Role, str]] = {
        f"{name}-{file_type(quantization).name}.gguf": ("tuned", quantization) for quantization in quantizations
    }
    if base_quantization:
        wanted[f"{name}-base-{file_type(base_quantization).name}.gguf"] = ("base", base_quantization)
    return [
        Output(
            out_dir / file_name,
            role,
            GgufPlan.of(
                name if role == "tuned" else f"{name} base",
                file_type(quantization),
                architecture,
                vocabulary,
                tensors,
            ),
        )
        for file_name, (role, quantization) in wanted.items()
    ]


def _make_room(out_dir: Path, outputs: Sequence[Output]) -> None:
    """Create the folder, remove what a killed export left there, and check that the files will fit."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for output in outputs:
            for leftover in out_dir.glob(f".{output.path.name}.*.tmp"):
                leftover.unlink()
        free = shutil.disk_usage(out_dir).free
    except OSError as error:
        raise MedcotError(f"{out_dir} cannot be written: {error.strerror}.") from error
    needed = sum(output.plan.tensor_bytes for output in outputs)
    if free < needed:
        raise MedcotError(
            f"{out_dir} has {free / 1e9:.2f} GB free and the files need {needed / 1e9:.2f} GB: "
            f"free {(needed - free) / 1e9:.2f} GB or ask for fewer quantizations."
        )


def _write_files(
    outputs: Sequence[Output],
    weights: BaseWeights,
    lora: LoraAdapter | None,
    tensors: Sequence[ModelTensor],
    progress: Progress,
) -> int:
    """Write all files side by side, rename them at the end; returns how many tensors the adapter changed."""
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    done = 0
    merged: set[str] = set()
    try:
        with ExitStack() as stack:
            files = []
            for output in outputs:
                file = GgufFile(output.plan, stack.enter_context(atomic_path(output.path)))
                stack.callback(file.close)
                files.append((output.role, file))
            for index, tensor in enumerate(tensors):
                progress(tensor.name, done, total)
                for plain, tuned in _blocks(tensor, weights, lora):
                    _write_block(index, plain, tuned, files)
                    done += plain.size
                    progress(tensor.name, done, total)
                if lora and tensor.source in lora.changes:
                    merged.add(tensor.source)
            for _, file in files:
                file.finish()
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise MedcotError(f"Writing to {outputs[0].path.parent} failed: {reason}. No file was left behind.") from error
    return len(merged)


def _blocks(
    tensor: ModelTensor, weights: BaseWeights, lora: LoraAdapter | None
) -> Iterator[tuple[FloatRows, FloatRows]]:
    """Blocks of rows as (base, base with the adapter) in GGUF's order; one object twice where equal."""
    if tensor.source is None:
        assert tensor.values is not None
        yield tensor.values.reshape(1, -1), tensor.values.reshape(1, -1)
        return
    change = lora.changes.get(tensor.source) if lora else None
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    step = max(1, _BLOCK_WEIGHTS // columns)
    for start in range(0, rows, step):
        chosen = slice(start, start + step) if tensor.order is None else tensor.order[start : start + step]
        plain = weights.rows(tensor.source, chosen)
        tuned = plain if change is None else plain + change.rows(chosen)
        if len(tensor.shape) == 1:
            plain = tuned = plain.reshape(1, -1)
        yield plain, tuned


def _write_block(index: int, plain: FloatRows, tuned: FloatRows, files: Sequence[tuple[Role, GgufFile]]) -> None:
    """Give every file its block; the same rows in the same type are quantized once."""
    finished: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}
    for role, file in files:
        planned = file.plan.tensors[index]
        rows = tuned if role == "tuned" else plain
        key = (id(rows), int(planned.ggml_type))
        if key not in finished:
            try:
                finished[key] = quantize(rows, planned.ggml_type)
            except OverflowError as error:
                raise MedcotError(f"{planned.name}: {error}; export to BF16 or F32 instead.") from error
        file.write(finished[key])


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A bar on standard error: tensor, MB/s of 32-bit weights, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("export"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def update(tensor: str, done: int, total: int) -> None:
            float_bytes = np.dtype(np.float32).itemsize
            bar.update(task, description=tensor, completed=done * float_bytes, total=total * float_bytes)

        yield update
