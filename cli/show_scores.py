"""Scores of one run in a terminal; ``posae evaluate --json`` prints all of them."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ..pipeline.evaluate.scoring.evaluation import Evaluation
from ..store.plain_text import counted
from .display import console, show_by_position


def show_scores(scores: Evaluation) -> None:
    """Scores that no comparison of runs shows: a line for each kind, and a chart of FVU by position."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _lines(scores).items():
        table.add_row(name, Text(text))
    console.print(table)
    if scores.fvu_by_position:
        console.print("\n[bold]FVU by position[/]")
        show_by_position([value or 0.0 for value in scores.fvu_by_position], digits=4)


def _lines(found: Evaluation) -> dict[str, str]:
    outliers, density, drift = found.norm_outliers, found.density_histogram, found.drift
    lines = {
        "tokens": f"{found.n_rows:,} in contexts {found.contexts[0]:,} to {found.contexts[1] - 1:,}",
        "FVU": f"{_number(found.fvu)}; with special tokens {_number(found.fvu_with_special)}",
        "L0": f"{found.l0:.2f}; above .001 in size {found.l0_above:.2f}; by range "
        + ", ".join(
            f"{name} {_number(l0, 2)}" for name, l0 in zip(found.ranges, found.l0_by_range, strict=True)
        ),
    }
    if outliers:
        lines["FVU"] += (
            f", without {outliers.n_rows:,} norm outliers (above {outliers.threshold:.1f}) "
            f"{_number(found.fvu_without_outliers)}"
        )
    if found.store.get("trained_from") is False:
        lines["store"] = f"{found.store['path']}, {_about_another_store(found)}"
    elif found.store.get("trained_from", True) is None:
        lines["store"] = "whether the run was trained on the contexts scored is unknown"
    if found.fvu_base is not None:
        lines["base code"] = f"FVU {_number(found.fvu_base)} alone; retention {_number(found.retention, 3)}"
    if drift:
        lines["drift"] = (
            f"cosine {drift.cosine_mean:.3f} with the end of warm-up, {drift.kept_share:.1%} above .9"
        )
    if density:
        often = sum(density.counts[density.edges.index(-1.0) :])
        lines["features"] = f"{density.never:,} never fired, {often:,} on more than a tenth of the tokens"
    if found.position_features:
        lines["position"] = (
            f"{found.position_features.features:,} features encode a position, "
            f"{found.position_features.slots:.2f} of them active per token"
        )
    lines |= _about_specificity(found) | _about_groups(found) | _about_ce_loss(found)
    if found.training_seconds is not None:
        cpu = (
            f", {found.training_cpu_seconds:,.0f} s of CPU" if found.training_cpu_seconds is not None else ""
        )
        lines["training"] = f"{found.training_seconds:,.0f} s{cpu}"
    return lines


def _about_another_store(found: Evaluation) -> str:
    """What a store that the run was not trained from has in common with the one that it was."""
    store = found.store
    n_seen, n_contexts = store.get("seen_contexts"), found.contexts[1] - found.contexts[0]
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


def _about_specificity(found: Evaluation) -> dict[str, str]:
    scores = found.specificity
    if scores is None or scores.mean is None:
        return {}
    return {
        "specificity": f"{scores.mean:.5f} bits of range in firing, {_number(scores.null_mean, 5)} by "
        f"chance; {_percent(scores.above_null_share)} of features above chance, "
        f"{_percent(scores.above_null_share_turned)} with contexts rotated; rank correlation with "
        f"interpretability {_number(scores.curve.rank_correlation, 2)}"
    }


def _about_groups(found: Evaluation) -> dict[str, str]:
    groups = found.clusters
    if groups is None:
        return {"groups": "unknown: too few features fired often enough"}
    chance = f"silhouette {groups.score:.2f}, without groups up to {groups.null_score:.2f}"
    if groups.best_n == 1:
        return {"groups": f"none by where features fire ({chance})"}
    return {
        "groups": f"{groups.best_n} by where features fire, of {_listed(groups.sizes)} features ({chance})"
    }


def _about_ce_loss(found: Evaluation) -> dict[str, str]:
    ce = found.ce_loss
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
