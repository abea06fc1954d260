"""Whether position helped, beyond seed noise: runs set beside their controls, seed by seed.

Runs of one seed share initialisation and data order, so their FVU are compared in pairs; the gain is the
share of the control's FVU that a run saves. It counts only at equal L0 and size:

- The control's FVU is taken at the run's own L0, along the line (L0, log FVU) through the agnostic control
  and the one with more active features, no further than these two lie apart. Without that pair L0 may differ
  by ``L0_TOLERANCE``. Beyond, nothing is told, unless a run is worse with more active features or better with
  fewer.
- A run with more parameters than its agnostic control may lose, not win; one with fewer may win, not lose.

"Position helped" is said only where the agnostic control is beaten, and those with shared adapters (where
there are adapters) and with shuffled positions are too: what they also gain is capacity, not position.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .measured import Measured, Study
from .verdicts import Answer, Interval, interval, judge, percent

L0_TOLERANCE = 0.02
"""By how much of itself L0 may differ where no line says what that is worth."""
SIZE_TOLERANCE = 0.01
"""By how much of themselves parameters may differ."""

CONTROLS = {
    "agnostic": "an agnostic autoencoder of equal size",
    "shared": "one adapter shared by all ranges",
    "shuffled": "positions shuffled in training",
    "more-active": "an agnostic autoencoder with more active features",
}
"""The controls by role, in words."""

Series = Mapping[int, Measured]
"""Runs that have scores, by seed."""


@dataclass(frozen=True)
class Finding:
    """One position-aware run, and what its controls say.

    Attributes:
        study: where it stands.
        name: of the run.
        answer: whether position helped.
        words: the answer in a sentence, with its figures.
        gain: how much less it leaves unexplained than the agnostic control, at equal L0; a share.
        gains: the same of each other control, by role, and of the run over it, as ``over shared``.
        missing: roles of the controls that were not made, or have no scores.
    """

    study: str
    name: str
    answer: Answer
    words: str
    gain: Interval | None = None
    gains: Mapping[str, Interval] = field(default_factory=dict[str, Interval])
    missing: tuple[str, ...] = ()


def findings(studies: Iterable[Study]) -> list[Finding]:
    """What the controls say of every run that has some, each once: in the study where it has the most."""
    best: dict[str, tuple[int, Study]] = {}
    for study in studies:
        for name in study.names():
            n_roles = len({run.control for run in study.runs if run.of == name})
            if n_roles > best.get(name, (0, study))[0]:
                best[name] = (n_roles, study)
    return [did_position_help(study, name) for name, (_, study) in best.items()]


def did_position_help(study: Study, name: str) -> Finding:
    """What the controls of the run ``name`` say of it."""
    aware = study.series(name)
    controls = {role: study.control(name, role) for role in CONTROLS}
    wanted = [role for role in CONTROLS if role != "shared" or _has_adapters(aware)]
    missing = tuple(role for role in wanted if not controls[role])
    agnostic, more = controls["agnostic"] or {}, controls["more-active"] or {}
    lines = _lines(agnostic, more)
    gains: dict[str, Interval] = {}
    if controls["shared"] and controls["shared"] == controls["shuffled"]:
        controls["shared"] = None  # of means alone both are one training
    for role in ("shared", "shuffled"):
        control = controls[role] or {}
        for key, found in (
            (role, _gain(control, agnostic, lines)),
            (f"over {role}", _gain(aware, control, lines)),
        ):
            gains |= {key: found} if found else {}
    worth = interval(
        1 - b.fvu / a.fvu
        for a, b in ((_point(agnostic[seed]), _point(more[seed])) for seed in agnostic.keys() & more.keys())
        if a and b
    )
    gains |= {"more-active": worth} if worth else {}
    gain = _gain(aware, agnostic, lines)
    tested = [role for role in ("shared", "shuffled") if controls[role] or role in missing]
    answer, words = _answer(aware, agnostic, gain, gains, tested)
    if answer is Answer.HOLDS:
        words += _beside(gain, gains, _more_active(agnostic, more))
    if missing:
        words += f"; missing: {', '.join(missing)}"
    return Finding(study.study, name, answer, words, gain, gains, missing)


def _answer(
    aware: Series,
    agnostic: Series,
    gain: Interval | None,
    gains: Mapping[str, Interval],
    tested: Iterable[str],
) -> tuple[Answer, str]:
    untold = Answer.CANNOT_BE_TOLD
    pairs = [(aware[seed], agnostic[seed]) for seed in sorted(aware.keys() & agnostic.keys())]
    sizes = [(a.score("n_parameters"), b.score("n_parameters")) for a, b in pairs]
    ratios = [a / b for a, b in sizes if a and b]
    if not pairs or len(ratios) < len(pairs):
        return untold, "cannot be told: no agnostic run of the same seed has scores"
    if gain is None or gain.n < len(pairs):
        l0 = [f"{_mean(series, 'l0'):.1f}" for series in (aware, agnostic)]
        return untold, f"not comparable: L0 is {l0[0]}, and {l0[1]} of the agnostic control"
    size = max(ratios, key=lambda ratio: abs(ratio - 1))
    amount = f"{_less(gain)} than an agnostic autoencoder {_of_size(size)}{_at_l0(pairs)}{_brackets(gain)}"
    answer = judge(gain)
    if gain.n < 2:
        return untold, f"cannot be told from noise, one seed: {amount}"
    if answer is Answer.CANNOT_BE_TOLD:
        return untold, f"cannot be told from noise: {amount}"
    if answer is Answer.DOES_NOT_HOLD:
        if size < 1 - SIZE_TOLERANCE:
            return untold, f"cannot be told: {amount}"
        return answer, f"position did not help: {amount}"
    if size > 1 + SIZE_TOLERANCE:
        return untold, f"cannot be told: {amount}"
    for role in tested:
        over = gains.get(f"over {role}")
        if over is None:
            return (
                untold,
                f"cannot be told: {amount}, but nothing comparable stands beside it with {CONTROLS[role]}",
            )
        if judge(over) is Answer.DOES_NOT_HOLD:
            return (
                Answer.DOES_NOT_HOLD,
                f"the gain is capacity, not position: {amount}, but {_less(over)} than with {CONTROLS[role]}"
                f"{_brackets(over)}",
            )
        if judge(over) is Answer.CANNOT_BE_TOLD:
            beside = f"{_less(over)} than with {CONTROLS[role]}{_brackets(over)}"
            return untold, f"cannot be told from noise: {amount}, but {beside}"
    return Answer.HOLDS, f"position helped: {amount}"


def _beside(gain: Interval | None, gains: Mapping[str, Interval], more_active: float | None) -> str:
    """What the other controls say of a gain that position made."""
    words = ""
    worth = gains.get("more-active")
    if gain and worth and more_active is not None:
        more = "more" if gain.mean > worth.mean else "no more"
        what = "one further active feature is" if 0.5 < more_active < 1.5 else f"{more_active:.1f} in L0 are"
        words += f", {more} than {what} worth ({percent(worth.mean)})"
    for role, changed in (
        ("shared", "with one adapter for all ranges"),
        ("shuffled", "with positions shuffled"),
    ):
        left = gains.get(role)
        if left:
            gone = left.n >= 2 and left.low <= 0
            words += f"; {changed} " + ("the gain is gone" if gone else f"it is {percent(left.mean)}")
    return words


def _less(gain: Interval) -> str:
    return f"{percent(abs(gain.mean))} {'less' if gain.mean >= 0 else 'more'} unexplained"


def _brackets(gain: Interval) -> str:
    return gain.brackets(100 if gain.mean >= 0 else -100)


def _of_size(ratio: float) -> str:
    if abs(ratio - 1) <= SIZE_TOLERANCE:
        return "of the same size"
    return f"with {percent(abs(1 / ratio - 1))} {'fewer' if ratio > 1 else 'more'} parameters"


def _at_l0(pairs: Iterable[tuple[Measured, Measured]]) -> str:
    """L0 of both, where it differs by more than may be passed over."""
    told = [(a.score("l0") or 0.0, b.score("l0") or 0.0) for a, b in pairs]
    ours, theirs = (sum(values) / len(told) for values in zip(*told, strict=True))
    return "" if abs(ours - theirs) <= L0_TOLERANCE * theirs else f", at L0 {ours:.1f} against {theirs:.1f}"


def _mean(runs: Series, score: str) -> float:
    told = [value for value in (run.score(score) for run in runs.values()) if value is not None]
    return sum(told) / len(told) if told else math.nan


def _more_active(agnostic: Series, more: Series) -> float | None:
    """By how much the L0 of these two differs."""
    found = _mean(more, "l0") - _mean(agnostic, "l0")
    return found if math.isfinite(found) else None


def _has_adapters(runs: Series) -> bool:
    """Whether there is something by range that all ranges could share."""
    return any(
        run.architecture in ("hierarchical", "masked", "separate")
        or run.setting("position_adapter", "none") != "none"
        for run in runs.values()
    )


class _Point(NamedTuple):
    l0: float
    fvu: float


class _Line(NamedTuple):
    """Through two agnostic runs of one seed."""

    slope: float
    """d log FVU / d L0."""
    reach: float
    """How far their L0 lie apart."""


def _point(run: Measured) -> _Point | None:
    l0, fvu = run.score("l0"), run.score("fvu")
    return _Point(l0, fvu) if l0 and fvu and l0 > 0 and fvu > 0 else None


def _lines(agnostic: Series, more: Series) -> dict[int, _Line]:
    found: dict[int, _Line] = {}
    for seed in agnostic.keys() & more.keys():
        a, b = _point(agnostic[seed]), _point(more[seed])
        if a and b and abs(b.l0 - a.l0) > 1e-3 * a.l0:
            apart = b.l0 - a.l0
            found[seed] = _Line(math.log(b.fvu / a.fvu) / apart, abs(apart))
    return found


def _gain(of: Series, over: Series, lines: Mapping[int, _Line]) -> Interval | None:
    """Over seeds: the share of the other's FVU that runs save at their own L0."""
    seeds = sorted(of.keys() & over.keys())
    return interval(_gain_of_a_seed(_point(of[seed]), _point(over[seed]), lines.get(seed)) for seed in seeds)


def _gain_of_a_seed(ours: _Point | None, theirs: _Point | None, line: _Line | None) -> float | None:
    """None where L0 differs by too much to tell."""
    if not ours or not theirs:
        return None
    plain = 1 - ours.fvu / theirs.fvu
    more = ours.l0 - theirs.l0
    near = L0_TOLERANCE * theirs.l0
    if line and abs(more) <= max(line.reach, near):
        return 1 - ours.fvu / (theirs.fvu * math.exp(line.slope * more))
    undoubted = (more > 0 and plain <= 0) or (more < 0 and plain > 0)
    return plain if abs(more) <= near or undoubted else None
