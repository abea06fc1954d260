"""Rounding: float32 to bfloat16, and bfloat16 to fewer mantissa bits before compression.

The low bits of a mantissa are incompressible noise, so each one dropped saves about a bit per value (16 bits
become 9.0 at 5 mantissa bits, ratio 1.78; docs/benchmarks.md). Rounded values are still bfloat16. The
manifest records the number of bits, ``stats/layer_N/rounding`` the error. Costs one pass in memory per chunk.
"""

import numpy as np
from numpy.typing import NDArray

MANTISSA_BITS = 7
"""Explicit mantissa bits of bfloat16."""

_INFINITY = 0x7F80
_NAN = 0x7FC0
_NEAR_INFINITY = 0x7F00


def float32_to_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of values as bfloat16, rounded to nearest, half to even; too large ones become infinite.

    Args:
        values: float32 of any shape.

    >>> [hex(b) for b in float32_to_bits(np.array([1, 1.00390625, 1.01171875, 3.4e38, np.nan], np.float32))]
    ['0x3f80', '0x3f80', '0x3f82', '0x7f80', '0x7fc0']
    """
    bits = values.view(np.uint32)
    to_even = bits >> np.uint32(16) & np.uint32(1)
    rounded = (bits + (to_even + np.uint32(0x7FFF)) >> np.uint32(16)).astype(np.uint16)
    # Adding to a NaN may overflow into the sign and give a number.
    return np.where(np.isnan(values), np.uint16(_NAN), rounded)


def round_mantissas(bits: NDArray[np.uint16], mantissa_bits: int) -> NDArray[np.uint16]:
    """bfloat16 bits rounded to ``mantissa_bits``, to nearest, half to even.

    Values from 2^127 are truncated instead, so finite ones stay finite; others stay unchanged.

    Args:
        bits: bfloat16 bits of any shape.
        mantissa_bits: bits to keep, 1 to 7.

    >>> [hex(b) for b in round_mantissas(np.array([0x3F81, 0x3F82, 0x3F83, 0x7F7F], np.uint16), 5)]
    ['0x3f80', '0x3f80', '0x3f84', '0x7f7c']
    """
    dropped = MANTISSA_BITS - mantissa_bits
    if not dropped:
        return bits
    kept = np.uint16(0xFFFF << dropped & 0xFFFF)
    to_even = bits >> np.uint16(dropped) & np.uint16(1)
    rounded = bits + (to_even + np.uint16((1 << dropped - 1) - 1)) & kept
    if not bits.size or int((bits & np.uint16(0x7FFF)).max()) < _NEAR_INFINITY:
        return rounded
    # The largest numbers would round up to infinity, and a NaN to a number.
    magnitude = bits & np.uint16(0x7FFF)
    cut = np.where(magnitude < _INFINITY, bits & kept, bits)
    return np.where(magnitude < _NEAR_INFINITY, rounded, cut)
