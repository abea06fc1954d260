"""What settings mean on a store: everything that they leave open filled in, contradictions refused.

Costs nothing but an autoencoder without values where a share of parameters is to be met.
"""

import math

import torch

from ...store.errors import SettingsError
from ...store.reader import ActivationStore
from ..ranges import parse_ranges
from ..sae.autoencoder import Autoencoder, CommonSettings
from ..sae.registry import ARCHITECTURES, architecture_class, new_autoencoder
from ..settings import TrainSettings
from .controls import refuse_unknown_positions


def resolve(
    store: ActivationStore, settings: TrainSettings, device: torch.device | None = None
) -> TrainSettings:
    """The settings with everything that the store and the device decide filled in.

    Args:
        store: that is trained on.
        settings: as they were given.
        device: where it will be trained; by default a CPU.

    Raises:
        SettingsError: a setting does not fit the store.
        StoreIncompleteError: the store has no layers.
    """
    layer = store.layer_or_middle(settings.layer)
    parse_ranges(settings.ranges, store.context_length)
    _refuse_what_means_nothing(settings)
    refuse_unknown_positions(settings.model_dump(), store.manifest.unknown, store.root)
    warmup, ramp = settings.warmup_steps, settings.ramp_steps
    if warmup is None:
        # Not below a whole number that rounding hides: 1/11 of 11,000 is 1,000.
        wanted = math.floor(settings.steps * settings.warmup_share + 1e-6)
        warmup = wanted if ramp is None else settings.steps - ramp
    if ramp is None:
        share = settings.ramp_share or (0.2 if settings.curriculum == "plateau" else 1.0)
        ramp = max(1, min(settings.steps - warmup, math.floor(settings.steps * share + 1e-6)))
    kind = architecture_class(settings.architecture)
    size = settings.dictionary_size or store.d_model * kind.expansion
    resolved = settings.model_copy(
        update={
            "layer": layer,
            "dictionary_size": size,
            "learning_rate": settings.learning_rate or kind.usual_learning_rate(size),
            "warmup_steps": warmup,
            "ramp_steps": ramp,
            "precision": settings.precision or ("tf32" if device and device.type == "cuda" else "float32"),
        }
    )
    width = settings.adapter_width or max(1, store.d_model // 2)
    if settings.adapter_share is not None:
        width = _adapter_width(store, resolved, settings.adapter_share)
    update = {"adapter_width": width, "adapter_share": None, "ramp_share": None}
    # What was given stays known as that: so what is resolved can be resolved again.
    return TrainSettings.model_construct(settings.model_fields_set, **resolved.model_dump() | update)


def _refuse_what_means_nothing(settings: TrainSettings) -> None:
    """Raise SettingsError for a setting, given and not its default, that is only of other architectures."""
    homes: dict[str, list[str]] = {"adapter_share": ["hierarchical"]}
    for name, kind in ARCHITECTURES.items():
        for keyword in kind.keywords() & TrainSettings.model_fields.keys():
            homes.setdefault(keyword, []).append(name)
    for name in sorted(settings.model_fields_set & homes.keys()):
        is_default = getattr(settings, name) == TrainSettings.model_fields[name].default
        if settings.architecture not in homes[name] and not is_default:
            raise SettingsError(
                f"{name} is a setting of {', '.join(homes[name])}, and means nothing to "
                f"{settings.architecture}; leave it out"
            )


def _adapter_width(store: ActivationStore, settings: TrainSettings, share: float) -> int:
    """The width at which hierarchical's adapters come nearest to ``share`` of the other parameters."""
    one, two = (
        autoencoder_of(
            settings.model_copy(update={"adapter_width": width}),
            d_model=store.d_model,
            context_length=store.context_length,
        )
        for width in (1, 2)
    )
    base, further = one.base_parameters(), two.n_parameters() - one.n_parameters()
    return max(1, 1 + round((base * (1 + share) - one.n_parameters()) / further))


def autoencoder_of(
    settings: TrainSettings,
    *,
    d_model: int,
    context_length: int,
    generator: torch.Generator | None = None,
    activation_scale: float = 1.0,
) -> Autoencoder:
    """The autoencoder of resolved ``settings``; without a generator its weights are only shapes."""
    # An architecture's keywords, its own and the common ones, are settings of the same names.
    keywords = architecture_class(settings.architecture).keywords() | CommonSettings.__annotations__.keys()
    names = keywords & TrainSettings.model_fields.keys()
    given = {name: getattr(settings, name) for name in sorted(names)}
    return new_autoencoder(
        settings.architecture,
        **given
        | {
            "d_model": d_model,
            "ranges": parse_ranges(settings.ranges, context_length),
            "generator": generator,
            "activation_scale": activation_scale,
        },
    )
