"""One pass over the base: every block of rows is read once and goes into all files, each in its own type."""

from __future__ import annotations

import errno
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from export.architecture import Architecture, ModelTensor
from export.ggml import quantize
from export.gguf_file import GgufFile, GgufPlan
from export.merged_weights import MergedWeights
from export.tensor_change import Rows
from export.weights import BaseWeights, FloatRows
from pipeline.artifacts import atomic_path
from pipeline.errors import MedcotError

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


# What is read together: the same rows of one tensor, for the tuned model, for the base, or for both.
_Pass = dict[Role, ModelTensor]


def tensors_by_shard(architecture: Architecture, base: BaseWeights, merged: MergedWeights) -> list[ModelTensor]:
    """The tensors of ``architecture`` in an order in which one shard of the base after the other is done with."""
    tensors = architecture.tensors()
    stored = {tensor.source: merged.base_source(tensor.source) for tensor in tensors if tensor.source}
    place = {name: index for index, name in enumerate(base.by_shard(dict.fromkeys(stored.values())))}
    return sorted(tensors, key=lambda tensor: place[stored[tensor.source]] if tensor.source else -1)


def write_files(
    outputs: Sequence[Output],
    tensors: Mapping[Role, Sequence[ModelTensor]],
    base: BaseWeights,
    merged: MergedWeights,
    progress: Progress,
    *,
    beside: Callable[[ExitStack], None] = lambda stack: None,
) -> None:
    """Write all files side by side and rename them at the end; all appear, or none.

    ``tensors`` are those of each role in the order of the plans. ``beside`` may enter further files into the stack.
    """
    passes = _passes(tensors)
    awaited = Counter(merged.base_source(_any(each).source or "") for each in passes if _any(each).source)
    base.plan(awaited)
    total = sum(math.prod(_any(each).shape) for each in passes)
    done = 0
    try:
        with ExitStack() as stack:
            files: list[tuple[Role, GgufFile]] = []
            for output in outputs:
                file = GgufFile(output.plan, stack.enter_context(atomic_path(output.path)))
                stack.callback(file.close)
                files.append((output.role, file))
            beside(stack)
            for each in passes:
                name = _any(each).name
                progress(name, done, total)
                receiving = [(role, file) for role, file in files if role in each]
                for values in _blocks(each, base, merged):
                    _write_block(values, receiving)
                    done += next(iter(values.values())).size
                    progress(name, done, total)
                _release(_any(each), awaited, base, merged)
            for _, file in files:
                file.finish()
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise MedcotError(f"Writing to {outputs[0].path.parent} failed: {reason}. No file was left behind.") from error


def _passes(tensors: Mapping[Role, Sequence[ModelTensor]]) -> list[_Pass]:
    """A tensor of one shape in both models is read once; one that the adapter resized, once for each."""
    of_base = {tensor.name: tensor for tensor in tensors.get("base", ())}
    passes: list[_Pass] = []
    for tensor in tensors["tuned"]:
        same = of_base.get(tensor.name)
        if same is None:
            passes.append({"tuned": tensor})
        elif same.shape == tensor.shape:
            passes.append({"tuned": tensor, "base": same})
        else:
            passes += [{"tuned": tensor}, {"base": same}]
    return passes


def _any(each: _Pass) -> ModelTensor:
    return next(iter(each.values()))


def _blocks(each: _Pass, base: BaseWeights, merged: MergedWeights) -> Iterator[dict[Role, FloatRows]]:
    """Blocks of rows in GGUF's order; one object for both roles where the adapter changes nothing."""
    tensor = _any(each)
    if tensor.source is None:
        assert tensor.values is not None
        yield dict.fromkeys(each, tensor.values.reshape(1, -1))
        return
    for chosen in _row_blocks(tensor):
        plain = base.rows(tensor.source, chosen) if "base" in each else None
        values: dict[Role, FloatRows] = {}
        if "tuned" in each:
            values["tuned"] = merged.rows(tensor.source, chosen, plain)
        if plain is not None:
            values["base"] = plain
        if len(tensor.shape) == 1:
            as_row = {id(rows): rows.reshape(1, -1) for rows in values.values()}
            values = {role: as_row[id(rows)] for role, rows in values.items()}
        yield values


def _row_blocks(tensor: ModelTensor) -> Iterator[Rows]:
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    step = max(1, _BLOCK_WEIGHTS // columns)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        yield slice(start, end) if tensor.order is None else tensor.order[start:end]


def _write_block(values: dict[Role, FloatRows], files: Sequence[tuple[Role, GgufFile]]) -> None:
    """Give every file its block; the same rows in the same type are quantized once."""
    finished: dict[tuple[int, int, bool], npt.NDArray[np.uint8]] = {}
    for role, file in files:
        planned = file.current
        rows = values[role]
        importance = None if file.plan.importance is None else file.plan.importance.of(planned.name)
        key = (id(rows), int(planned.ggml_type), importance is None)
        if key not in finished:
            try:
                finished[key] = quantize(rows, planned.ggml_type, importance)
            except OverflowError as error:
                raise MedcotError(f"{planned.name}: {error}; export to BF16 or F32 instead.") from error
        file.write(finished[key])


def _release(tensor: ModelTensor, awaited: Counter[str], base: BaseWeights, merged: MergedWeights) -> None:
    if tensor.source is None:
        return
    stored = merged.base_source(tensor.source)
    awaited[stored] -= 1
    if not awaited[stored]:
        base.release(stored)
