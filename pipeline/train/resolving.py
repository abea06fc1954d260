"""Settings on a store: everything that they leave open filled in, contradictions refused."""

import math

import torch

from ...store.reader import ActivationStore
from ..ranges import parse_ranges
from ..sae.autoencoder import Autoencoder, CommonSettings
from ..sae.registry import architecture_class, new_autoencoder
from ..settings import TrainSettings
from .controls import refuse_unknown_positions


def resolve(
    store: ActivationStore, settings: TrainSettings, device: torch.device | None = None
) -> TrainSettings:
    """The settings with everything that the store and the device decide filled in.

    Args:
        store: to train on.
        settings: as they were given.
        device: to train on; by default a CPU.

    Raises:
        SettingsError: a setting does not fit the store.
        StoreIncompleteError: the store has no layers.
    """
    layer = store.layer_or_middle(settings.layer)
    parse_ranges(settings.ranges, store.context_length)
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
            **settings.usual(store.d_model),
        }
    )

    def untrained(settings: TrainSettings) -> Autoencoder:
        return autoencoder_of(settings, d_model=store.d_model, context_length=store.context_length)

    update = {**kind.settings_by_size(resolved, untrained), "ramp_share": None}
    # What was set stays known as set, so that resolved settings can be resolved again.
    return type(settings).model_construct(settings.model_fields_set, **resolved.model_dump() | update)


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
    names = keywords & type(settings).model_fields.keys()
    return new_autoencoder(
        settings.architecture,
        **{name: getattr(settings, name) for name in sorted(names)}
        | {
            "d_model": d_model,
            "ranges": parse_ranges(settings.ranges, context_length),
            "generator": generator,
            "activation_scale": activation_scale,
        },
    )
