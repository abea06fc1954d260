"""The controls of a run that knows positions: the same but for the one thing that is claimed to help.

    agnostic      nothing positional; as many features as give it the nearest number of parameters
    more-active   the agnostic one with one more active feature on a token
    shared        the same adapters (encoders, masks), one and the same for every range
    shuffled      all as it is, but at training every row carries the position of another

Against ``agnostic`` a gain is not one of size, against ``more-active`` not that of one more active feature,
against ``shared`` not that of further weights, against ``shuffled`` not that of anything but position. All
see the same tokens from the same seeds.

What an architecture that is of ranges itself (``hierarchical``, ``masked``, ``separate``) is without them is
``standard``, with the same losses. Where penalties make codes sparse there is no number of active features to
set: there ``more-active`` has nine tenths of the L1 coefficient, and makes with ``agnostic`` the two points
from which the FVU at an equal L0 is read. A run that has position means alone has no adapters to share: one
mean for all positions is what shuffling leaves of them, so both controls are one training.

Settings here are plain values by name; nothing is computed but a size, on the caller's count.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ...store.errors import SettingsError

CONTROLS = ("agnostic", "shared", "shuffled", "more-active")
"""In the order in which they are trained."""

_OF_RANGES = ("hierarchical", "masked", "separate")

_POSITIONAL = {
    *("position_mean", "position_adapter", "shared_adapters", "shuffle_positions"),
    *("adapter_width", "adapter_gain", "adapter_norm", "dropout", "layer_norm", "layer_norm_affine"),
    *("residual", "rectify", "penalty", "base_loss_coefficient", "decoder_bias"),
    *("mask", "mask_schedule", "curriculum", "warmup_share", "warmup_steps", "ramp_share", "ramp_steps"),
}
"""Settings that mean nothing where nothing depends on position: they go back to their defaults."""

_LESS_PENALTY = 0.9
"""Of the L1 coefficient, where no number of active features can be set."""

Values = Mapping[str, Any]


def is_position_aware(settings: Values) -> bool:
    """Whether a run of these settings is to be set beside controls; a control itself is not.

    >>> is_position_aware({"architecture": "batchtopk", "position_mean": "lowrank:16"})
    True
    >>> is_position_aware({"architecture": "hierarchical", "shuffle_positions": True})
    False
    """
    if settings.get("shared_adapters") or settings.get("shuffle_positions"):
        return False
    return _has_adapters(settings) or _has_means(settings)


def refuse_unknown_positions(settings: Values, unknown: Collection[str], store: object) -> None:
    """Refuse a training that depends on positions, from a store that does not know them.

    Args:
        settings: of the training.
        unknown: what is not known of the store, as its manifest says.
        store: how it is called in the error.

    Raises:
        SettingsError: it does.
    """
    if "positions" in unknown and (_has_adapters(settings) or _has_means(settings)):
        kind = settings["architecture"]
        names = ("position_mean", "position_adapter")
        parts = [name for name in names if settings.get(name, "none") != "none"]
        what = kind if kind in _OF_RANGES else f"{kind} with a {' and a '.join(parts)}"
        raise SettingsError(
            f"{store} was imported without positions, and {what.replace('_', ' ')} depends on them; train "
            "one that does not, such as --architecture batchtopk"
        )


def controls_of(settings: Values, n_parameters: Callable[[Values], int]) -> dict[str, dict[str, Any]]:
    """The settings of each control.

    Args:
        settings: all of a position-aware run's, resolved.
        n_parameters: how many an autoencoder of such settings has; asked four times.

    Returns:
        Settings by the name of the control. A setting that is missing has its default.

    Raises:
        SettingsError: from ``n_parameters``.
    """
    agnostic = _agnostic(settings, n_parameters)
    shuffled = {**settings, "shuffle_positions": True}
    found = {"agnostic": agnostic, "shuffled": shuffled, "more-active": _more_active(agnostic)}
    if _has_adapters(settings):
        found["shared"] = {**settings, "shared_adapters": True}
    elif _has_means(settings):
        found["shared"] = shuffled
    return {name: found[name] for name in CONTROLS if name in found}


def nearest_size(wanted: int, size: int, n_parameters: Callable[[int], int]) -> int:
    """How many features give a number of parameters that is the nearest to ``wanted``.

    Each feature adds the same number of them, so two counts tell: no search, and no rounding.

    Args:
        wanted: parameters.
        size: features for which ``n_parameters`` can be asked, and for one more.
        n_parameters: of so many features.

    >>> nearest_size(1000, 7, lambda size: 3 + 33 * size)
    30
    """
    there = n_parameters(size)
    each = n_parameters(size + 1) - there
    # In whole numbers: the floor of the quotient plus a half.
    return max(1, size + (2 * (wanted - there) + each) // (2 * each))


def _agnostic(settings: Values, n_parameters: Callable[[Values], int]) -> dict[str, Any]:
    bare = {name: value for name, value in settings.items() if name not in _POSITIONAL}
    if settings["architecture"] in _OF_RANGES:
        bare["architecture"] = "standard"

    def of_size(size: int) -> int:
        return n_parameters({**bare, "dictionary_size": size})

    size = nearest_size(n_parameters(settings), int(settings["dictionary_size"]), of_size)
    return {**bare, "dictionary_size": size}


def _more_active(agnostic: Values) -> dict[str, Any]:
    if agnostic["architecture"] == "standard":
        return {**agnostic, "l1_coefficient": _LESS_PENALTY * agnostic["l1_coefficient"]}
    return {**agnostic, "target_l0": agnostic["target_l0"] + 1}


def _has_adapters(settings: Values) -> bool:
    return settings["architecture"] in _OF_RANGES or settings.get("position_adapter", "none") != "none"


def _has_means(settings: Values) -> bool:
    return settings.get("position_mean", "none") != "none"
