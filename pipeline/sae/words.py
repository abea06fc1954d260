"""The settings of a run as options of the command line."""

import math
from collections.abc import Mapping
from typing import Any

from ..settings.flat import without_foreign
from .registry import ARCHITECTURES
from .run_settings import defaults_of, settings_class, train_presets


def train_words(trained: Mapping[str, Any], d_model: int) -> list[str] | None:
    """What follows ``posae train STORE RUN`` to give these settings again.

    The preset that leaves the fewest options to name; what the trainer fills in by itself is left out.

    Args:
        trained: the settings of a run, as its ``config.json`` has them; of one that an older posae did not
            have, its default.
        d_model: width of the activations that it was trained on.

    Returns:
        The arguments, or None where none give these settings, or one is unknown.
    """
    if trained.get("architecture") not in ARCHITECTURES:
        return None
    own = settings_class(trained)
    defaults, trained = defaults_of(own), without_foreign(trained)
    if trained.keys() - defaults:
        return None
    wanted = defaults | trained
    candidates: list[list[str]] = []
    for name, values in train_presets().items():
        if values["architecture"] != wanted["architecture"]:
            continue
        preset = defaults | values
        usual = own.model_validate(values).usual(d_model)
        differ = [
            key
            for key in wanted
            if wanted[key] != preset[key] and not _is_filled_in(key, wanted, preset, usual)
        ]
        if all(wanted[key] is not None for key in differ):
            words = [word for key in differ for word in _option(key, wanted[key])]
            candidates.append(["--preset", name, *words])
    return min(candidates, key=len, default=None)


def _is_filled_in(
    name: str, wanted: Mapping[str, Any], preset: Mapping[str, Any], usual: Mapping[str, Any]
) -> bool:
    """Whether the trainer gives a setting the wanted value where none is named."""
    if preset[name] is not None:
        return False
    if name in usual:
        return wanted[name] == usual[name]
    steps, warmup, ramp = (wanted[key] or 0 for key in ("steps", "warmup_steps", "ramp_steps"))
    is_usual_ramp = wanted["curriculum"] != "plateau" and ramp == max(1, steps - warmup)
    if name == "warmup_steps":  # where a ramp is named, the warm-up is what is left
        return is_usual_ramp and warmup == math.floor(steps * wanted["warmup_share"] + 1e-6)
    return name == "ramp_steps" and is_usual_ramp


def _option(name: str, value: Any) -> list[str]:
    """One setting as it is written on the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{flag}"]
    return [f"--{flag}", str(value)]
