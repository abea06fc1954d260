"""The paper's claims about training: stability, pacing, ranges, masks, cost. See ``claims``.

Runs of one study that differ in one setting alone are compared, in pairs of one seed.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..gains import Kind, compare_pairs
from ..measured import Measured, Study, mean_and_deviation
from ..selection import WARMUP, Wanted, beside_agnostic, of_study, of_the_paper, pairs, warmup_share
from ..verdicts import (
    MIN_SEEDS,
    Answer,
    Interval,
    Verdict,
    all_of,
    changes,
    interval,
    judge,
    judge_count,
    percent,
    too_few_seeds,
)

LOWERED = 3.2
"""Factor by which the paper says that layer norm lowers the variance of the gradient's norm."""
OVERHEAD = 0.15
HIGH = 0.1
"""Sensitivity is high from this change in FVU on; the paper names no figure."""

Pairs = Sequence[tuple[Measured, Measured]]
"""Changed and usual runs."""


def _jointly(effects: Mapping[str, Interval]) -> dict[str, Interval]:
    """The effects of one claim, with intervals that hold jointly."""
    return {name: effect.jointly(len(effects)) for name, effect in effects.items()}


def layer_norm_calms(studies: Sequence[Study]) -> Verdict | None:
    """Ratio of variances at each activation scale, each of which has to reach the claimed factor."""
    logs: dict[str, list[float]] = {}
    for without, with_it in pairs(
        of_study(studies, "layer-norm"),
        ("layer_norm",),
        lambda run: run.setting("layer_norm") == "none",
        lambda run: run.setting("layer_norm") == "both",
    ):
        a, b = without.gradient_variance, with_it.gradient_variance
        if a and b:
            logs.setdefault(str(without.setting("activation_scale")), []).append(math.log(a / b))
    effects = _jointly({scale: effect for scale, values in logs.items() if (effect := interval(values))})
    if not effects:
        return None
    factors = "; ".join(f"scale {scale}: {_factor(effect)}" for scale, effect in effects.items())
    answer = all_of(judge(effect, math.log(LOWERED)) for effect in effects.values())
    return Verdict(answer, f"variance without layer norm over that with it: {factors}")


def _factor(effect: Interval) -> str:
    """The interval of a logarithm, as a factor."""
    factor = f"{math.exp(effect.mean):.3g}"
    if effect.n < 2:
        return f"{factor}{too_few_seeds(effect.n)}"
    low, high = (math.exp(min(700.0, end)) for end in (effect.low, effect.high))
    seeds = f"{effect.n} seeds{too_few_seeds(effect.n)}"
    return f"{factor} ({effect.level()} interval {low:.3g} to {high:.3g}, {seeds})"


def _more_unexplained(by_name: Mapping[str, Pairs]) -> tuple[dict[str, Interval], str]:
    """How much more each change leaves unexplained at equal L0; and which have no figure at equal L0."""
    compared = {name: compare_pairs(some) for name, some in by_name.items() if some}
    effects = {name: one.gain.negated() for name, one in compared.items() if one and one.gain}
    others = [name for name, one in compared.items() if one is None or one.kind is not Kind.EQUAL_L0]
    return _jointly(effects), f"; not comparable at equal L0: {', '.join(others)}" if others else ""


def _verdict_on_fvu(
    by_name: Mapping[str, Pairs], against: str, answer: Callable[[Mapping[str, Interval]], Answer]
) -> Verdict | None:
    effects, others = _more_unexplained(by_name)
    if not effects:
        return Verdict(Answer.NOT_ENOUGH_DATA, others.removeprefix("; ")) if others else None
    given = Answer.NOT_ENOUGH_DATA if others else answer(effects)
    return Verdict(given, f"FVU at equal L0 against {against}: {changes(effects)}{others}")


def _each_worse(effects: Mapping[str, Interval]) -> Answer:
    return all_of(judge(effect) for effect in effects.values())


def four_ranges_best(studies: Sequence[Study]) -> Verdict | None:
    """Every other number of ranges leaves more unexplained."""
    runs = of_study(studies, "ranges")
    by_name = {
        f"{n} range{'s' if n > 1 else ''}": pairs(
            runs, ("ranges",), lambda run, n=n: len(run.ranges) == n, lambda run: len(run.ranges) == 4
        )
        for n in sorted({len(run.ranges) for run in runs} - {4})
    }
    return _verdict_on_fvu(by_name, "that of four ranges", _each_worse)


def _by_warmup(studies: Sequence[Study]) -> dict[float, Pairs]:
    """Runs of each other warm-up, as a share of the steps, beside those with a tenth."""
    runs = of_study(studies, "warmup")
    shares = sorted({share for run in runs if (share := warmup_share(run)) is not None} - {0.1})
    return {
        share: pairs(
            runs,
            WARMUP,
            lambda run, share=share: warmup_share(run) == share,
            lambda run: warmup_share(run) == 0.1,
        )
        for share in shares
    }


def warmup_helps(studies: Sequence[Study]) -> Verdict | None:
    """Without warm-up more is left unexplained."""
    by_name = {"without warm-up": _by_warmup(studies).get(0.0, [])}
    return _verdict_on_fvu(by_name, "that with a warm-up of 10 % of the steps", _each_worse)


def sensitive_to_pacing(studies: Sequence[Study]) -> Verdict | None:
    """Some other warm-up changes the FVU by ``HIGH`` or more, either way."""
    by_name = {f"{100 * share:g} % of the steps": some for share, some in _by_warmup(studies).items()}
    return _verdict_on_fvu(by_name, "that with a warm-up of 10 % of the steps", _any_high)


def _any_high(effects: Mapping[str, Interval]) -> Answer:
    sure = [effect for effect in effects.values() if effect.n >= MIN_SEEDS]
    if any(effect.low >= HIGH or effect.high <= -HIGH for effect in sure):
        return Answer.HOLDS
    is_small = len(sure) == len(effects) and all(max(-e.low, e.high) < HIGH for e in sure)
    return Answer.SMALLER if is_small else Answer.NOT_ENOUGH_DATA


def dropout_helps(studies: Sequence[Study]) -> Verdict | None:
    """Without dropout more is left unexplained; the reason also has the FVU of the base code."""
    without = pairs(
        of_study(studies, "dropout"),
        ("dropout",),
        lambda run: run.setting("dropout") == 0,
        lambda run: run.setting("dropout") == 0.1,
    )
    verdict = _verdict_on_fvu({"without dropout": without}, "that with dropout", _each_worse)
    bases = [(run.score("fvu_base"), usual.score("fvu_base")) for run, usual in without]
    base = interval(a / b - 1 for a, b in bases if a is not None and b)
    if verdict is None or base is None:
        return verdict
    return Verdict(verdict.answer, f"{verdict.reason}; of the base code, at its own L0: {base.change()}")


def overhead_is_15_percent(studies: Sequence[Study]) -> Verdict | None:
    """Counted, so one run suffices: within a point of 15 % at the width d/2 and four ranges."""
    everywhere = [*of_study(studies, "overhead"), *of_the_paper(studies)]
    hierarchical = [run for run in everywhere if run.architecture == "hierarchical" and len(run.ranges) == 4]
    by_width = {
        int(run.setting("adapter_width")): share
        for run in hierarchical
        if isinstance(run.setting("adapter_width"), int) and (share := run.overhead) is not None
    }
    stated = {run.d_model // 2 for run in hierarchical if run.d_model}
    width = next(iter(stated & by_width.keys()), None)
    if width is None:
        return None
    overhead = by_width[width]
    reason = f"adapters of the stated width, d/2 = {width}, add {percent(overhead)}"
    near = [other for other, share in by_width.items() if abs(share - OVERHEAD) <= 0.01 and other != width]
    if near:
        reason += f"; a width of {near[0]} adds {percent(by_width[near[0]])}"
    holds = abs(overhead - OVERHEAD) <= 0.01
    return Verdict(Answer.HOLDS if holds else Answer.CONTRADICTED, reason)


def converges(studies: Sequence[Study]) -> Verdict | None:
    """All seeds of the paper's setting converge; one that does not is enough to contradict it."""
    known = [run.converged for run in of_the_paper(studies) if run.converged is not None]
    if not known:
        return None
    n = len(known)
    answer = judge_count(sum(known), n)
    if answer is Answer.NOT_ENOUGH_DATA and not too_few_seeds(n):
        answer = Answer.CONTRADICTED
    return Verdict(answer, f"{sum(known)} of {n} runs of the paper's setting converged{too_few_seeds(n)}")


def slower(studies: Sequence[Study]) -> Verdict | None:
    """The paper's setting beside its agnostic control, to the FVU that the worse one ends with."""
    ratios: dict[str, list[float]] = {"tokens": [], "cpu_seconds": []}
    for run, control in beside_agnostic(studies):
        ends = [steps[-1].value for steps in (run.steps("fvu"), control.steps("fvu")) if steps]
        if len(ends) < 2:
            continue
        for cost, of_cost in ratios.items():
            ours, theirs = run.first_at(max(ends), cost), control.first_at(max(ends), cost)
            of_cost += [ours / theirs - 1] if ours and theirs else []
    tokens, seconds = interval(ratios["tokens"]), interval(ratios["cpu_seconds"])
    if tokens is None:
        return None
    costs = {"tokens": tokens} | ({"CPU-seconds": seconds} if seconds else {})
    return Verdict(judge(tokens), f"to the same FVU, against the agnostic control: {changes(costs)}")


def masks_fail(studies: Sequence[Study]) -> Verdict | None:
    """Hard and Gaussian masks without a schedule, at the usual learning rate."""
    return _failed(
        studies,
        lambda run: (
            run.architecture == "masked"
            and run.setting("mask_schedule", "fixed") == "fixed"
            and not _steps_are_small(run)
        ),
        lambda run: f"{run.setting('mask')} mask",
    )


def small_steps_fail(studies: Sequence[Study]) -> Verdict | None:
    """Masks at a learning rate of 3e-5, clipped at 1."""
    return _failed(
        studies,
        lambda run: (
            run.architecture == "masked" and _steps_are_small(run) and run.setting("clip_norm", 1.0) == 1.0
        ),
        lambda run: f"{run.setting('mask')} mask",
    )


def progressive_fails(studies: Sequence[Study]) -> Verdict | None:
    """Masks with a schedule, and an encoder for each range."""

    def is_progressive(run: Measured) -> bool:
        scheduled = run.architecture == "masked" and run.setting("mask_schedule") == "curriculum"
        return scheduled or run.architecture == "separate"

    def kind(run: Measured) -> str:
        return (
            "separate encoders" if run.architecture == "separate" else f"scheduled {run.setting('mask')} mask"
        )

    return _failed(studies, is_progressive, kind)


def _steps_are_small(run: Measured) -> bool:
    rate = run.setting("learning_rate")
    return isinstance(rate, float) and rate <= 3.01e-5


def _failed(studies: Sequence[Study], wanted: Wanted, kind: Callable[[Measured], str]) -> Verdict | None:
    """Holds where all runs failed and no control did; contradicted where all runs of one kind converged."""
    by_kind: dict[str, list[tuple[Measured, Measured | None]]] = {}
    for study in studies:
        for entry in study.runs if study.study == "masks" else ():
            if entry.control is None and wanted(entry.run) and entry.run.converged is not None:
                control = (study.control(entry.name, "agnostic") or {}).get(entry.seed)
                by_kind.setdefault(kind(entry.run), []).append((entry.run, control))
    if not by_kind:
        return None
    fewest = min(map(len, by_kind.values()))
    reason = "; ".join(f"{name}: {_converged(some)}" for name, some in by_kind.items()) + too_few_seeds(
        fewest
    )
    answers = [judge_count(sum(not run.converged for run, _ in some), len(some)) for some in by_kind.values()]
    answer = all_of(answers)
    controls = [control.converged for some in by_kind.values() for _, control in some if control]
    if answer is not Answer.CONTRADICTED and not all(controls):
        return Verdict(Answer.NOT_ENOUGH_DATA, f"{reason}; training fails without masks too")
    return Verdict(answer, reason)


def _converged(some: Sequence[tuple[Measured, Measured | None]]) -> str:
    """How many converged, and to which FVU; with the same of their controls."""
    runs, controls = [run for run, _ in some], [control for _, control in some if control]
    text = f"{_count(runs)} converged, to an FVU of {_fvu(runs)}"
    return text + (f" (without: {_count(controls)}, {_fvu(controls)})" if controls else "")


def _count(runs: Sequence[Measured]) -> str:
    return f"{sum(run.converged is True for run in runs)} of {len(runs)}"


def _fvu(runs: Iterable[Measured]) -> str:
    mean = mean_and_deviation(run.score("fvu") for run in runs)
    return f"{mean[0]:.3g}" if mean else "no number"
