"""One pass over the base: every block of rows is read once and goes into all files, each in its own type."""

from __future__ import annotations

import errno
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from export.architecture import Architecture, ModelTensor
from export.ggml import quantize
from export.gguf_file import GgufFile, GgufPlan
from export.merged_weights import MergedWeights
from export.partial_files import PartialFile, PartialFiles, missing_bytes, open_partial_files
from export.tensor_change import Rows
from export.weights import BaseWeights, FloatRows
from pipeline.errors import MedcotError

Role = Literal["tuned", "base"]
# Called with the tensor at hand, the bytes written and their total over all files.
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
    fingerprint: str,
    announce: Callable[[str], None] = lambda text: None,
    beside: Callable[[ExitStack], None] = lambda stack: None,
) -> None:
    """Write all files side by side and rename them at the end; all appear, or none.

    ``tensors`` are those of each role in the order of the plans. An interrupted attempt with the same ``fingerprint``
    is gone on with behind its last durable tensor. ``beside`` may enter further files into the stack. After bad
    weights nothing is left; after anything else, what is complete stays for the same call, and ``announce`` says so.
    """
    passes = _passes(tensors)
    partial = [PartialFile(output.path, output.plan, _tensors_after(passes, output.role)) for output in outputs]
    # How much is multiplied at a time decides how sums are rounded.
    with open_partial_files(partial, f"{fingerprint} {_BLOCK_WEIGHTS}", announce) as files:
        try:
            with ExitStack() as stack:
                beside(stack)
                _write_passes(passes[files.steps :], [output.role for output in outputs], files, base, merged, progress)
            files.publish()
        except OSError as error:
            raise _write_error(error, files) from error
        except MedcotError as error:
            # What the hub refused now it may give later; damaged weights on this disk stay damaged.
            from_hub = any(isinstance(base.stored(name).path, str) for name in base.names)
            if not (from_hub and files.kept()):
                files.remove()
                raise
            raise MedcotError(f"{error} {_kept(files, files.keep())}") from error
        except BaseException:
            steps = files.keep()
            if steps:
                announce(_kept(files, steps))
            else:
                files.remove()
            raise


def _write_passes(
    passes: Sequence[_Pass],
    roles: Sequence[Role],
    files: PartialFiles,
    base: BaseWeights,
    merged: MergedWeights,
    progress: Progress,
) -> None:
    awaited = Counter(merged.base_source(_any(each).source or "") for each in passes if _any(each).source)
    # Shards whose tensors are all in the files already are not even fetched.
    base.plan(awaited)
    planned = files.planned
    for each in passes:
        name = _any(each).name
        progress(name, files.written, planned)
        receiving = [(role, file) for role, file in zip(roles, files.files, strict=True) if role in each]
        for values in _blocks(each, base, merged):
            _write_block(values, receiving)
            progress(name, files.written, planned)
        files.step_done()
        _release(_any(each), awaited, base, merged)


def _tensors_after(passes: Sequence[_Pass], role: Role) -> list[int]:
    return [0, *accumulate(int(role in each) for each in passes)]


def _write_error(error: OSError, files: PartialFiles) -> MedcotError:
    """One sentence about a failed write; what is complete is kept."""
    folder = files.outputs[0].path.parent
    steps = files.keep()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        missing = missing_bytes(files.outputs) - shutil.disk_usage(folder).free
        reason = f"the disk is full, {max(0, missing) / 1e9:.3f} GB more are needed"
    else:
        reason = error.strerror or str(error)
    if not steps:
        files.remove()
        return MedcotError(f"Writing to {folder} failed: {reason}. No file was left behind.")
    names = ", ".join(str(output.partial) for output in files.outputs)
    return MedcotError(f"Writing to {folder} failed: {reason}. {_kept(files, steps)} To give up, delete {names}.")


def _kept(files: PartialFiles, steps: int) -> str:
    return f"The same command goes on behind tensor {steps} of {files.total_steps}."


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
