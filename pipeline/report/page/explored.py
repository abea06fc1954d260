"""What the feature explorer shows of one run: numbers and text, made by ``explore.py``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Excerpt(NamedTuple):
    """A context in which a feature has one of its largest activations."""

    context: int
    """Its index in the store; ``Explored.tokens`` has its tokens."""
    peak: float
    """The largest activation in size, with its sign."""
    position: int
    """Its position."""
    levels: NDArray[np.int8]
    """Activation at each position, in 127ths of the size of the feature's largest; [positions]."""


@dataclass(frozen=True)
class ExploredFeature:
    """One feature, over the ordinary tokens that were scanned.

    Attributes:
        number: its row in the decoder.
        density: share of tokens on which it fires.
        specificity: mutual information of firing and position range, in bits.
        is_above_chance: whether that exceeds 99 of 100 permutations of the positions.
        specialisation: bits of information about the range per firing, above chance.
        density_by_position: share of tokens on which it fires, in bins of neighbouring positions.
        mean_by_position: mean activation in the same bins, over all their tokens.
        density_by_range: the same in each range.
        mean_by_range: mean activation in each range, over all its tokens.
        base_by_range: the same without position adapters; None where there are none.
        decoder_by_range: cosine of its direction with what each range's adapter makes of it; likewise.
        neighbours: features of the nearest directions, with the cosine; the nearest first.
        excerpts: the contexts in which it is largest; the largest first, at least one.
    """

    number: int
    density: float
    specificity: float
    is_above_chance: bool
    specialisation: float
    density_by_position: Sequence[float]
    mean_by_position: Sequence[float]
    density_by_range: Sequence[float]
    mean_by_range: Sequence[float]
    base_by_range: Sequence[float] | None
    decoder_by_range: Sequence[float] | None
    neighbours: Sequence[tuple[int, float]]
    excerpts: Sequence[Excerpt]


@dataclass(frozen=True)
class Explored:
    """Features of one run.

    Attributes:
        label: of the run.
        folder: of the run.
        layer: that it was trained on.
        contexts: the first held-out context that was scanned, and one past the last.
        n_tokens: ordinary tokens among them.
        context_length: positions of a context.
        ranges: position ranges, as [start, stop).
        dictionary_size: features of the run.
        n_fired: how many of them fired at least once.
        features: those shown, ascending.
        tokens: ids of each context that an excerpt names; int32 [positions] each.
        texts: text of each of these ids; None without a tokenizer.
        note: why there is no text; else None.
    """

    label: str
    folder: str
    layer: int
    contexts: tuple[int, int]
    n_tokens: int
    context_length: int
    ranges: Sequence[tuple[int, int]]
    dictionary_size: int
    n_fired: int
    features: Sequence[ExploredFeature]
    tokens: Mapping[int, NDArray[np.int32]]
    texts: Mapping[int, str] | None
    note: str | None = None


class Unexplored(NamedTuple):
    """A run that has no explorer."""

    label: str
    folder: str
    reason: str
    """In one line, with what to do."""
