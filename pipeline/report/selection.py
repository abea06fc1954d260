"""Which runs a claim is about, chosen by their settings, never by their names."""

import json
from collections.abc import Callable, Iterable, Sequence

from .measured import Measured, Study

Wanted = Callable[[Measured], bool]

SEEDS = ("seed", "data_seed")
WARMUP = ("warmup_steps", "warmup_share", "ramp_steps", "ramp_share")
"""A longer warm-up leaves less for the ramp."""


def of_study(studies: Sequence[Study], name: str) -> list[Measured]:
    """The runs of one study that have scores and are not controls."""
    return [
        entry.run
        for study in studies
        if study.study == name
        for entry in study.runs
        if entry.control is None and entry.run.missing is None
    ]


def of_the_paper(studies: Sequence[Study]) -> list[Measured]:
    """The seeds of the paper's setting: the runs of all studies trained as the paper says, each once.

    Where these differ in settings that the paper leaves open, the setting with the most seeds.
    """
    alike: dict[str, dict[str, Measured]] = {}
    for study in studies:
        for entry in study.runs:
            if entry.control is None and entry.run.missing is None and is_the_papers(entry.run):
                alike.setdefault(_rest(entry.run, *SEEDS), {})[entry.run.folder] = entry.run
    return [*max(alike.values(), key=len).values()] if alike else []


def is_the_papers(run: Measured) -> bool:
    """Whether its settings are those of the paper's text, except for k, steps and batches."""
    as_stated = {
        "shared_adapters": False,
        "shuffle_positions": False,
        "learning_rate_warmup": 0.0,
        "learning_rate_decay": 0.0,
        "sparsity_warmup": 0.0,
        "base_loss_coefficient": 0.0,
        "decoder_bias": False,
        "layer_norm": "both",
        "layer_norm_affine": True,
        "residual": True,
        "rectify": False,
        "penalty": "text",
        "adapter_norm": "after",
        "reconstruction_loss": "squared",
        "decoder_norm": "features",
        "project_gradient": False,
        "dropout": 0.1,
        "curriculum": "linear",
        "position_mean": "none",
        "position_adapter": "none",
        "activation_scale": "rms",
    }
    width = run.setting("adapter_width")
    return (
        run.architecture == "hierarchical"
        and (run.d_model is None or width == run.d_model // 2)
        and len(run.ranges) == 4
        and warmup_share(run) == 0.1
        and run.setting("warmup_steps") + run.setting("ramp_steps", 0) == run.setting("steps")
        and all(run.setting(name, value) == value for name, value in as_stated.items())
    )


def pairs(
    runs: Iterable[Measured], settings: Sequence[str], changed: Wanted, usual: Wanted
) -> list[tuple[Measured, Measured]]:
    """Each ``changed`` run with the ``usual`` one that differs from it in ``settings`` alone."""
    candidates = list(runs)
    by_rest = {_rest(run, *settings): run for run in candidates if usual(run)}
    return [
        (run, by_rest[_rest(run, *settings)])
        for run in candidates
        if changed(run) and _rest(run, *settings) in by_rest
    ]


def _rest(run: Measured, *left_out: str) -> str:
    """All settings but those left out, and the store, as a key."""
    kept = {name: value for name, value in run.settings.items() if name not in left_out}
    return json.dumps([kept, run.config.get("store", {})], sort_keys=True)


def warmup_share(run: Measured) -> float | None:
    """Warm-up as a share of the steps; 0.1 in the paper."""
    steps, warmup = run.setting("steps"), run.setting("warmup_steps")
    return round(warmup / steps, 3) if steps and isinstance(warmup, int) else None


def beside_agnostic(studies: Sequence[Study]) -> list[tuple[Measured, Measured]]:
    """Runs of the paper's setting, each once, with the agnostic control of the same seed."""
    papers = {run.folder for run in of_the_paper(studies)}
    by_folder: dict[str, tuple[Measured, Measured]] = {}
    for study in studies:
        for entry in study.runs:
            control = (study.control(entry.name, "agnostic") or {}).get(entry.seed)
            if entry.run.folder in papers and control is not None:
                by_folder.setdefault(entry.run.folder, (entry.run, control))
    return list(by_folder.values())
