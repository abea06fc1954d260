"""How much less a run leaves unexplained than another, at equal L0.

Runs of one seed share initialisation and data order, so they are compared in pairs. The gain is the share of
the other's FVU that a run saves, with both FVUs at equal L0:

- as measured, where the two L0 differ by at most ``L0_TOLERANCE``;
- else interpolated, where both L0 lie between those of two agnostic runs of the seed: the other's FVU is
  moved to the run's L0 along the line (L0, log FVU) through these two measured points.

Nothing is extrapolated: elsewhere there is no gain at equal L0, and no number. Two cases can be judged all
the same. A run that is worse with more active features is worse at equal L0 too, and one that is better with
fewer is better; the difference as measured is then a bound (``Kind``).
"""

import math
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple

from .measured import Measured
from .verdicts import Answer, Interval, interval, judge

L0_TOLERANCE = 0.01
"""L0 that differ by at most this share count as equal."""

Series = Mapping[int, Measured]
"""Runs that have scores, by seed."""


class Point(NamedTuple):
    """L0 and FVU of a run; both above 0."""

    l0: float
    fvu: float

    @classmethod
    def of(cls, run: Measured) -> "Point | None":
        """Of one run; None where it lacks one of the two."""
        l0, fvu = run.score("l0"), run.score("fvu")
        return cls(l0, fvu) if l0 and fvu and l0 > 0 and fvu > 0 else None


class Curve(NamedTuple):
    """Two agnostic runs of one seed, between which FVU is interpolated."""

    low: Point
    high: Point

    @classmethod
    def through(cls, one: Measured, other: Measured) -> "Curve | None":
        """None where a run lacks a score, or both have the same L0."""
        points = sorted(point for run in (one, other) if (point := Point.of(run)))
        return cls(*points) if len(points) == 2 and points[0].l0 < points[1].l0 else None

    def spans(self, *l0: float) -> bool:
        """Whether all of these L0 lie between the two points."""
        return all(self.low.l0 <= value <= self.high.l0 for value in l0)

    def ratio(self, l0: float, of: float) -> float:
        """FVU at one L0 over that at another."""
        slope = math.log(self.high.fvu / self.low.fvu) / (self.high.l0 - self.low.l0)
        return math.exp(slope * (l0 - of))


class Kind(Enum):
    """What a difference in FVU is."""

    EQUAL_L0 = "the gain at equal L0"
    AT_LEAST = "better with fewer active features: the gain at equal L0 is at least this"
    AT_MOST = "worse with more active features: the gain at equal L0 is at most this"


class Comparison(NamedTuple):
    """Runs beside others, over seeds."""

    seen: Interval
    """The gain at equal L0, or its bound."""
    kind: Kind
    l0: float
    """Of the runs, mean over seeds."""
    other_l0: float

    @property
    def gain(self) -> Interval | None:
        """The gain at equal L0; None where only a bound is known."""
        return self.seen if self.kind is Kind.EQUAL_L0 else None

    def jointly(self, n: int) -> "Comparison":
        """With the interval of one of ``n`` comparisons of which the best counts."""
        return self._replace(seen=self.seen.jointly(n))

    def answer(self) -> Answer:
        """Whether there is a gain; a bound can only say what a bound may."""
        answer = judge(self.seen)
        if self.kind is Kind.AT_LEAST:
            return answer if answer is Answer.HOLDS else Answer.NOT_ENOUGH_DATA
        if self.kind is Kind.AT_MOST and answer is Answer.NO_DIFFERENCE:
            return Answer.SMALLER
        return answer


def curves(agnostic: Series, more_active: Series) -> dict[int, Curve]:
    """By seed, where two agnostic runs differ in L0."""
    by_seed = {
        seed: Curve.through(agnostic[seed], more_active[seed]) for seed in agnostic.keys() & more_active
    }
    return {seed: curve for seed, curve in by_seed.items() if curve}


def compare(runs: Series, others: Series, by_seed: Mapping[int, Curve] | None = None) -> Comparison | None:
    """Runs beside others of the same seeds; None where some seed cannot be compared at equal L0.

    Args:
        runs: whose gain it is.
        others: over which.
        by_seed: curves to interpolate along.
    """
    seeds = sorted(runs.keys() & others.keys())
    return compare_pairs(
        ((runs[seed], others[seed]) for seed in seeds), [(by_seed or {}).get(s) for s in seeds]
    )


def compare_pairs(
    pairs: Iterable[tuple[Measured, Measured]], by_pair: Iterable[Curve | None] = ()
) -> Comparison | None:
    """The same for pairs of runs, each pair of one seed."""
    points = [(Point.of(run), Point.of(other)) for run, other in pairs]
    known = [(run, other) for run, other in points if run and other]
    if not known or len(known) < len(points):
        return None
    between = list(by_pair) or [None] * len(known)
    by_seed = [_compared(run, other, curve) for (run, other), curve in zip(known, between, strict=True)]
    gains = [one for one in by_seed if one]
    bounds = {kind for _, kind in gains} - {Kind.EQUAL_L0}
    seen = interval(gain for gain, _ in gains)
    if len(gains) < len(known) or len(bounds) > 1 or seen is None:
        return None
    l0, other_l0 = (sum(pair[i].l0 for pair in known) / len(known) for i in range(2))
    return Comparison(seen, bounds.pop() if bounds else Kind.EQUAL_L0, l0, other_l0)


def _compared(run: Point, other: Point, curve: Curve | None) -> tuple[float, Kind] | None:
    as_measured, more = 1 - run.fvu / other.fvu, run.l0 - other.l0
    if is_equal(run.l0, other.l0):
        return as_measured, Kind.EQUAL_L0
    if curve and curve.spans(run.l0, other.l0):
        return 1 - run.fvu / (other.fvu * curve.ratio(run.l0, other.l0)), Kind.EQUAL_L0
    if more > 0 and as_measured <= 0:
        return as_measured, Kind.AT_MOST
    return (as_measured, Kind.AT_LEAST) if more < 0 and as_measured > 0 else None


def is_equal(l0: float, other: float) -> bool:
    """Whether two L0 count as equal."""
    return abs(l0 - other) <= L0_TOLERANCE * other


def worth(agnostic: Series, more_active: Series) -> tuple[float, float] | None:
    """L0 added by more active features, and the share of FVU that they save; means over seeds."""
    seeds = agnostic.keys() & more_active.keys()
    points = [(Point.of(agnostic[seed]), Point.of(more_active[seed])) for seed in seeds]
    known = [(b.l0 - a.l0, 1 - b.fvu / a.fvu) for a, b in points if a and b]
    if not known:
        return None
    added, saved = (sum(values) / len(known) for values in zip(*known, strict=True))
    return added, saved
