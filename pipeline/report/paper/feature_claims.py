"""What the paper says of features: kept, stable, in clusters, interpretable. See ``claims``."""

from collections.abc import Sequence

from ..measured import Measured, Study
from ..selection import beside_agnostic, of_study, of_the_paper, pairs
from ..verdicts import Answer, Verdict, changes, interval, judge, of_one_seed, opposite, percent, together

RETAINED = 0.15
"""By what share the paper says that the residual improves retention."""

POSITION_TASKS = ("bracket depth", "indentation", "distance to line start", "first use")


def retention_by_residual(studies: Sequence[Study]) -> Verdict | None:
    """Relative, in pairs of one seed."""
    found = pairs(
        of_study(studies, "residual"),
        ("residual",),
        lambda run: run.setting("residual") is True,
        lambda run: run.setting("residual") is False,
    )
    values = [(a.score("retention"), b.score("retention")) for a, b in found]
    effect = interval(with_it / without - 1 for with_it, without in values if with_it is not None and without)
    if effect is None:
        return None
    words = changes({"retention": effect})
    return Verdict(judge(effect, RETAINED), f"with the residual against without: {words}")


def decoder_is_stable(studies: Sequence[Study]) -> Verdict | None:
    """Most directions are still those of the end of the base phase."""
    kept = interval(run.decoder_kept for run in of_the_paper(studies))
    if kept is None:
        return None
    return Verdict(
        judge(kept.moved(0.5), 0.0),
        f"{kept.words()} of the features keep their direction from the base phase on{of_one_seed(kept)}",
    )


def base_survives(studies: Sequence[Study]) -> Verdict | None:
    """The base code leaves no more unexplained at the end than when the adapters came in."""
    runs = of_the_paper(studies)
    lost = interval(kept - 1 for run in runs if (kept := run.base_kept) is not None)
    if lost is None:
        return None
    words = changes({"FVU of the base code alone": lost})
    return Verdict(opposite(judge(lost)), f"from the base phase to the end: {words}")


def four_clusters(studies: Sequence[Study]) -> Verdict | None:
    """Four is best, and better than where firings fall at random, in every seed."""
    found = [clusters for run in of_the_paper(studies) if (clusters := run.best_clusters) is not None]
    if not found:
        return None
    four = [n == 4 and score > null for n, score, null in found]
    words = ", ".join(f"{n} ({score:.2f}, {null:.2f})" for n, score, null in found)
    reason = f"best number of clusters in each seed (its silhouette, and by chance): {words}"
    if len(found) < 2:
        return Verdict(Answer.CANNOT_BE_TOLD, f"{reason}; one seed cannot be told from noise")
    if all(four):
        return Verdict(Answer.HOLDS, reason)
    return Verdict(Answer.CANNOT_BE_TOLD if any(four) else Answer.DOES_NOT_HOLD, reason)


def is_overcomplete(studies: Sequence[Study]) -> Verdict | None:
    """Counted."""
    sizes = [(run.score("dictionary_size"), run.d_model) for run in of_the_paper(studies)]
    told = [(int(k), d) for k, d in sizes if k and d]
    if not told:
        return None
    k, d = min(told)
    answer = Answer.HOLDS if k > d else Answer.DOES_NOT_HOLD
    return Verdict(answer, f"{k:,} features, and activations of {d:,} numbers")


def probes_like_activations(studies: Sequence[Study]) -> Verdict | None:
    """The paper's figures are of raw activations; the question that is left is whether codes do as well."""
    runs = of_the_paper(studies)
    lost = interval(
        raw - codes
        for run in runs
        if (raw := run.probe("activations", "all")) is not None
        and (codes := run.probe("codes", "all")) is not None
    )
    if lost is None:
        return None
    words = ", ".join(
        f"{name} {percent(mean.mean)} / {percent(first.mean)} / {percent(fifth.mean)}"
        for name in ("activations", "codes")
        if (mean := interval(run.probe(name, "all") for run in runs))
        and (first := interval(run.probe(name, "1") for run in runs))
        and (fifth := interval(run.probe(name, "5") for run in runs))
    )
    source = ", ".join(sorted({str(run.probing_source) for run in runs if run.probing_source}))
    return Verdict(
        opposite(judge(lost)),
        f"all / top-1 / top-5, {source} tasks: {words}; codes lose {lost.words()} on all{of_one_seed(lost)}",
    )


def less_interpretable(studies: Sequence[Study]) -> Verdict | None:
    """One feature, and five, tell a class less well than those of the agnostic control."""
    effects = {k: interval(_probe_loss(studies, k)) for k in ("1", "5")}
    told = {k: effect for k, effect in effects.items() if effect}
    if not told:
        return None
    words = changes({f"top-{k}": effect for k, effect in told.items()})
    answer = together(judge(effect) for effect in told.values())
    return Verdict(answer, f"accuracy lost against the agnostic control: {words}")


def position_tasks(studies: Sequence[Study]) -> Verdict | None:
    """Five features tell a class of a position-sensitive task better than those of the agnostic control."""
    gains = interval(_task_gain(ours, theirs) for ours, theirs in beside_agnostic(studies))
    if gains is None:
        return None
    return Verdict(judge(gains), f"against the agnostic control: {changes({'accuracy': gains})}")


def _task_gain(ours: Measured, theirs: Measured) -> float | None:
    """Mean over the tasks that both were probed on."""
    both = [(ours.probe("codes", "5", task), theirs.probe("codes", "5", task)) for task in POSITION_TASKS]
    told = [a - b for a, b in both if a is not None and b is not None]
    return sum(told) / len(told) if told else None


def _probe_loss(studies: Sequence[Study], k: str) -> list[float]:
    probes = [(theirs.probe("codes", k), ours.probe("codes", k)) for ours, theirs in beside_agnostic(studies)]
    return [theirs - ours for theirs, ours in probes if theirs is not None and ours is not None]
