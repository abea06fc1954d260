"""Position ranges: parts ``[start, stop)`` of a context, which autoencoders, scores and settings name.

>>> equal_ranges(128, 4)[1]
PositionRange(start=32, stop=64)
>>> parse_ranges("0:1,1:4,4:128", 128)[-1]
PositionRange(start=4, stop=128)
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..store.errors import SettingsError


class PositionRange(NamedTuple):
    """Positions from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int

    def __str__(self) -> str:
        """As it is written in settings: ``32:64``."""
        return f"{self.start}:{self.stop}"


def equal_ranges(context_length: int, n_ranges: int) -> tuple[PositionRange, ...]:
    """``n_ranges`` ranges: position p lies in range ⌊n_ranges · p / context_length⌋.

    Raises:
        SettingsError: more ranges than positions, or none.
    """
    if not 1 <= n_ranges <= context_length:
        raise SettingsError(
            f"{n_ranges} position ranges do not fit {context_length} positions; "
            f"choose between 1 and {context_length}"
        )
    edges = [-(-context_length * r // n_ranges) for r in range(n_ranges + 1)]
    return tuple(PositionRange(a, b) for a, b in pairwise(edges))


def parse_ranges(text: str, context_length: int) -> tuple[PositionRange, ...]:
    """Ranges written as ``0:1,1:4,4:128``, or a count of equal ones as ``4``.

    Raises:
        SettingsError: not of that form, or the ranges do not follow each other from 0 to
            ``context_length``.
    """
    if text.strip().isdecimal():
        return equal_ranges(context_length, int(text))
    try:
        pairs = [tuple(int(edge) for edge in part.split(":")) for part in text.split(",")]
        ranges = tuple(PositionRange(start, stop) for start, stop in pairs)
    except ValueError:
        raise SettingsError(
            f"position ranges {text!r}: write a count, or edges such as 0:1,1:4,4:128"
        ) from None
    expected = 0
    for r in ranges:
        if r.start != expected or r.stop <= r.start:
            raise SettingsError(
                f"position ranges {text!r}: {r} should start at {expected} and end after it; "
                "ranges follow each other without gaps"
            )
        expected = r.stop
    if expected != context_length:
        raise SettingsError(
            f"position ranges {text!r} end at {expected}, but contexts have {context_length} positions"
        )
    return ranges


def range_of_position(ranges: tuple[PositionRange, ...]) -> NDArray[np.int32]:
    """The index of the range that each position lies in; int32 [positions]."""
    return np.repeat(np.arange(len(ranges), dtype=np.int32), [r.stop - r.start for r in ranges])
