"""Levels of a few bits, packed side by side into bytes."""

from __future__ import annotations

from export.quantizers.lanes import load, repeat, routine


@routine
def four_bytes(levels, first, stride, width, dropped):  # type: ignore[no-untyped-def]
    """A word of fields of ``width`` bits, little-endian, from int vectors less their ``dropped`` lowest bits.

    From its lowest bits up, byte k holds vectors first + k, first + k + stride, first + k + 2 * stride and so on.
    """
    word = repeat(0)
    for byte in range(4):
        for field in range(8 // width):
            level = load(levels, first + byte + stride * field) >> dropped
            word |= (level & (1 << width) - 1) << (8 * byte + width * field)
    return word
