"""The paper's claims about features: retained, stable, clustered, interpretable. See ``claims``."""

from collections.abc import Sequence

from ..measured import Measured, Study
from ..selection import beside_agnostic, of_study, of_the_paper, pairs
from ..verdicts import (
    Answer,
    Verdict,
    all_of,
    changes,
    interval,
    judge,
    judge_absence,
    judge_count,
    judge_threshold,
    percent,
    too_few_seeds,
)

RETAINED = 0.15
"""Share by which the paper says that the residual improves retention."""
MOST = 0.5
"""Share of the features from which on a base counts as stable; the paper names none."""

POSITION_TASKS = ("bracket depth", "indentation", "distance to line start", "first use")


def retention_by_residual(studies: Sequence[Study]) -> Verdict | None:
    """Relative change, in pairs of one seed."""
    both = pairs(
        of_study(studies, "residual"),
        ("residual",),
        lambda run: run.setting("residual") is True,
        lambda run: run.setting("residual") is False,
    )
    values = [(a.score("retention"), b.score("retention")) for a, b in both]
    effect = interval(with_it / without - 1 for with_it, without in values if with_it is not None and without)
    if effect is None:
        return None
    answer = judge(effect, RETAINED)
    return Verdict(answer, f"with the residual against without: {changes({'retention': effect})}")


def decoder_is_stable(studies: Sequence[Study]) -> Verdict | None:
    """Most directions are still those of the end of the base phase."""
    kept = interval(run.decoder_kept for run in of_the_paper(studies))
    if kept is None:
        return None
    return Verdict(
        judge_threshold(kept, MOST),
        f"{kept.text()} of the features keep their direction after the base phase{too_few_seeds(kept.n)}",
    )


def base_survives(studies: Sequence[Study]) -> Verdict | None:
    """The base code leaves no more unexplained at the end than at the end of the base phase."""
    runs = of_the_paper(studies)
    lost = interval(kept - 1 for run in runs if (kept := run.base_kept) is not None)
    if lost is None:
        return None
    change = changes({"FVU of the base code alone": lost})
    return Verdict(judge_absence(lost), f"from the end of the base phase to the end: {change}")


def four_clusters(studies: Sequence[Study]) -> Verdict | None:
    """Four is the best number, and better than with randomly placed firings, in every seed."""
    clusters = [best for run in of_the_paper(studies) if (best := run.best_clusters) is not None]
    if not clusters:
        return None
    n_four = sum(n == 4 and score > null for n, score, null in clusters)
    seeds = ", ".join(f"{n} ({score:.2f}, {null:.2f})" for n, score, null in clusters)
    reason = f"best number of clusters in each seed (its silhouette, and by chance): {seeds}"
    return Verdict(judge_count(n_four, len(clusters)), reason + too_few_seeds(len(clusters)))


def is_overcomplete(studies: Sequence[Study]) -> Verdict | None:
    """Counted, so one run suffices."""
    sizes = [(run.score("dictionary_size"), run.d_model) for run in of_the_paper(studies)]
    known = [(int(k), d) for k, d in sizes if k and d]
    if not known:
        return None
    k, d = min(known)
    answer = Answer.HOLDS if k > d else Answer.CONTRADICTED
    return Verdict(answer, f"{k:,} features, and activations of width {d:,}")


def probes_like_activations(studies: Sequence[Study]) -> Verdict | None:
    """The paper's figures are of raw activations, so the question is whether codes do as well."""
    runs = of_the_paper(studies)
    lost = interval(
        raw - codes
        for run in runs
        if (raw := run.probe("activations", "all")) is not None
        and (codes := run.probe("codes", "all")) is not None
    )
    if lost is None:
        return None
    accuracies = ", ".join(
        f"{name} {percent(on_all.mean)} / {percent(first.mean)} / {percent(fifth.mean)}"
        for name in ("activations", "codes")
        if (on_all := interval(run.probe(name, "all") for run in runs))
        and (first := interval(run.probe(name, "1") for run in runs))
        and (fifth := interval(run.probe(name, "5") for run in runs))
    )
    source = ", ".join(sorted({str(run.probing_source) for run in runs if run.probing_source}))
    return Verdict(
        judge_absence(lost),
        f"all / top-1 / top-5, {source} tasks: {accuracies}; codes lose {lost.text()} on all"
        f"{too_few_seeds(lost.n)}",
    )


def less_interpretable(studies: Sequence[Study]) -> Verdict | None:
    """Probes on one feature, and on five, are less accurate than those of the agnostic control."""
    losses = {f"top-{k}": interval(_probe_losses(studies, k)) for k in ("1", "5")}
    known = {name: loss for name, loss in losses.items() if loss}
    if not known:
        return None
    joint = {name: loss.jointly(len(known)) for name, loss in known.items()}
    answer = all_of(judge(loss) for loss in joint.values())
    return Verdict(answer, f"accuracy lost against the agnostic control: {changes(joint)}")


def position_tasks(studies: Sequence[Study]) -> Verdict | None:
    """Probes on five features are more accurate on position-sensitive tasks than the agnostic control's."""
    gains = interval(_task_gain(ours, theirs) for ours, theirs in beside_agnostic(studies))
    if gains is None:
        return None
    return Verdict(judge(gains), f"against the agnostic control: {changes({'accuracy': gains})}")


def _task_gain(ours: Measured, theirs: Measured) -> float | None:
    """Mean over the tasks that both were probed on."""
    both = [(ours.probe("codes", "5", task), theirs.probe("codes", "5", task)) for task in POSITION_TASKS]
    gains = [a - b for a, b in both if a is not None and b is not None]
    return sum(gains) / len(gains) if gains else None


def _probe_losses(studies: Sequence[Study], k: str) -> list[float]:
    probes = [(theirs.probe("codes", k), ours.probe("codes", k)) for ours, theirs in beside_agnostic(studies)]
    return [theirs - ours for theirs, ours in probes if theirs is not None and ours is not None]
