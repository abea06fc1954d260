"""The controls of a position-aware run: the same but for the one thing that is claimed to help.

    agnostic      nothing positional; as many features as give it the nearest number of parameters
    more-active   the agnostic one with one more active feature per token
    shared        the same adapters (encoders, masks), one and the same for every range
    shuffled      all as it is, but at training every row carries the position of another

Against ``agnostic`` a gain is not one of size, against ``more-active`` not that of one more active feature,
against ``shared`` not that of further weights, against ``shuffled`` not that of anything but position. All
see the same tokens from the same seeds.

What an architecture is without positions, and what makes slightly more of its features active, it declares
itself. Where only a penalty makes codes sparse, ``more-active`` has nine tenths of it, and makes with
``agnostic`` the two points from which the FVU at an equal L0 is read. A run that has position means alone has
no adapters to share: one mean for all positions is what shuffling leaves of them, so both controls are one
run.

Settings here are plain values by name; nothing is computed but a size, on the caller's count.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ...store.errors import SettingsError
from ..sae.registry import ARCHITECTURES
from ..settings.declared import needs_positions

CONTROLS = ("agnostic", "shared", "shuffled", "more-active")
"""In the order in which they are trained."""

Values = Mapping[str, Any]


def is_position_aware(settings: Values) -> bool:
    """Whether a run of these settings needs controls; a control itself does not.

    >>> is_position_aware({"architecture": "batchtopk", "position_mean": "lowrank:16"})
    True
    >>> is_position_aware({"architecture": "hierarchical", "shuffle_positions": True})
    False
    """
    if settings.get("shared_adapters") or settings.get("shuffle_positions"):
        return False
    return has_adapters(settings) or _has_means(settings)


def refuse_unknown_positions(settings: Values, unknown: Collection[str], store: object) -> None:
    """Refuse a run that depends on positions where the store does not know them.

    Args:
        settings: of the run.
        unknown: what is not known of the store, as its manifest says.
        store: its name in the error.

    Raises:
        SettingsError: the run depends on positions, and they are unknown.
    """
    if "positions" in unknown and (has_adapters(settings) or _has_means(settings)):
        kind = settings["architecture"]
        names = ("position_mean", "position_adapter")
        parts = [name for name in names if settings.get(name, "none") != "none"]
        what = f"{kind} with a {' and a '.join(parts)}" if parts else kind
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
    if has_adapters(settings):
        found["shared"] = {**settings, "shared_adapters": True}
    elif _has_means(settings):
        found["shared"] = shuffled
    return {name: found[name] for name in CONTROLS if name in found}


def nearest_size(wanted: int, size: int, n_parameters: Callable[[int], int]) -> int:
    """The number of features whose number of parameters is nearest to ``wanted``.

    Each feature adds the same number of them, so two counts are enough: no search, and no rounding.

    Args:
        wanted: parameters.
        size: features for which ``n_parameters`` can be asked, and for one more.
        n_parameters: of so many features.

    >>> nearest_size(1000, 7, lambda size: 3 + 33 * size)
    30
    """
    at_size = n_parameters(size)
    each = n_parameters(size + 1) - at_size
    # In whole numbers: the floor of the quotient plus a half.
    return max(1, size + (2 * (wanted - at_size) + each) // (2 * each))


def _agnostic(settings: Values, n_parameters: Callable[[Values], int]) -> dict[str, Any]:
    kind = ARCHITECTURES[settings["architecture"]]
    architecture = kind.agnostic_architecture or kind.architecture
    fields = ARCHITECTURES[architecture].settings.model_fields
    bare = {
        name: value
        for name, value in settings.items()
        if name in fields and not needs_positions(fields[name])
    }
    bare["architecture"] = architecture

    def of_size(size: int) -> int:
        return n_parameters({**bare, "dictionary_size": size})

    size = nearest_size(n_parameters(settings), int(settings["dictionary_size"]), of_size)
    return {**bare, "dictionary_size": size}


def _more_active(agnostic: Values) -> dict[str, Any]:
    own = ARCHITECTURES[agnostic["architecture"]].settings
    return {**agnostic, **own.more_active(agnostic)}


def has_adapters(settings: Values) -> bool:
    """Whether something learned differs by position range, and could be shared by all of them."""
    by_itself = ARCHITECTURES[settings["architecture"]].agnostic_architecture is not None
    return by_itself or settings.get("position_adapter", "none") != "none"


def _has_means(settings: Values) -> bool:
    return settings.get("position_mean", "none") != "none"
