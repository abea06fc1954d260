"""Verdicts on effects: a mean over seeds, its confidence interval, and what that interval allows us to say.

The interval is Student's t, 95 %, n - 1 degrees of freedom. A claim holds only if the whole interval lies at
or above the claimed size, so noise never helps a claim: one that is larger than the truth holds in at most
2.5 % of experiments. Intervals that are judged together, as the parts of one claim or as runs of which the
best counts, are widened (Bonferroni) until they hold jointly with 95 %.

There is no verdict on fewer than ``MIN_SEEDS`` seeds, nor on runs of fewer than ``MIN_STEPS`` steps. What is
counted rather than measured (parameters, features) needs neither.
"""

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs]

CONFIDENCE = 0.95
SMALLEST = 0.01
"""Effects below this share count as no difference; also the size claimed where a claim names none."""
MIN_SEEDS = 3
PRESET_STEPS = 10_000
"""Steps of a run of the paper and, by default, of every preset."""
MIN_STEPS_SHARE = 0.05
"""Of the preset's steps. ``make paper`` takes 6 %; with 3 % six of its verdicts came out differently."""
MIN_STEPS = round(MIN_STEPS_SHARE * PRESET_STEPS)


class Answer(StrEnum):
    """What measurement says about a claim, the best first."""

    HOLDS = "holds"
    """The whole interval lies at or above the claimed size."""
    SIZE_UNCLEAR = "size unclear"
    """There is an effect, but the interval contains the claimed size."""
    SMALLER = "smaller than claimed"
    """The whole interval lies below the claimed size."""
    NO_DIFFERENCE = "no difference"
    """The whole interval lies within 1 % of 0."""
    CONTRADICTED = "contradicted"
    """The effect goes the other way; or what was counted is not what is claimed."""
    NOT_ENOUGH_DATA = "not enough data"
    """Too few seeds or steps, runs that cannot be compared, or an interval too wide for any of the above."""

    @property
    def is_effect(self) -> bool:
        """Whether there is an effect in the claimed direction."""
        return self in (Answer.HOLDS, Answer.SIZE_UNCLEAR)

    @property
    def is_refuted(self) -> bool:
        """Whether the claim, at the size that is claimed, is ruled out."""
        return self in (Answer.SMALLER, Answer.NO_DIFFERENCE, Answer.CONTRADICTED)


class Interval(NamedTuple):
    """A mean over seeds and its confidence interval, which is unbounded with one seed."""

    mean: float
    low: float
    high: float
    n: int
    """Seeds."""
    confidence: float = CONFIDENCE

    def text(self) -> str:
        """A share in percent, with its interval.

        >>> Interval(0.081, 0.0591, 0.103, 3).text()
        '8.1 % (95 % interval 5.9 to 10.3, 3 seeds)'
        """
        return f"{percent(self.mean)}{self.brackets()}"

    def brackets(self, factor: float = 100) -> str:
        """The interval in brackets, after a space; its ends are multiplied by ``factor``.

        >>> Interval(-0.1, -0.2, 0.0, 3).brackets(-100), Interval(2.0, -math.inf, math.inf, 1).brackets()
        (' (95 % interval 0.0 to 20.0, 3 seeds)', ' (one seed)')
        """
        if self.n < 2:
            return " (one seed)"
        low, high = sorted((factor * self.low, factor * self.high))
        return f" ({self.level()} interval {plain(low)} to {plain(high)}, {self.n} seeds)"

    def change(self) -> str:
        """A change, as an item of a list that ``changes`` ends with what the brackets are.

        >>> Interval(0.1, 0.05, 0.15, 3).change(), Interval(-0.1, -math.inf, math.inf, 1).change()
        ('+10.0 % (5.0 to 15.0)', '-10.0 %')
        """
        ends = f" ({plain(100 * self.low)} to {plain(100 * self.high)})" if self.n > 1 else ""
        return f"{self.change_alone()}{ends}"

    def change_alone(self) -> str:
        """A change without its interval.

        >>> Interval(0.1, 0.05, 0.15, 3).change_alone()
        '+10.0 %'
        """
        return f"{'+' if self.mean > 0 else ''}{percent(self.mean)}"

    def level(self) -> str:
        """The confidence.

        >>> Interval(0.1, 0.05, 0.15, 3).jointly(2).level()
        '97.5 %'
        """
        return f"{100 * self.confidence:.4g} %"

    def negated(self) -> "Interval":
        """The same effect with the opposite sign."""
        return Interval(-self.mean, -self.high, -self.low, self.n, self.confidence)

    def jointly(self, n_intervals: int) -> "Interval":
        """The interval widened so that so many of them hold jointly with 95 % (Bonferroni).

        >>> Interval(0.1, 0.05, 0.15, 3).jointly(2).change()
        '+10.0 % (2.8 to 17.2)'
        """
        if n_intervals < 2 or self.n < 2:
            return self
        confidence = 1 - (1 - CONFIDENCE) / n_intervals
        half = (self.high - self.mean) * _t(confidence, self.n) / _t(self.confidence, self.n)
        return Interval(self.mean, self.mean - half, self.mean + half, self.n, confidence)


def _t(confidence: float, n: int) -> float:
    """Half the width of an interval over ``n`` seeds, in standard errors."""
    return float(stdtrit(n - 1, (1 + confidence) / 2))


def plain(value: float) -> str:
    """A number with one decimal, or none where it is large.

    >>> plain(-0.01), plain(12.34), plain(12345.6)
    ('0.0', '12.3', '12,346')
    """
    text = f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    return "0.0" if text == "-0.0" else text


def percent(share: float) -> str:
    """A share in percent.

    >>> percent(0.081), percent(28.4)
    ('8.1 %', '2,840 %')
    """
    return f"{plain(100 * share)} %"


def interval(values: Iterable[float | None]) -> Interval | None:
    """The mean of one value per seed and its 95 % interval; None without any value.

    >>> interval([0.081, 0.083, None, 0.079]).text()
    '8.1 % (95 % interval 7.6 to 8.6, 3 seeds)'
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    n, mean = len(known), sum(known) / len(known)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    variance = sum((value - mean) ** 2 for value in known) / (n - 1)
    half = _t(CONFIDENCE, n) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, n)


def judge(effect: Interval | None, claimed: float = SMALLEST) -> Answer:
    """Whether there is an effect of the claimed size.

    Args:
        effect: over seeds, positive in the claimed direction.
        claimed: its least size, at least ``SMALLEST``.
    """
    if effect is None or effect.n < MIN_SEEDS:
        return Answer.NOT_ENOUGH_DATA
    if effect.low >= claimed:
        return Answer.HOLDS
    if effect.low > -SMALLEST and effect.high < SMALLEST:
        return Answer.NO_DIFFERENCE
    if effect.high < 0:
        return Answer.CONTRADICTED
    if effect.high < claimed:
        return Answer.SMALLER
    return Answer.SIZE_UNCLEAR if effect.low > 0 else Answer.NOT_ENOUGH_DATA


def judge_threshold(value: Interval, threshold: float) -> Answer:
    """Whether a value lies at or above a threshold."""
    if value.n < MIN_SEEDS or value.low < threshold <= value.high:
        return Answer.NOT_ENOUGH_DATA
    return Answer.HOLDS if value.low >= threshold else Answer.CONTRADICTED


def judge_absence(loss: Interval | None) -> Answer:
    """Whether nothing is lost: the claim that there is no effect of 1 % or more."""
    answer = judge(loss)
    if answer is Answer.HOLDS:
        return Answer.CONTRADICTED
    return Answer.HOLDS if answer.is_refuted else Answer.NOT_ENOUGH_DATA


def judge_count(n_true: int, n_seeds: int) -> Answer:
    """Whether a claim that each seed answers with yes or no holds: in all of them, or in none."""
    if n_seeds < MIN_SEEDS or 0 < n_true < n_seeds:
        return Answer.NOT_ENOUGH_DATA
    return Answer.HOLDS if n_true else Answer.CONTRADICTED


def all_of(answers: Iterable[Answer]) -> Answer:
    """The answer to a claim of several parts, all of which have to hold: that of the worst part.

    >>> all_of([Answer.HOLDS, Answer.NOT_ENOUGH_DATA]).value, all_of([Answer.HOLDS, Answer.SMALLER]).value
    ('not enough data', 'smaller than claimed')
    """
    parts = list(answers)
    for worst in (Answer.CONTRADICTED, Answer.NO_DIFFERENCE, Answer.SMALLER, Answer.NOT_ENOUGH_DATA):
        if worst in parts or not parts:
            return worst if parts else Answer.NOT_ENOUGH_DATA
    return Answer.SIZE_UNCLEAR if Answer.SIZE_UNCLEAR in parts else Answer.HOLDS


class Verdict(NamedTuple):
    """An answer and its reason, one sentence with figures."""

    answer: Answer
    reason: str


def too_few_seeds(n: int) -> str:
    """Why so few seeds give no verdict, to follow a figure; empty for enough.

    >>> too_few_seeds(2), too_few_seeds(3)
    ('; 2 of the 3 seeds that a verdict needs', '')
    """
    return f"; {n} of the {MIN_SEEDS} seeds that a verdict needs" if n < MIN_SEEDS else ""


def too_few_steps(steps: int) -> str:
    """Why runs of so few steps give no verdict, to stand before what was measured."""
    return f"not enough steps for a verdict ({steps:,} of at least {MIN_STEPS:,})"


def changes(effects: Mapping[str, Interval]) -> str:
    """A list of changes, and what their brackets are.

    >>> changes({"2 ranges": Interval(0.1, 0.05, 0.15, 3)})
    '2 ranges +10.0 % (5.0 to 15.0); 95 % intervals over 3 seeds'
    """
    items = "; ".join(f"{name} {effect.change()}" for name, effect in effects.items())
    fewest = min(effects.values(), key=lambda effect: effect.n)
    about = f"; {fewest.level()} intervals over {fewest.n} seeds" if fewest.n > 1 else ""
    return f"{items}{about}{too_few_seeds(fewest.n)}"
