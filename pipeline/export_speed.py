"""How long export takes a weight, on one core of the machine that it was measured on (LOG.md, 2026-11-22)."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.file_sizes import UNQUANTIZED

# Nanoseconds a weight: reading and widening 16 bits or NF4, adding the adapter, and quantizing, without and with an
# importance matrix; Q4_K_M's mixture stands for all K-quants.
_READ_16_BIT, _READ_4_BIT, _ADD_ADAPTER = 1.5, 3.5, 1.4
_QUANTIZE = {"K": (13.7, 22.5), "Q8_0": (1.0, 1.0), "copy": (0.5, 0.5)}
# The wall clock beside the cores' own time: the system's share, and waiting for the disk (8B: 116, 46 and 107 s, and
# 82, 31 and 83 s by the sums).
_WALL = 1.45
_COMPILE_SECONDS, _COMPILE_GUIDED_SECONDS = 9.6, 14.0  # the quantizers, once on a machine


def weight_seconds(files: Sequence[str], *, guided: bool, stored_in_4bit: bool) -> float:
    """Seconds of a core to read a weight of the base and write it into files of these types.

    ``guided`` by an importance matrix, ggml's search takes longer.
    """
    read = _READ_4_BIT if stored_in_4bit else _READ_16_BIT
    return _WALL * 1e-9 * (read + sum(_ADD_ADAPTER + _QUANTIZE[_kind(name)][guided] for name in files))


def compile_seconds(*, guided: bool) -> float:
    return _COMPILE_GUIDED_SECONDS if guided else _COMPILE_SECONDS


def _kind(quantization: str) -> str:
    name = quantization.upper()
    return "copy" if name in UNQUANTIZED else name if name in _QUANTIZE else "K"
