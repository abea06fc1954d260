"""Amounts and curves in plain text, for a terminal and for a store's card."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

_BLOCKS = " ▁▂▃▄▅▆▇█"
_MOST_NAMES = 12


def quantity(n_bytes: float) -> str:
    """Bytes in readable units.

    >>> quantity(1536), quantity(2.5e12)
    ('1.54 kB', '2.50 TB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1000
    raise AssertionError


def counted(number: int, word: str) -> str:
    """A count and its word.

    >>> counted(1, "context"), counted(1024, "context")
    ('1 context', '1,024 contexts')
    """
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def numbers(values: Iterable[int]) -> str:
    """A list of numbers.

    >>> numbers((5, 12, 19))
    '5, 12, 19'
    """
    return ", ".join(map(str, values))


def layers_named(layers: Sequence[int]) -> str:
    """Layers in a sentence.

    >>> layers_named((5,)), layers_named((5, 12))
    ('layer 5', 'layers 5, 12')
    """
    return f"layer{'' if len(layers) == 1 else 's'} {numbers(layers) or 'none'}"


def printable(text: str) -> str:
    """The text with a replacement for each unprintable character, e.g. one that reverses the line."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def shortened(value: object) -> str:
    """The repr of a value, cut after 16 characters if it is long, e.g. a digest.

    >>> shortened("a" * 64), shortened("google/gemma-2-2b-it"), shortened(None)
    ("'aaaaaaaaaaaaaaa…", "'google/gemma-2-2b-it'", 'None')
    """
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:16]}…"


def differences(differ: Sequence[tuple[str, object, object]], most: int = 3) -> str:
    """What changed, in one line: the first few with their values, the others by name.

    Args:
        differ: name, recorded value, new value; the most important first.
        most: how many are shown with their values.

    >>> differences([("codec", "small", "raw"), ("seed", 0, 1), ("d_model", 8, 16)], 1)
    "codec was 'small' and is now 'raw'; also seed, d_model"
    """
    shown = [f"{name} was {shortened(old)} and is now {shortened(new)}" for name, old, new in differ[:most]]
    names = [name for name, *_ in differ[most:]]
    more = [f"{len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
    rest = [f"also {', '.join([*names[:_MOST_NAMES], *more])}"] if names else []
    return "; ".join([*shown, *rest])


def plot(values: Sequence[float], width: int = 64, height: int = 4, *, top: float | None = None) -> list[str]:
    """Bars from 0 to ``top``, top line first; a bar over several values shows their maximum.

    Args:
        values: numbers from 0 up; those that are not finite are drawn as 0.
        width: maximum number of bars.
        height: lines of eight levels each.
        top: the value that fills all lines; by default the maximum.

    >>> plot([4, 2, 1, 1], width=4, height=1)
    ['█▄▂▂']
    """
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    n_bars = min(width, len(finite))
    edges = [len(finite) * i // n_bars for i in range(n_bars + 1)]
    bars = [max(finite[a:b]) for a, b in pairwise(edges)]
    full = top or max(bars, default=0.0) or 1.0
    levels = [round(bar / full * 8 * height) for bar in bars]
    return [
        "".join(_BLOCKS[min(8, max(0, level - 8 * row))] for level in levels)
        for row in reversed(range(height))
    ]
