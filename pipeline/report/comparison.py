"""Whether position helped, beyond seed noise: runs set beside their controls, seed by seed.

"Position helped" is said only where a run leaves less unexplained than its agnostic control, at equal L0 (see
``gains``) and no greater size, and less than the controls with shared adapters (where there are adapters) and
with shuffled positions too: what these also gain is capacity, not position. A run with more parameters than
its agnostic control may lose, not win; one with fewer may win, not lose. What is missing is named.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .gains import Line, Point, Series, gain, is_within, lines, worth
from .measured import Study
from .verdicts import Answer, Interval, judge, percent

SIZE_TOLERANCE = 0.01
"""By how much of themselves parameters may differ."""

CONTROLS = {
    "agnostic": "an agnostic autoencoder",
    "shared": "one adapter for all ranges",
    "shuffled": "positions shuffled",
    "more-active": "an agnostic autoencoder with more active features",
}
"""The controls by role, in words."""

_HAD_ADAPTERS = ("hierarchical", "masked", "separate")
"""Architectures with adapters of their own when sweeps did not record it."""


@dataclass(frozen=True)
class Finding:
    """One position-aware run, and what its controls say.

    Attributes:
        study: where it stands.
        name: of the run.
        answer: whether position helped.
        words: the answer in a sentence, with its figures.
        gain: how much less it leaves unexplained than the agnostic control; a share.
        gains: the same of the other controls, by role, and of the run over them, as ``over shared``.
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
    controls = {role: study.control(name, role) or {} for role in CONTROLS}
    wanted = [role for role in CONTROLS if role != "shared" or _has_adapters(study, name)]
    missing = tuple(role for role in wanted if not controls[role])
    if controls["shared"] == controls["shuffled"]:
        controls["shared"] = {}  # of means alone both are one training
    agnostic = controls["agnostic"]
    by_seed = lines(agnostic, controls["more-active"])
    gains = {
        "agnostic": gain(aware, agnostic, by_seed),
        "more-active": gain(controls["more-active"], agnostic),
    }
    for role in ("shared", "shuffled"):
        gains[role] = gain(controls[role], agnostic, by_seed)
        gains[f"over {role}"] = gain(aware, controls[role], by_seed)
    told = {role: found for role, found in gains.items() if found}
    tested = [role for role in ("shared", "shuffled") if controls[role] or role in missing]
    answer, words = _answer(aware, agnostic, by_seed, told, tested)
    if answer is Answer.HOLDS:
        words += _beside(told, worth(agnostic, controls["more-active"]))
    if missing:
        words += f"; missing: {', '.join(missing)}"
    whole = told.pop("agnostic", None)
    return Finding(study.study, name, answer, words, whole, told, missing)


def _answer(
    aware: Series,
    agnostic: Series,
    by_seed: Mapping[int, Line],
    gains: Mapping[str, Interval],
    tested: Iterable[str],
) -> tuple[Answer, str]:
    untold = Answer.CANNOT_BE_TOLD
    seeds = aware.keys() & agnostic.keys()
    found, size = gains.get("agnostic"), _size(aware, agnostic)
    if not seeds or size is None:
        return untold, "cannot be told: no agnostic run of the same seed has scores"
    ours, theirs = _mean_l0(aware), _mean_l0(agnostic)
    if found is None or found.n < len(seeds):
        return untold, f"not comparable: L0 is {ours:.1f}, and {theirs:.1f} of the agnostic control"
    than = f"than an agnostic autoencoder {_of_size(size)}{_at_l0(ours, theirs, by_seed)}"
    amount = f"{_less(found)} {than}{_brackets(found)}"
    answer = judge(found)
    if answer is untold:
        return untold, f"cannot be told from noise: {amount}"
    wins = answer is Answer.HOLDS
    if (wins and size > 1 + SIZE_TOLERANCE) or (not wins and size < 1 - SIZE_TOLERANCE):
        return untold, f"cannot be told: {amount}"
    if not wins:
        return answer, f"position did not help: {amount}"
    for role in tested:
        over = gains.get(f"over {role}")
        if over is None:
            return untold, f"cannot be told: {amount}, and nothing comparable with {CONTROLS[role]}"
        beside = f"{amount}, but {_less(over)} than with {CONTROLS[role]}{_brackets(over)}"
        if judge(over) is Answer.DOES_NOT_HOLD:
            return Answer.DOES_NOT_HOLD, f"the gain is capacity, not position: {beside}"
        if judge(over) is untold:
            return untold, f"cannot be told from noise: {beside}"
    return Answer.HOLDS, f"position helped: {amount}"


def _beside(gains: Mapping[str, Interval], more_active: tuple[float, float] | None) -> str:
    """What the other controls say of a gain that position made."""
    words = ""
    if more_active:
        apart, saved = more_active
        more = "more" if gains["agnostic"].mean > saved else "no more"
        what = "one further active feature is" if 0.5 < apart < 1.5 else f"{apart:.1f} more in L0 are"
        words += f", {more} than {what} worth ({percent(saved)})"
    for role in ("shared", "shuffled"):
        left = gains.get(role)
        if left:
            gone = left.n >= 2 and left.low <= 0
            words += f"; with {CONTROLS[role]} " + (
                "the gain is gone" if gone else f"it is {percent(left.mean)}"
            )
    return words


def _has_adapters(study: Study, name: str) -> bool:
    """Whether there is something by range that all ranges could share."""
    recorded = {entry.has_adapters for entry in study.runs if entry.name == name} - {None}
    return True in recorded or (
        not recorded
        and any(
            run.architecture in _HAD_ADAPTERS or run.setting("position_adapter", "none") != "none"
            for run in study.series(name).values()
        )
    )


def _size(runs: Series, others: Series) -> float | None:
    """Parameters over those of the others, of the pair that differs most; None where not all tell."""
    seeds = runs.keys() & others.keys()
    pairs = [(runs[seed].score("n_parameters"), others[seed].score("n_parameters")) for seed in seeds]
    ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
    return max(ratios, key=lambda ratio: abs(ratio - 1)) if ratios and len(ratios) == len(pairs) else None


def _of_size(ratio: float) -> str:
    if abs(ratio - 1) <= SIZE_TOLERANCE:
        return "of the same size"
    return f"with {percent(abs(1 / ratio - 1))} {'fewer' if ratio > 1 else 'more'} parameters"


def _at_l0(ours: float, theirs: float, by_seed: Mapping[int, Line]) -> str:
    """What was made of an L0 that differs by more than may be passed over."""
    line = min(by_seed.values(), key=lambda line: line.reach, default=None)
    if is_within(ours - theirs, Point(theirs, 1.0)):
        return ""
    if line and is_within(ours - theirs, Point(theirs, 1.0), line):
        return f", both at L0 {ours:.1f}"
    return f", at L0 {ours:.1f} against {theirs:.1f}"


def _less(found: Interval) -> str:
    return f"{percent(abs(found.mean))} {'less' if found.mean >= 0 else 'more'} unexplained"


def _brackets(found: Interval) -> str:
    return found.brackets(100 if found.mean >= 0 else -100)


def _mean_l0(runs: Series) -> float:
    told = [value for value in (run.score("l0") for run in runs.values()) if value is not None]
    return sum(told) / len(told) if told else math.nan
