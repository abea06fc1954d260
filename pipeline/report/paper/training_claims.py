"""What the paper says of training: stability, pacing, ranges, masks, cost. See ``claims``.

Runs of one study that differ in one setting alone are set side by side, in pairs of one seed.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from ..measured import Measured, Study, mean_and_deviation
from ..selection import WARMUP, Wanted, beside_agnostic, of_study, of_the_paper, pairs, warmup_share
from ..verdicts import Answer, Interval, Verdict, changes, interval, judge, percent, together

LOWERED = 3.2
"""By what the paper says that layer norm lowers the variance of the gradient's norm."""
OVERHEAD = 0.15
HIGH = 0.1
"""A change of the FVU from which on sensitivity is called high; the paper names none."""


def _more_unexplained(found: Iterable[tuple[Measured, Measured]], score: str = "fvu") -> Interval | None:
    """How much more the first of each pair leaves unexplained; a share."""
    values: list[float | None] = []
    for changed, usual in found:
        a, b = changed.score(score), usual.score(score)
        values.append(a / b - 1 if a is not None and b else None)
    return interval(values)


def layer_norm_calms(studies: Sequence[Study]) -> Verdict | None:
    """Ratios of variances, by activation scale; the claim is of a size, so each scale must reach it."""
    runs = of_study(studies, "layer-norm")
    found = pairs(
        runs,
        ("layer_norm",),
        lambda run: run.setting("layer_norm") == "none",
        lambda run: run.setting("layer_norm") == "both",
    )
    logs: dict[str, list[float]] = {}
    for without, with_it in found:
        a, b = without.gradient_variance, with_it.gradient_variance
        if a and b:
            logs.setdefault(str(without.setting("activation_scale")), []).append(math.log(a / b))
    effects = {scale: interval(values) for scale, values in logs.items()}
    told = {scale: effect for scale, effect in effects.items() if effect}
    if not told:
        return None
    words = "; ".join(f"scale {scale}: {_factor(effect)}" for scale, effect in told.items())
    answer = together(judge(effect, math.log(LOWERED)) for effect in told.values())
    return Verdict(answer, f"the variance without is so many times that with layer norm: {words}")


def _factor(effect: Interval) -> str:
    """The interval of a logarithm, as a factor."""
    if effect.n < 2:
        return f"{math.exp(effect.mean):.3g} (one seed: cannot be told from noise)"
    ends = [math.exp(min(700.0, end)) for end in (effect.low, effect.high)]
    return f"{math.exp(effect.mean):.3g} (95 % interval {ends[0]:.3g} to {ends[1]:.3g}, {effect.n} seeds)"


def four_ranges_best(studies: Sequence[Study]) -> Verdict | None:
    """Holds where every other number leaves more unexplained; falls where one surely leaves no more."""
    runs = of_study(studies, "ranges")
    others = sorted({len(run.ranges) for run in runs} - {4})
    found = {
        n: _more_unexplained(
            pairs(runs, ("ranges",), lambda run, n=n: len(run.ranges) == n, lambda run: len(run.ranges) == 4)
        )
        for n in others
    }
    told = {n: effect for n, effect in found.items() if effect}
    if not told:
        return None
    words = changes({f"{n} range{'s' if n > 1 else ''}": effect for n, effect in told.items()})
    answer = together(judge(effect) for effect in told.values())
    return Verdict(answer, f"FVU against that of four ranges: {words}")


def _by_warmup(studies: Sequence[Study]) -> dict[float, Interval]:
    """By warm-up as a share of the steps: how much more is unexplained than with a tenth."""
    runs = of_study(studies, "warmup")
    shares = sorted({share for run in runs if (share := warmup_share(run)) is not None} - {0.1})
    found = {
        share: _more_unexplained(
            pairs(
                runs,
                WARMUP,
                lambda run, share=share: warmup_share(run) == share,
                lambda run: warmup_share(run) == 0.1,
            )
        )
        for share in shares
    }
    return {share: effect for share, effect in found.items() if effect}


def warmup_helps(studies: Sequence[Study]) -> Verdict | None:
    """Without warm-up more is left unexplained."""
    effect = _by_warmup(studies).get(0.0)
    if effect is None:
        return None
    words = changes({"without warm-up": effect})
    return Verdict(judge(effect), f"FVU against that of a tenth of the steps: {words}")


def sensitive_to_pacing(studies: Sequence[Study]) -> Verdict | None:
    """Some other warm-up changes the FVU by ``HIGH`` or more, either way, beyond noise."""
    found = _by_warmup(studies)
    if not found:
        return None
    words = changes({f"{100 * share:g} % of the steps": effect for share, effect in found.items()})
    reason = f"FVU against that of a warm-up of 10 %: {words}"
    sure = [effect for effect in found.values() if effect.n >= 2]
    if any(effect.low > HIGH or effect.high < -HIGH for effect in sure):
        return Verdict(Answer.HOLDS, reason)
    if len(sure) == len(found) and all(effect.low > -HIGH and effect.high < HIGH for effect in sure):
        return Verdict(Answer.DOES_NOT_HOLD, reason)
    return Verdict(Answer.CANNOT_BE_TOLD, reason)


def dropout_helps(studies: Sequence[Study]) -> Verdict | None:
    """Without dropout more is left unexplained; what it does to the base code is told too."""
    runs = of_study(studies, "dropout")
    found = pairs(
        runs, ("dropout",), lambda run: run.setting("dropout") == 0, lambda run: run.setting("dropout") == 0.1
    )
    effect, base = _more_unexplained(found), _more_unexplained(found, "fvu_base")
    if effect is None:
        return None
    told = {"FVU": effect} | ({"FVU of the base code": base} if base else {})
    return Verdict(judge(effect), f"without dropout: {changes(told)}")


def overhead_is_15_percent(studies: Sequence[Study]) -> Verdict | None:
    """Counted, so one run tells: within a point of 15 % at the width d/2 and four ranges."""
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
    found = by_width[width]
    reason = f"adapters of the stated width, d/2 = {width}, add {percent(found)}"
    near = [other for other, share in by_width.items() if abs(share - OVERHEAD) <= 0.01 and other != width]
    if near:
        reason += f"; a width of {near[0]} adds {percent(by_width[near[0]])}"
    holds = abs(found - OVERHEAD) <= 0.01
    return Verdict(Answer.HOLDS if holds else Answer.DOES_NOT_HOLD, reason)


def converges(studies: Sequence[Study]) -> Verdict | None:
    """All seeds of the paper's setting."""
    told = [run.converged for run in of_the_paper(studies) if run.converged is not None]
    if not told:
        return None
    answer = Answer.HOLDS if all(told) else Answer.DOES_NOT_HOLD
    return Verdict(answer, f"{sum(told)} of {len(told)} trainings of the paper's setting converged")


def slower(studies: Sequence[Study]) -> Verdict | None:
    """The paper's setting beside its agnostic control, to the FVU that the worse one ends with."""
    ratios: dict[str, list[float]] = {"tokens": [], "cpu_seconds": []}
    for run, control in beside_agnostic(studies):
        ends = [found[-1].value for found in (run.steps("fvu"), control.steps("fvu")) if found]
        if len(ends) < 2:
            continue
        for cost, found in ratios.items():
            ours, theirs = run.first_at(max(ends), cost), control.first_at(max(ends), cost)
            found += [ours / theirs - 1] if ours and theirs else []
    tokens, seconds = interval(ratios["tokens"]), interval(ratios["cpu_seconds"])
    if tokens is None:
        return None
    told = {"tokens": tokens} | ({"CPU-seconds": seconds} if seconds else {})
    return Verdict(judge(tokens), f"to the same FVU, against the agnostic control: {changes(told)}")


def masks_fail(studies: Sequence[Study]) -> Verdict | None:
    """Hard and Gaussian masks that stay as they are, at the usual learning rate."""
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
    """Holds where all runs failed and no control did; falls where all runs of one kind converged."""
    told: dict[str, list[tuple[Measured, Measured | None]]] = {}
    for study in studies:
        for entry in study.runs if study.study == "masks" else ():
            if entry.control is None and wanted(entry.run) and entry.run.converged is not None:
                control = (study.control(entry.name, "agnostic") or {}).get(entry.seed)
                told.setdefault(kind(entry.run), []).append((entry.run, control))
    if not told:
        return None
    words = "; ".join(f"{name}: {_converged(found)}" for name, found in told.items())
    failed = {name: [not run.converged for run, _ in found] for name, found in told.items()}
    if not all(any(runs) for runs in failed.values()):
        return Verdict(Answer.DOES_NOT_HOLD, words)
    controls = [control.converged for found in told.values() for _, control in found if control]
    if not all(controls):
        return Verdict(Answer.CANNOT_BE_TOLD, f"{words}; what fails without masks too is not failed by masks")
    answer = Answer.HOLDS if all(all(runs) for runs in failed.values()) else Answer.CANNOT_BE_TOLD
    return Verdict(answer, words)


def _converged(found: Sequence[tuple[Measured, Measured | None]]) -> str:
    """How many did, and to which FVU, with what is beside them."""
    runs, controls = [run for run, _ in found], [control for _, control in found if control]
    words = f"{_count(runs)} converged, to an FVU of {_fvu(runs)}"
    return words + (f" (without: {_count(controls)}, {_fvu(controls)})" if controls else "")


def _count(runs: Sequence[Measured]) -> str:
    return f"{sum(run.converged is True for run in runs)} of {len(runs)}"


def _fvu(runs: Sequence[Measured]) -> str:
    found = mean_and_deviation(run.score("fvu") for run in runs)
    return f"{found[0]:.3g}" if found else "nothing told"
