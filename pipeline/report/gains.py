"""How much less a run leaves unexplained than another, at an equal number of active features.

Runs of one seed share initialisation and data order, so they are compared in pairs: the gain is the share of
the other's FVU that a run saves. The other's FVU is taken at the run's own L0, along the line (L0, log FVU)
through two agnostic runs that differ in L0, as far as ``L0_REACH`` or as these two lie apart. Without such a
line L0 may differ by ``L0_TOLERANCE``. Beyond, there is no gain to speak of, unless no line is needed: a run
that is worse with more active features is worse, and one that is better with fewer is better, by at least
what is seen.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from .measured import Measured
from .verdicts import Interval, interval

L0_TOLERANCE = 0.02
"""By how much of itself L0 may differ where no line says what that is worth."""
L0_REACH = 0.1
"""By how much of itself where a line does."""

Series = Mapping[int, Measured]
"""Runs that have scores, by seed."""


class Point(NamedTuple):
    """Where a run stands; both are above 0."""

    l0: float
    fvu: float

    @classmethod
    def of(cls, run: Measured) -> "Point | None":
        """Of one run, where its scores tell."""
        l0, fvu = run.score("l0"), run.score("fvu")
        return cls(l0, fvu) if l0 and fvu and l0 > 0 and fvu > 0 else None


class Line(NamedTuple):
    """Through two agnostic runs of one seed."""

    slope: float
    """d log FVU / d L0."""
    reach: float
    """How far their L0 lie apart."""


def lines(agnostic: Series, more_active: Series) -> dict[int, Line]:
    """By seed, where both runs tell and differ in L0."""
    found: dict[int, Line] = {}
    for seed in agnostic.keys() & more_active.keys():
        a, b = Point.of(agnostic[seed]), Point.of(more_active[seed])
        if a and b and abs(b.l0 - a.l0) > 1e-3 * a.l0:
            found[seed] = Line(math.log(b.fvu / a.fvu) / (b.l0 - a.l0), abs(b.l0 - a.l0))
    return found


def gain(runs: Series, others: Series, by_seed: Mapping[int, Line] | None = None) -> Interval | None:
    """The share of the others' FVU that runs save at their own L0, over seeds; None where no seed tells.

    Args:
        runs: what is compared.
        others: what with.
        by_seed: lines to go along, where there are any.
    """
    seeds = sorted(runs.keys() & others.keys())
    return interval(_gain(runs[seed], others[seed], (by_seed or {}).get(seed)) for seed in seeds)


def _gain(run: Measured, other: Measured, line: Line | None) -> float | None:
    ours, theirs = Point.of(run), Point.of(other)
    if not ours or not theirs:
        return None
    seen = 1 - ours.fvu / theirs.fvu
    more = ours.l0 - theirs.l0
    if line and is_within(more, theirs, line):
        return 1 - ours.fvu / (theirs.fvu * math.exp(line.slope * more))
    undoubted = (more > 0 and seen <= 0) or (more < 0 and seen > 0)
    return seen if is_within(more, theirs) or undoubted else None


def is_within(more: float, of: Point, line: Line | None = None) -> bool:
    """Whether L0 may differ by ``more`` from that ``of`` a run."""
    return abs(more) <= (max(L0_REACH * of.l0, line.reach) if line else L0_TOLERANCE * of.l0)


def worth(agnostic: Series, more_active: Series) -> tuple[float, float] | None:
    """By how much L0 of two agnostic runs differs, and the share of FVU that this saves; means over seeds."""
    pairs = [
        (Point.of(agnostic[seed]), Point.of(more_active[seed]))
        for seed in agnostic.keys() & more_active.keys()
    ]
    told = [(b.l0 - a.l0, 1 - b.fvu / a.fvu) for a, b in pairs if a and b]
    if not told:
        return None
    apart, saved = (sum(values) / len(told) for values in zip(*told, strict=True))
    return apart, saved
