"""One pass over the base: every block of rows is read once and goes into all files, each in its own type.

A thread takes a block through all steps, so that it stays in the core's cache: read, widen, merge, quantize. Several
blocks are under way at a time; the calling thread writes them in their order.
"""

from __future__ import annotations

import errno
import math
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from threadpoolctl import threadpool_limits

from export.architecture import Architecture, ModelTensor
from export.gguf_file import GgufFile, GgufPlan
from export.merged_weights import MergedWeights
from export.partial_files import PartialFile, PartialFiles, missing_bytes, open_partial_files
from export.quantizers.choice import chooser
from export.quantizers.quantize import quantize
from export.tensor_change import Rows
from export.weights import BaseWeights, FloatRows
from pipeline.errors import MedcotError
from pipeline.hardware import usable_cores
from pipeline.memory import keep_freed_memory

Role = Literal["tuned", "base"]
Item = TypeVar("Item")
Result = TypeVar("Result")
# Called with the tensor at hand, the bytes written and their total over all files.
Progress = Callable[[str, int, int], None]
# Weights handled at a time by a thread: 1 MB in float32, which a core's own cache holds together with what it becomes.
_BLOCK_WEIGHTS = 1 << 18
_ROWS_TOGETHER = 16  # that the quantizers take side by side (export/quantizers/lanes.py); fewer cost as much
_BLOCKS_READ_AHEAD = 64  # 32 MB of a 16-bit base
_BLOCKS_A_THREAD = 4  # under way or waiting to be written, so that a slow write stops nobody


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
            chooser().prepare(_ways_to_quantize(outputs), announce)
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


@dataclass(frozen=True)
class _Receiver:
    """A file's use for a tensor; ``importance`` float32 [columns], or None."""

    file: GgufFile
    role: Role
    ggml_type: GGMLQuantizationType
    importance: npt.NDArray[np.float32] | None


@dataclass(frozen=True)
class _Block:
    """Some rows of a tensor, and whether they are its last; None for a tensor that export makes up."""

    each: _Pass
    rows: Rows | None
    last: bool
    receivers: Sequence[_Receiver]


def _ways_to_quantize(outputs: Sequence[Output]) -> list[tuple[GGMLQuantizationType, bool]]:
    """Each type in the files, with whether an importance matrix guides it."""
    return sorted(
        {
            (tensor.ggml_type, output.plan.importance is not None and tensor.name in output.plan.importance.matrices)
            for output in outputs
            for tensor in output.plan.tensors
        }
    )


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
    keep_freed_memory()
    planned = files.planned
    receivers = _receivers_by_tensor(files.files, roles)

    def shard(each: _Pass) -> object:
        source = _any(each).source
        return base.shard_of(merged.base_source(source)) if source else None

    def finished(block: _Block) -> list[npt.NDArray[np.uint8]]:
        return _quantized(block, _values(block.each, block.rows, base, merged))

    # A product is computed by the thread that needs it; BLAS' own threads would compete with the others.
    threads = usable_cores()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads, "block") as pool:
        # The next shard of a base on the hub is fetched when the one before it is done with and deleted.
        for _, of_shard in groupby(passes, shard):
            blocks = _read_ahead(of_shard, receivers, base, merged)
            for block, contents in _in_order(pool, blocks, finished, _BLOCKS_A_THREAD * threads):
                for receiver, content in zip(block.receivers, contents, strict=True):
                    receiver.file.write(content)
                progress(_any(block.each).name, files.written, planned)
                if block.last:
                    files.step_done()
                    _release(_any(block.each), awaited, base, merged)


def _receivers_by_tensor(files: Sequence[GgufFile], roles: Sequence[Role]) -> dict[str, list[_Receiver]]:
    receivers: dict[str, list[_Receiver]] = {}
    for file, role in zip(files, roles, strict=False):  # no files where they only have to be renamed
        for tensor in file.plan.tensors:
            importance = None if file.plan.importance is None else file.plan.importance.of(tensor.name)
            receivers.setdefault(tensor.name, []).append(_Receiver(file, role, tensor.ggml_type, importance))
    return receivers


def _read_ahead(
    passes: Iterable[_Pass], receivers: Mapping[str, Sequence[_Receiver]], base: BaseWeights, merged: MergedWeights
) -> Iterator[_Block]:
    """The blocks in order; the disk is told of each some time before it comes, because nobody waits for it then."""
    told: deque[_Block] = deque()
    for each in passes:
        tensor = _any(each)
        receiving = [receiver for receiver in receivers[tensor.name] if receiver.role in each]
        for rows, last in _blocks(tensor):
            if tensor.source is not None and rows is not None:
                first, end = (
                    (rows.start, rows.stop) if isinstance(rows, slice) else (int(rows.min()), int(rows.max()) + 1)
                )
                # What the adapter adds to the vocabulary lies behind the base's last row, and is not read from there.
                base.read_ahead(merged.base_source(tensor.source), first, end)
            told.append(_Block(each, rows, last, receiving))
            if len(told) > _BLOCKS_READ_AHEAD:
                yield told.popleft()
    yield from told


def _in_order(
    pool: ThreadPoolExecutor, items: Iterable[Item], work: Callable[[Item], Result], ahead: int
) -> Iterator[tuple[Item, Result]]:
    """Each item with the result of ``work``, in order; no more than ``ahead`` are begun before they are asked for."""
    pending: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        for _, future in pending:
            future.cancel()
        wait([future for _, future in pending])


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


def _blocks(tensor: ModelTensor) -> Iterator[tuple[Rows | None, bool]]:
    """The rows of each block in GGUF's order, and whether it is the last; None for a tensor that export makes up."""
    if tensor.source is None:
        yield None, True
        return
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    step = max(1, _BLOCK_WEIGHTS // columns // _ROWS_TOGETHER) * _ROWS_TOGETHER
    for start in range(0, rows, step):
        end = min(start + step, rows)
        yield slice(start, end) if tensor.order is None else tensor.order[start:end], end == rows


def _values(each: _Pass, rows: Rows | None, base: BaseWeights, merged: MergedWeights) -> dict[Role, FloatRows]:
    """The block as float32 [n, columns]; one object for both roles where the adapter changes nothing."""
    tensor = _any(each)
    if tensor.source is None or rows is None:
        assert tensor.values is not None
        return dict.fromkeys(each, tensor.values.reshape(1, -1))
    plain = base.rows(tensor.source, rows) if "base" in each else None
    values: dict[Role, FloatRows] = {}
    if "tuned" in each:
        values["tuned"] = merged.rows(tensor.source, rows, plain)
    if plain is not None:
        values["base"] = plain
    if len(tensor.shape) == 1:
        as_row = {id(block): block.reshape(1, -1) for block in values.values()}
        values = {role: as_row[id(block)] for role, block in values.items()}
    return values


def _quantized(block: _Block, values: Mapping[Role, FloatRows]) -> list[npt.NDArray[np.uint8]]:
    """The block for each receiver; the same rows in the same type are quantized once."""
    finished: dict[tuple[int, int, bool], npt.NDArray[np.uint8]] = {}
    contents = []
    for receiver in block.receivers:
        rows, importance = values[receiver.role], receiver.importance
        key = (id(rows), int(receiver.ggml_type), importance is None)
        if key not in finished:
            try:
                finished[key] = quantize(rows, receiver.ggml_type, importance)
            except OverflowError as error:
                raise MedcotError(f"{_any(block.each).name}: {error}; export to BF16 or F32 instead.") from error
        contents.append(finished[key])
    return contents


def _release(tensor: ModelTensor, awaited: Counter[str], base: BaseWeights, merged: MergedWeights) -> None:
    if tensor.source is None:
        return
    stored = merged.base_source(tensor.source)
    awaited[stored] -= 1
    if not awaited[stored]:
        base.release(stored)
