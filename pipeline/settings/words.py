"""The settings of a training written again as words of the command line."""

import math
from collections.abc import Mapping
from typing import Any

from .presets import TRAIN_PRESETS
from .training import TrainSettings


def train_words(trained: Mapping[str, Any], d_model: int) -> list[str] | None:
    """Words after ``posae train STORE RUN`` that give these settings again.

    The preset that leaves the fewest options to name; what the trainer fills in by itself is left out.

    Args:
        trained: all settings of a run, as its ``config.json`` has them; of one that an older posae did not
            have, its default.
        d_model: width of the activations that it was trained on.

    Returns:
        The words, or None where no words give them, or a setting is unknown.
    """
    defaults = {name: field.default for name, field in TrainSettings.model_fields.items()}
    if trained.keys() - defaults:
        return None
    wanted = defaults | dict(trained)
    found: list[list[str]] = []
    for name, values in TRAIN_PRESETS.items():
        preset = defaults | values
        differ = [
            key
            for key in wanted
            if wanted[key] != preset[key] and not _is_filled_in(key, wanted, preset, d_model)
        ]
        if wanted["architecture"] == preset["architecture"] and all(
            wanted[key] is not None for key in differ
        ):
            words = [word for key in differ for word in _option(key, wanted[key])]
            found.append(["--preset", name, *words])
    return min(found, key=len, default=None)


def _is_filled_in(name: str, wanted: Mapping[str, Any], preset: Mapping[str, Any], d_model: int) -> bool:
    """Whether the trainer gives a setting the wanted value where none is named."""
    if preset[name] is not None:
        return False
    if name == "adapter_width":
        return preset["adapter_share"] is None and wanted[name] == max(1, d_model // 2)
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
