"""How sure one can be: a mean over seeds, its interval, and the three answers that follow from it.

The interval is Student's t, 95 %, n - 1 degrees of freedom: wide with the three seeds that one usually has,
and without end with one.
"""

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs]

CONFIDENCE = 0.95
SMALLEST = 0.01
"""An effect that is surely smaller, as a share of what it is an effect on, counts as none."""


class Answer(StrEnum):
    """What became of a claim."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    CANNOT_BE_TOLD = "cannot be told"


class Interval(NamedTuple):
    """A mean over seeds, and where it may lie; of one seed anywhere."""

    mean: float
    low: float
    high: float
    n: int

    def words(self) -> str:
        """A share as percent, for people.

        >>> Interval(0.081, 0.0591, 0.103, 3).words()
        '8.1 % (95 % interval 5.9 to 10.3, 3 seeds)'
        """
        return f"{percent(self.mean)}{self.brackets()}"

    def brackets(self, factor: float = 100) -> str:
        """How sure it is, with a space before; the ends times ``factor``.

        >>> Interval(-0.1, -0.2, 0.0, 3).brackets(-100), Interval(2.0, -math.inf, math.inf, 1).brackets()
        (' (95 % interval 0.0 to 20.0, 3 seeds)', ' (one seed)')
        """
        if self.n < 2:
            return " (one seed)"
        low, high = sorted((factor * self.low, factor * self.high))
        return f" ({CONFIDENCE:.0%} interval {plain(low)} to {plain(high)}, {self.n} seeds)".replace(
            "%", " %"
        )

    def change(self) -> str:
        """A change, to stand in a list of them, all of which ``of_seeds`` explains at its end.

        >>> Interval(0.1, 0.05, 0.15, 3).change(), Interval(-0.1, -math.inf, math.inf, 1).change()
        ('+10.0 % (5.0 to 15.0)', '-10.0 %')
        """
        sign = "+" if self.mean > 0 else ""
        ends = f" ({plain(100 * self.low)} to {plain(100 * self.high)})" if self.n > 1 else ""
        return f"{sign}{percent(self.mean)}{ends}"

    def moved(self, by: float) -> "Interval":
        """All of it, less ``by``."""
        return Interval(self.mean - by, self.low - by, self.high - by, self.n)


def plain(value: float) -> str:
    """A number with one digit behind the point, or none where it is large.

    >>> plain(-0.01), plain(12.34), plain(12345.6)
    ('0.0', '12.3', '12,346')
    """
    text = f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    return "0.0" if text == "-0.0" else text


def percent(share: float) -> str:
    """A share as percent.

    >>> percent(0.081), percent(28.4)
    ('8.1 %', '2,840 %')
    """
    return f"{plain(100 * share)} %"


def interval(values: Iterable[float | None]) -> Interval | None:
    """The mean of one value a seed, and where it may lie; None where there are no values.

    >>> interval([0.081, 0.083, None, 0.079]).words()
    '8.1 % (95 % interval 7.6 to 8.6, 3 seeds)'
    """
    told = [value for value in values if value is not None and math.isfinite(value)]
    if not told:
        return None
    n, mean = len(told), sum(told) / len(told)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    variance = sum((value - mean) ** 2 for value in told) / (n - 1)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, n)


def judge(effect: Interval | None, claimed: float = SMALLEST) -> Answer:
    """Whether there is an effect of the size that is claimed.

    It holds where the interval lies above 0 and reaches ``claimed``; it does not where the interval ends
    below ``claimed``; all else, and one seed, cannot be told.
    """
    if effect is None or effect.n < 2:
        return Answer.CANNOT_BE_TOLD
    if effect.high < claimed:
        return Answer.DOES_NOT_HOLD
    return Answer.HOLDS if effect.low > 0 else Answer.CANNOT_BE_TOLD


def together(answers: Iterable[Answer]) -> Answer:
    """The answer to a claim of several parts: it holds with all of them, and falls with one.

    >>> together([Answer.HOLDS, Answer.CANNOT_BE_TOLD]).value
    'cannot be told'
    """
    found = list(answers)
    if Answer.DOES_NOT_HOLD in found:
        return Answer.DOES_NOT_HOLD
    every = bool(found) and all(answer is Answer.HOLDS for answer in found)
    return Answer.HOLDS if every else Answer.CANNOT_BE_TOLD


class Verdict(NamedTuple):
    """An answer and its reason, in one sentence with figures."""

    answer: Answer
    reason: str


def opposite(answer: Answer) -> Answer:
    """The answer to the contrary: what is surely no loss is kept."""
    turned = {Answer.HOLDS: Answer.DOES_NOT_HOLD, Answer.DOES_NOT_HOLD: Answer.HOLDS}
    return turned.get(answer, answer)


def of_one_seed(effect: Interval) -> str:
    """The reason why one seed tells nothing, to be put behind a figure; empty for more."""
    return "; one seed cannot be told from noise" if effect.n < 2 else ""


def changes(effects: Mapping[str, Interval]) -> str:
    """A list of changes, and what their intervals are.

    >>> changes({"2 ranges": Interval(0.1, 0.05, 0.15, 3)})
    '2 ranges +10.0 % (5.0 to 15.0); 95 % intervals over 3 seeds'
    """
    words = "; ".join(f"{name} {effect.change()}" for name, effect in effects.items())
    n = min(effect.n for effect in effects.values())
    return words + (f"; 95 % intervals over {n} seeds" if n > 1 else "; one seed cannot be told from noise")
