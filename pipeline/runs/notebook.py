"""What a notebook shows of a run: what was trained on what, its scores and all settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ...store.notebook import block, columns, facts, folded


def run_html(
    folder: Path, config: Mapping[str, Any], last_step: Any, evaluation: Mapping[str, Any] | str
) -> str:
    """A run as HTML.

    Args:
        folder: of the run.
        config: ``config.json``, which may hold anything.
        last_step: steps done at the last line of metrics; None for a finished run.
        evaluation: ``evaluation.json``, which may hold anything, or why there is none.
    """
    settings, store = (as_object(config.get(name)) for name in ("settings", "store"))
    steps = _shown(settings, "steps")
    shown = {
        "trained": f"{_shown(settings, 'architecture')}, layer {_shown(settings, 'layer')}, "
        f"{_shown(settings, 'dictionary_size')} features, seed {_shown(settings, 'seed')}",
        "store": f"{_shown(store, 'path')}: {_shown(store, 'model')} on {_shown(store, 'dataset')}",
        "state": f"finished, {steps} steps"
        if last_step is None
        else f"at step {_text(last_step)} of {steps}",
    }
    scores: list[str] = []
    if isinstance(evaluation, str):
        shown["scores"] = evaluation
    else:
        scores = _scores_html(evaluation)
    every_setting = facts({name: _shown(settings, name) for name in settings})
    return block(str(folder), facts(shown), *scores, folded("all settings", every_setting))


def as_object(value: Any) -> dict[str, Any]:
    """A JSON object; empty if the value is something else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _scores_html(evaluation: Mapping[str, Any]) -> list[str]:
    """Scores over all rows, and FVU by position range if both lists are there."""
    names = {"FVU": "fvu", "L0": "l0", "dead": "dead_fraction", "parameters": "n_parameters"}
    parts = [columns([*names], [[_shown(evaluation, key) for key in names.values()]])]
    ranges, by_range = evaluation.get("ranges"), evaluation.get("fvu_by_range")
    if isinstance(ranges, list) and isinstance(by_range, list):
        values = [_text(value) for value in cast("list[Any]", by_range)]
        parts.append(columns(["FVU by range", *map(str, cast("list[Any]", ranges))], [["", *values]]))
    return parts


def _shown(values: Mapping[str, Any], name: str) -> str:
    return _text(values.get(name))


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
