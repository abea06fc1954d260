"""Whether position helped, beyond seed noise: runs beside their controls, seed by seed.

"Position helped" is said only of a run that leaves less unexplained than its agnostic control, at equal L0
(see ``gains``) and with no more parameters, and less than the controls with shared adapters (where there are
adapters) and with shuffled positions: what those gain too is capacity, not position. A run with more
parameters than its agnostic control may lose, not win; one with fewer may win, not lose. Missing controls are
named.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .gains import Comparison, Curve, Kind, Series, compare, curves, worth
from .measured import Study
from .verdicts import MIN_SEEDS, Answer, Interval, all_of, percent, too_few_steps

SIZE_TOLERANCE = 0.01
"""Numbers of parameters that differ by at most this share count as equal."""

CONTROLS = {
    "agnostic": "an agnostic autoencoder",
    "shared": "one adapter for all ranges",
    "shuffled": "positions shuffled",
    "more-active": "an agnostic autoencoder with more active features",
}
"""What each control is, by role."""

_HAD_ADAPTERS = ("hierarchical", "masked", "separate")
"""Architectures with adapters of their own when sweeps did not record it."""


@dataclass(frozen=True)
class Finding:
    """One position-aware run, and what its controls say.

    Attributes:
        study: the study that it is compared in.
        name: of the run.
        answer: whether position helped.
        reason: the answer in a sentence, with its figures.
        gain: the share of the agnostic control's FVU that it saves at equal L0; None where it is not known.
        gains: the same of the other controls, by role, and of the run over them, as ``over shared``.
        missing: roles of the controls that were not trained, or have no scores.
    """

    study: str
    name: str
    answer: Answer
    reason: str
    gain: Interval | None = None
    gains: Mapping[str, Interval] = field(default_factory=dict[str, Interval])
    missing: tuple[str, ...] = ()


def findings(studies: Iterable[Study]) -> list[Finding]:
    """What the controls say of every run that has some, each judged by itself."""
    return [did_position_help(study, name) for study, name in controlled(studies)]


def controlled(studies: Iterable[Study]) -> list[tuple[Study, str]]:
    """Every run that has controls, once: in the study where it has the most."""
    best: dict[str, tuple[int, Study]] = {}
    for study in studies:
        for name in study.names():
            n_roles = len({run.control for run in study.runs if run.of == name})
            if n_roles > best.get(name, (0, study))[0]:
                best[name] = (n_roles, study)
    return [(study, name) for name, (_, study) in best.items()]


def over_agnostic(study: Study, name: str) -> Comparison | None:
    """A run beside its agnostic control; None where they cannot be compared at equal L0."""
    agnostic = study.control(name, "agnostic") or {}
    by_seed = curves(agnostic, study.control(name, "more-active") or {})
    return compare(study.series(name), agnostic, by_seed)


def did_position_help(study: Study, name: str, n_runs: int = 1) -> Finding:
    """What the controls of the run ``name`` say of it.

    Args:
        study: that it stands in.
        name: of the run.
        n_runs: of how many runs the best will count; intervals are widened for it.
    """
    aware = study.series(name)
    controls = {role: study.control(name, role) or {} for role in CONTROLS}
    wanted = [role for role in CONTROLS if role != "shared" or _has_adapters(study, name)]
    missing = tuple(role for role in wanted if not controls[role])
    if controls["shared"] == controls["shuffled"]:
        controls["shared"] = {}  # with position means alone, both are the same run
    agnostic, by_seed = controls["agnostic"], curves(controls["agnostic"], controls["more-active"])
    compared = {
        "agnostic": over_agnostic(study, name),
        "more-active": compare(controls["more-active"], agnostic),
    }
    for role in ("shared", "shuffled"):
        compared[role] = compare(controls[role], agnostic, by_seed)
        compared[f"over {role}"] = compare(aware, controls[role], by_seed)
    known = {key: one.jointly(n_runs) for key, one in compared.items() if one}
    tested = [role for role in ("shared", "shuffled") if controls[role] or role in missing]
    answer, reason = _answer(aware, controls, by_seed, known, tested)
    gains = {key: one.gain for key, one in known.items() if one.gain}
    if answer.is_effect and "agnostic" in gains:
        reason += _beside(gains, worth(agnostic, controls["more-active"]))
    if missing:
        reason += f"; missing: {', '.join(missing)}"
    gain = gains.pop("agnostic", None)
    return Finding(study.study, name, answer, reason, gain, gains, missing)


_REFUTED = {
    Answer.NO_DIFFERENCE: "position made no difference of 1 % or more",
    Answer.SMALLER: "position gained less than 1 %",
    Answer.CONTRADICTED: "position did not help",
}


def _answer(
    aware: Series,
    controls: Mapping[str, Series],
    by_seed: Mapping[int, Curve],
    compared: Mapping[str, Comparison],
    tested: Iterable[str],
) -> tuple[Answer, str]:
    unclear, agnostic = Answer.NOT_ENOUGH_DATA, controls["agnostic"]
    whole, size = compared.get("agnostic"), _size(aware, agnostic)
    if not aware.keys() & agnostic.keys() or size is None:
        return unclear, "no verdict: no agnostic run of the same seed has scores"
    if whole is None:
        return unclear, _no_equal_l0(aware, agnostic, by_seed)
    amount = f"{_less(whole)} than an agnostic autoencoder {_of_size(size)}{_figures(whole)}"
    short = [run for runs in (aware, *controls.values()) for run in runs.values() if run.has_too_few_steps]
    if short:
        return unclear, f"{too_few_steps(min(run.n_steps for run in short))}: {amount}"
    if whole.seen.n < MIN_SEEDS:
        return unclear, f"not enough seeds for a verdict (at least {MIN_SEEDS}): {amount}"
    answer = whole.answer()
    if answer is unclear:
        return unclear, f"too uncertain for a verdict: {amount}"
    if size > 1 + SIZE_TOLERANCE if answer.is_effect else size < 1 - SIZE_TOLERANCE:
        return unclear, f"no verdict, as sizes differ: {amount}"
    if answer.is_refuted:
        return answer, f"{_REFUTED[answer]}: {amount}"
    for role in tested:
        over = compared.get(f"over {role}")
        if over is None:
            return unclear, f"no verdict: {amount}, and nothing comparable with {CONTROLS[role]}"
        beside = f"{amount}, but {_less(over)} than with {CONTROLS[role]}{_figures(over)}"
        if over.answer().is_refuted:
            return over.answer(), f"the gain is capacity, not position: {beside}"
        if over.answer() is unclear:
            return unclear, f"too uncertain for a verdict: {beside}"
        answer = all_of([answer, over.answer()])
    helped = (
        "position helped" if answer is Answer.HOLDS else "position helped, if by less than 1 % is unclear"
    )
    return answer, f"{helped}: {amount}"


def _no_equal_l0(aware: Series, agnostic: Series, by_seed: Mapping[int, Curve]) -> str:
    """Why there is no gain at equal L0."""
    ours, theirs = _mean_l0(aware), _mean_l0(agnostic)
    if ours is None or theirs is None:
        return "no verdict: a run has no FVU or L0, as after training that diverged"
    ends = [f"{curve.low.l0:.1f} and {curve.high.l0:.1f}" for curve in by_seed.values()]
    between = f", and was measured between {ends[0]} alone" if ends else ""
    return f"no comparison at equal L0: L0 is {ours:.1f}, that of the agnostic control {theirs:.1f}{between}"


def _beside(gains: Mapping[str, Interval], more_active: tuple[float, float] | None) -> str:
    """What the other controls say of a gain due to position."""
    text = ""
    if more_active:
        added, saved = more_active
        more = "more" if gains["agnostic"].mean > saved else "no more"
        what = "one more active feature is" if 0.5 < added < 1.5 else f"{added:.1f} more active features are"
        text += f", {more} than {what} worth ({percent(saved)})"
    for role in ("shared", "shuffled"):
        left = gains.get(role)
        if left:
            is_gone = left.n >= MIN_SEEDS and left.low <= 0
            text += f"; with {CONTROLS[role]} "
            text += "the gain is gone" if is_gone else f"it is {percent(left.mean)}"
    return text


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
    """Ratio of parameters, of the pair of runs that differs most; None where a run lacks the number."""
    seeds = runs.keys() & others.keys()
    pairs = [(runs[seed].score("n_parameters"), others[seed].score("n_parameters")) for seed in seeds]
    ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
    return max(ratios, key=lambda ratio: abs(ratio - 1)) if ratios and len(ratios) == len(pairs) else None


def _of_size(ratio: float) -> str:
    if abs(ratio - 1) <= SIZE_TOLERANCE:
        return "of the same size"
    return f"with {percent(abs(1 / ratio - 1))} {'fewer' if ratio > 1 else 'more'} parameters"


def _less(one: Comparison) -> str:
    """How much less is unexplained: a figure at equal L0, none where only a bound is known."""
    if one.kind is Kind.EQUAL_L0:
        mean = one.seen.mean
        return (
            f"{percent(abs(mean))} {'less' if mean >= 0 else 'more'} unexplained at equal L0 ({one.l0:.1f})"
        )
    less, active = ("less", "fewer") if one.kind is Kind.AT_LEAST else ("more", "more")
    return f"{less} unexplained with {active} active features (L0 {one.l0:.1f} against {one.other_l0:.1f})"


def _figures(one: Comparison) -> str:
    if one.kind is Kind.EQUAL_L0:
        return one.seen.brackets(100 if one.seen.mean >= 0 else -100)
    return " (no figure at equal L0 was measured)"


def _mean_l0(runs: Series) -> float | None:
    known = [value for run in runs.values() if (value := run.score("l0")) is not None]
    return sum(known) / len(known) if known else None
