"""Scores of one run in a terminal; ``posae evaluate --json`` prints all of them."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ..pipeline.evaluate.scoring.evaluation import Evaluation
from ..store.plain_text import counted
from .display import console, show_by_position


def show_scores(evaluation: Evaluation) -> None:
    """Scores that no comparison of runs shows: a line for each kind, and a chart of FVU by position."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _lines(evaluation).items():
        table.add_row(name, Text(text))
    console.print(table)
    if evaluation.fvu_by_position:
        console.print("\n[bold]FVU by position[/]")
        show_by_position([value or 0.0 for value in evaluation.fvu_by_position], digits=4)


def _lines(evaluation: Evaluation) -> dict[str, str]:
    outliers, density, drift = evaluation.norm_outliers, evaluation.density_histogram, evaluation.drift
    start, stop = evaluation.contexts
    lines = {
        "tokens": f"{evaluation.n_rows:,} in contexts {start:,} to {stop - 1:,}",
        "FVU": f"{_number(evaluation.fvu)}; with special tokens {_number(evaluation.fvu_with_special)}",
        "L0": f"{evaluation.l0:.2f}; above .001 in size {evaluation.l0_above:.2f}; by range "
        + ", ".join(
            f"{name} {_number(l0, 2)}"
            for name, l0 in zip(evaluation.ranges, evaluation.l0_by_range, strict=True)
        ),
    }
    if outliers:
        lines["FVU"] += (
            f", without {outliers.n_rows:,} norm outliers (above {outliers.threshold:.1f}) "
            f"{_number(evaluation.fvu_without_outliers)}"
        )
    if evaluation.store.get("trained_from") is False:
        lines["store"] = f"{evaluation.store['path']}, {_about_another_store(evaluation)}"
    elif evaluation.store.get("trained_from", True) is None:
        lines["store"] = "whether the run was trained on the contexts scored is unknown"
    if evaluation.fvu_base is not None:
        lines["base code"] = (
            f"FVU {_number(evaluation.fvu_base)} alone; retention {_number(evaluation.retention, 3)}"
        )
    if drift:
        lines["drift"] = (
            f"cosine {drift.cosine_mean:.3f} with the end of warm-up, {drift.kept_share:.1%} above .9"
        )
    if density:
        often = sum(density.counts[density.edges.index(-1.0) :])
        lines["features"] = f"{density.never:,} never fired, {often:,} on more than a tenth of the tokens"
    if evaluation.position_features:
        lines["position"] = (
            f"{evaluation.position_features.features:,} features encode a position, "
            f"{evaluation.position_features.slots:.2f} of them active per token"
        )
    lines |= _about_specificity(evaluation) | _about_groups(evaluation) | _about_ce_loss(evaluation)
    if evaluation.training_seconds is not None:
        cpu = (
            f", {evaluation.training_cpu_seconds:,.0f} s of CPU"
            if evaluation.training_cpu_seconds is not None
            else ""
        )
        lines["training"] = f"{evaluation.training_seconds:,.0f} s{cpu}"
    return lines


def _about_another_store(evaluation: Evaluation) -> str:
    """What a store that the run was not trained from has in common with the one that it was."""
    store = evaluation.store
    n_seen, n_contexts = store.get("seen_contexts"), evaluation.contexts[1] - evaluation.contexts[0]
    text = "which the run was not trained from"
    if n_seen:
        contexts = counted(n_contexts, "context")
        text += f"; but it was trained on {n_seen:,} of the {contexts} scored: not held-out scores"
    elif n_seen is None:
        text += "; whether it was trained on the same contexts is unknown"
    if store.get("same_model") is False:
        text += "; made with another model"
    elif store.get("same_model") is None:
        text += "; whether the same model made it is unknown"
    return text


def _about_specificity(evaluation: Evaluation) -> dict[str, str]:
    scores = evaluation.specificity
    if scores is None or scores.mean is None:
        return {}
    return {
        "specificity": f"{scores.mean:.5f} bits of range in firing, {_number(scores.null_mean, 5)} by "
        f"chance; {_percent(scores.above_null_share)} of features above chance, "
        f"{_percent(scores.above_null_share_turned)} with contexts rotated; rank correlation with "
        f"interpretability {_number(scores.curve.rank_correlation, 2)}"
    }


def _about_groups(evaluation: Evaluation) -> dict[str, str]:
    groups = evaluation.clusters
    if groups is None:
        return {"groups": "unknown: too few features fired often enough"}
    chance = f"silhouette {groups.score:.2f}, without groups up to {groups.null_score:.2f}"
    if groups.best_n == 1:
        return {"groups": f"none by where features fire ({chance})"}
    return {
        "groups": f"{groups.best_n} by where features fire, of {_listed(groups.sizes)} features ({chance})"
    }


def _about_ce_loss(evaluation: Evaluation) -> dict[str, str]:
    ce = evaluation.ce_loss
    if ce is None:
        return {}
    return {
        "CE loss": f"{_number(ce.clean, 3)} nats, spliced {_number(ce.spliced, 3)}, with zeros "
        f"{_number(ce.zero, 3)}; recovered {_number(ce.recovered)} (by range "
        + ", ".join(_number(value) for value in ce.recovered_by_range)
        + f"); KL {_number(ce.kl)}",
    }


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(f"{size:,}" for size in sizes)


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
