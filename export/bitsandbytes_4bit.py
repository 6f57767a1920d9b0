"""Weights that bitsandbytes stored in 4 bits (NF4, FP4), any rows, as float32, without PyTorch.

QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314: blocks of (mostly) 64 consecutive weights share a
scale, ``absmax``; a weight is one of 16 numbers times it. With double quantization the scales are themselves 8-bit
numbers in blocks of 256 around a common offset. Beside a packed ``X.weight``, two weights a byte with the first in
the upper half, a checkpoint holds (``QuantState.as_dict`` in bitsandbytes/functional.py):

    X.weight.absmax                           one scale a block: F32, or U8 with double quantization
    X.weight.quant_map                        the 16 numbers, F32
    X.weight.nested_absmax, nested_quant_map  the scales' own scales and their 256 numbers, F32
    X.weight.quant_state.bitsandbytes__nf4    (or __fp4) JSON as bytes: shape, blocksize, nested_offset, ...

The result is bit for bit what ``bitsandbytes.functional.dequantize_4bit`` (0.50.2) gives when its ``dtype`` is
float32, but for the sign of zeros in FP4 and a fault of its CPU kernel for AVX-512, which takes wrong scales where a
row is no whole number of blocks (``absmax_dim_1`` in csrc/cpu_ops.cpp). In training, the forward pass rounds that
product to the compute type (bfloat16 keeps 8 of its 24 significant bits); here the adapter's change is added before
any rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.safetensors_file import ByteArray, FloatRows, RowIndices, StoredTensor, gather_rows, row_layout
from pipeline.errors import MedcotError

STATE_MARK = ".quant_state.bitsandbytes__"
_QUANT_TYPES = ("nf4", "fp4")
# Bytes [begin, end) of a stored tensor, by its name.
ReadBytes = Callable[[str, int, int], ByteArray]


@dataclass(frozen=True)
class DoubleQuantization:
    """How the scales themselves are stored: 8-bit numbers in blocks, around ``offset``."""

    blocksize: int
    offset: np.float32


@dataclass(frozen=True)
class FourBitTensor:
    """One packed tensor; ``stored`` carries its own shape and NF4 or FP4 as its type."""

    name: str
    stored: StoredTensor
    blocksize: int
    nested: DoubleQuantization | None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that belong to it, without its packed weights and its JSON."""
        return tuple(f"{self.name}.{part}" for part in _part_names(self.nested is not None))

    def rows(self, rows: RowIndices | slice, read: ReadBytes) -> FloatRows:
        """Rows as a new float32 array [n, columns]. Raises MedcotError where a scale is NaN or infinite."""
        numbers = self._floats("quant_map", 0, 16, read)
        byte = np.arange(256)
        # Two float32 are looked up at once, as one 8-byte item a packed byte.
        pairs = np.stack([numbers[byte >> 4], numbers[byte & 15]], axis=1).view(np.uint64).reshape(-1)
        scale_numbers = self._floats("nested_quant_map", 0, 256, read) if self.nested else None
        count, columns = row_layout(self.stored.shape)
        # Kept from piece to piece: memory that is given back and asked for again costs as much as the lookup itself.
        indices = np.empty(0, dtype=np.intp)

        def read_run(first: int, last: int, target: FloatRows) -> None:
            """Whole blocks are read around the rows, so that each has one scale."""
            nonlocal indices
            begin, end = first * columns, last * columns
            first_block, last_block = begin // self.blocksize, -(-end // self.blocksize)
            start = first_block * self.blocksize
            packed = read(self.name, start // 2, min(last_block * self.blocksize // 2, self._packed_bytes))
            if indices.size < packed.size:
                indices = np.empty(packed.size, dtype=np.intp)
            indices[: packed.size] = packed
            weights = np.zeros((last_block - first_block, self.blocksize), dtype=np.float32)
            # An index is below 256, so "clip" changes none; it spares the copy that the default mode makes.
            unpacked = weights.reshape(-1).view(np.uint64)[: packed.size]
            np.take(pairs, indices[: packed.size], out=unpacked, mode="clip")
            scales = self._scales(first_block, last_block, scale_numbers, read)
            if end - begin == weights.size:
                np.multiply(weights, scales[:, None], out=target.reshape(weights.shape))
            else:
                weights *= scales[:, None]
                target[...] = weights.reshape(-1)[begin - start : end - start].reshape(target.shape)

        return gather_rows(rows, count, columns, read_run)

    def stored_ranges(self, first: int, last: int) -> dict[str, tuple[int, int]]:
        """Bytes [begin, end) of the parts that the rows [first, last) are made from, without small tables."""
        columns = row_layout(self.stored.shape)[1]
        begin, end = first * columns, last * columns
        scale_bytes = 1 if self.nested else 4
        return {
            self.name: (begin // 2, min(-(-end // 2), self._packed_bytes)),
            f"{self.name}.absmax": (begin // self.blocksize * scale_bytes, -(-end // self.blocksize) * scale_bytes),
        }

    @property
    def _packed_bytes(self) -> int:
        return self.stored.end - self.stored.begin

    def _scales(self, first: int, last: int, numbers: FloatRows | None, read: ReadBytes) -> FloatRows:
        """The scales of blocks [first, last), in bitsandbytes' order of operations: number * scale, then + offset."""
        if self.nested is None or numbers is None:
            return self._floats("absmax", first, last, read)
        size = self.nested.blocksize
        outer = self._floats("nested_absmax", first // size, -(-last // size), read)
        scales = numbers[read(f"{self.name}.absmax", first, last)]
        scales *= outer[np.arange(first, last) // size - first // size]
        scales += self.nested.offset
        return scales

    def _floats(self, part: str, first: int, last: int, read: ReadBytes) -> FloatRows:
        values: FloatRows = read(f"{self.name}.{part}", first * 4, last * 4).view(np.float32)
        if not np.isfinite(values).all():
            raise MedcotError(
                f"{self.stored.path}: {self.name}.{part} holds NaN or infinite values; the file is damaged."
            )
        return values


def state_names(stored: Iterable[str]) -> dict[str, str]:
    """The JSON tensor's name of each packed tensor's name, for all 4-bit tensors of a checkpoint."""
    return {name.partition(STATE_MARK)[0]: name for name in stored if STATE_MARK in name}


def read_four_bit(name: str, state_name: str, state: bytes, stored: Mapping[str, StoredTensor]) -> FourBitTensor:
    """A packed tensor from the JSON beside it; raises MedcotError where its parts do not fit together."""
    origin = stored[state_name].path
    try:
        settings = json.loads(state)
        shape = tuple(map(int, settings["shape"]))
        quant_type, blocksize = settings["quant_type"], int(settings["blocksize"])
        nested = _read_nested(settings)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise MedcotError(
            f"{origin}: {state_name} is not the description that bitsandbytes writes: download it again."
        ) from error
    if quant_type not in _QUANT_TYPES or blocksize < 2 or blocksize % 2 or min(shape, default=0) < 1:
        raise MedcotError(
            f"{origin}: {state_name} describes {quant_type!r} in blocks of {blocksize} with shape {list(shape)}; "
            f"bitsandbytes writes {' and '.join(_QUANT_TYPES)} in blocks of 32 to 4096."
        )
    _check_parts(name, origin, math.prod(shape), blocksize, nested, stored)
    packed = stored[name]
    tensor = StoredTensor(packed.path, quant_type.upper(), shape, packed.begin, packed.end)
    return FourBitTensor(name, tensor, blocksize, nested)


def _read_nested(settings: Mapping[str, Any]) -> DoubleQuantization | None:
    if "nested_blocksize" not in settings:
        return None
    if settings["nested_dtype"] != "float32" or int(settings["nested_blocksize"]) < 1:
        raise ValueError("the scales' own type")
    offset = np.float32(settings["nested_offset"])
    if not np.isfinite(offset):
        raise ValueError("the scales' offset")
    return DoubleQuantization(int(settings["nested_blocksize"]), offset)


def _part_names(nested: bool) -> tuple[str, ...]:
    return ("absmax", "quant_map") + (("nested_absmax", "nested_quant_map") if nested else ())


def _check_parts(
    name: str,
    origin: object,
    weights: int,
    blocksize: int,
    nested: DoubleQuantization | None,
    stored: Mapping[str, StoredTensor],
) -> None:
    """Every part is there with the type and length that the description implies."""
    blocks = -(-weights // blocksize)
    expected = {f"{name}.quant_map": ("F32", 16), f"{name}.absmax": ("U8" if nested else "F32", blocks)}
    if nested:
        expected[f"{name}.nested_absmax"] = ("F32", -(-blocks // nested.blocksize))
        expected[f"{name}.nested_quant_map"] = ("F32", 256)
    missing = [part for part in (name, *expected) if part not in stored]
    if missing:
        raise MedcotError(f"{origin}: {name} is stored in 4 bits but {', '.join(missing)} is missing: download again.")
    for part, (dtype, count) in expected.items():
        found = stored[part]
        if (found.dtype, math.prod(found.shape)) != (dtype, count):
            raise MedcotError(
                f"{found.path}: {part} holds {math.prod(found.shape)} x {found.dtype}, but the 4-bit tensor beside it "
                f"needs {count} x {dtype}: download it again."
            )
    # ``quant_storage`` may label the bytes with a wider type; their number tells.
    packed_bytes = stored[name].end - stored[name].begin
    if packed_bytes != (weights + 1) // 2:
        raise MedcotError(
            f"{stored[name].path}: {name} has {packed_bytes} bytes for {weights} weights of 4 bits: download it again."
        )
