"""The settings of a run: a union of what the architectures declare, distinguished by ``architecture``.

All is flat: a file or a command line names settings of any architecture side by side. Those that another
architecture has are dropped where they are at its default, and refused where they are not.
"""

from collections.abc import Collection, Mapping
from copy import copy
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from ...store.errors import SettingsError
from ...store.plain_text import shortened
from ..settings import TrainSettings, build
from ..settings.flat import without_foreign
from ..settings.resolving import Given, place_of, refuse_unknown, where
from .registry import ARCHITECTURES, DEFAULT


def settings_class(values: Mapping[str, Any]) -> type[TrainSettings]:
    """The settings class of these values, by their ``architecture``; a KeyError if there is no such."""
    return ARCHITECTURES[values.get("architecture", DEFAULT.architecture)].settings


def defaults_of(settings: type[TrainSettings]) -> dict[str, Any]:
    """The default of each setting of a class."""
    return {name: field.default for name, field in settings.model_fields.items()}


def all_declared() -> dict[str, FieldInfo]:
    """Every setting of any architecture by name: the common ones first, each as first declared.

    Raises:
        TypeError: two architectures declare a setting of one name with different types or defaults.
    """
    declared = {**TrainSettings.model_fields, "architecture": _architecture_field()}
    for kind in ARCHITECTURES.values():
        for name, field in kind.settings.model_fields.items():
            known = declared.setdefault(name, field)
            same = (known.annotation, known.default) == (field.annotation, field.default)
            if name != "architecture" and not same:
                raise TypeError(f"{kind.architecture} declares {name} otherwise than another architecture")
    return declared


def all_options() -> dict[str, FieldInfo]:
    """What ``posae train`` and its table in a file take: all settings, and a preset to start from."""
    about = f"Settings to start from: {', '.join(train_presets())}."
    preset = FieldInfo(annotation=str, default=None, description=about)
    preset.json_schema_extra = TrainSettings.model_fields["architecture"].json_schema_extra
    return {"preset": preset, **all_declared()}


def _architecture_field() -> FieldInfo:
    """The setting that tells them apart, with what each architecture says of itself."""
    field = copy(TrainSettings.model_fields["architecture"])
    field.annotation = Literal[tuple(ARCHITECTURES)]  # pyright: ignore
    field.default = DEFAULT.architecture
    about = ((name, kind.settings.model_fields["architecture"]) for name, kind in ARCHITECTURES.items())
    said = " ".join(f"{name}: {own.description or 'no description.'}" for name, own in about)
    field.description = f"{field.description} {said}"
    return field


def train_presets() -> dict[str, dict[str, Any]]:
    """The values of all presets by name, ``architecture`` included."""
    return {
        name: {"architecture": architecture, **preset.values}
        for architecture, kind in ARCHITECTURES.items()
        for name, preset in kind.presets.items()
    }


def train_settings(
    values: Mapping[str, Any], place: str = "", options: Collection[str] = ()
) -> TrainSettings:
    """The settings of these values, of the class of their ``architecture``.

    Args:
        values: by name; settings of other architectures may be among them at their defaults.
        place: where they are, for messages, e.g. ``f.toml: [train]``; may be empty.
        options: names of those that come from the command line, and not from there.

    Raises:
        SettingsError: one clear line for the first thing that is wrong.
    """
    refuse_unknown(values, all_declared(), place)
    name = values.get("architecture", DEFAULT.architecture)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        names = [repr(known) for known in ARCHITECTURES]
        raise SettingsError(
            f"{where('architecture', place, options)} must be {', '.join(names[:-1])} or {names[-1]}, "
            f"not {shortened(name)}"
        )
    own = ARCHITECTURES[name].settings
    _refuse_foreign(values, own, name)
    known = {key: value for key, value in values.items() if key in own.model_fields}
    return build(own, known, place, options)


def _refuse_foreign(values: Mapping[str, Any], own: type[TrainSettings], architecture: str) -> None:
    declared = all_declared()
    for name in sorted(values.keys() - own.model_fields.keys()):
        if values[name] != declared[name].default:
            homes = [other for other, kind in ARCHITECTURES.items() if name in kind.settings.model_fields]
            raise SettingsError(
                f"{name} is a setting of {', '.join(homes)}, and means nothing to {architecture}; "
                "leave it out"
            )


def resolve_train_settings(
    *,
    preset: str | None = None,
    config: Path | Mapping[str, Any] | None = None,
    options: Mapping[str, Any],
) -> TrainSettings:
    """Settings of a run: default < preset < TOML file < option.

    Args:
        preset: by default the first of the architecture that is given.
        config: TOML file; or its contents, where the caller names it in messages.
        options: what the command line gave; None means not given.

    Raises:
        SettingsError: unknown key or preset, a preset of another architecture, a value out of bounds, or a
            contradiction.
    """
    given = Given.of(TrainSettings.table, preset, config, options)
    presets, asked = train_presets(), given.values.get("architecture")
    preset = given.preset
    if preset is None:
        kind = ARCHITECTURES.get(str(asked), DEFAULT)
        preset = next(iter(kind.presets), None)
    values = given.over(presets, preset)
    if given.preset is not None and asked not in (None, presets[given.preset]["architecture"]):
        raise SettingsError(
            f"preset {preset!r} is of architecture {presets[given.preset]['architecture']!r}, and "
            f"{asked!r} was asked for; leave one of them out"
        )
    place = place_of(config, TrainSettings.table)
    return train_settings(values, place, given.options)


def as_in_run(settings: TrainSettings, begun: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the form of a run that was begun, to be compared with it.

    A setting that the run's file lacks had what is now its default, and is left out where it has that.
    Settings of other architectures, which files of older versions hold, are taken from there.

    Args:
        settings: as they are now, resolved.
        begun: those of the run's ``config.json``.
    """
    fields, own = type(settings).model_fields, without_foreign(begun)
    now = {
        name: value
        for name, value in settings.model_dump(mode="json").items()
        if name in begun or value != fields[name].default
    }
    declared = all_declared()
    foreign = {
        name: value
        for name, value in begun.items()
        if name not in fields
        if name not in own or (name in declared and value == declared[name].default)
    }
    return now | foreign
