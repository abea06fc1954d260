"""Settings from four sources, later ones first: default < preset < TOML file < option."""

import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from ...store.errors import SettingsError
from .presets import BEST_PRACTICE
from .stages import Settings
from .training import TrainSettings

Stage = TypeVar("Stage", bound=Settings)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at what ``word`` may have been meant to be, or at all there is."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"


def resolve_settings(
    stage: type[Stage],
    table: str,
    *,
    presets: Mapping[str, Mapping[str, Any]],
    preset: str | None = None,
    config: Path | None = None,
    options: Mapping[str, Any],
) -> Stage:
    """Settings of one stage: default < preset < TOML file < option.

    Args:
        stage: the settings class.
        table: name of the stage's table in the file.
        presets: presets by name.
        preset: one of them; a file's key ``preset`` counts where this is None.
        config: TOML file.
        options: what was given on the command line; None means not given.

    Raises:
        SettingsError: unknown key or preset, a value out of bounds, or a contradiction.
    """
    given = {name: value for name, value in options.items() if value is not None}
    from_file = read_config(config, table) if config else {}
    preset = preset if preset is not None else from_file.pop("preset", None)
    from_file.pop("preset", None)
    if preset is None and stage is TrainSettings:
        preset = BEST_PRACTICE.get(str(given.get("architecture", from_file.get("architecture", ""))), "paper")
    if preset is not None and str(preset) not in presets:
        raise SettingsError(f"there is no preset {preset!r}; {nearest(str(preset), presets)}")
    base = dict(presets[preset]) if preset is not None else {}
    wanted = {**from_file, **given}
    if "architecture" in base and wanted.get("architecture", base["architecture"]) != base["architecture"]:
        raise SettingsError(
            f"preset {preset!r} is of architecture {base['architecture']!r}, and "
            f"{wanted['architecture']!r} was asked for; leave one of them out"
        )
    return build(stage, {**base, **wanted}, place=f"[{table}]")


def build(stage: type[Stage], values: Mapping[str, Any], place: str) -> Stage:
    """The settings of these values.

    Raises:
        SettingsError: one clear line for the first thing that is wrong.
    """
    for name in values:
        if name not in stage.model_fields:
            hint = nearest(name, stage.model_fields)
            raise SettingsError(f"{place} has no setting {name!r}; {hint}")
    try:
        return stage.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise SettingsError(f"{name}: {message}, got {first['input']!r}" if name else message) from None


def read_config(path: Path, table: str) -> dict[str, Any]:
    """One table of a TOML file.

    Raises:
        SettingsError: no such file, no TOML, or tables that posae does not have.
    """
    tables = ("harvest", "train", "evaluate", "plant", "merge", "import", "import-sae")
    parsed = read_toml(path)
    for name in parsed:
        if name not in tables:
            raise SettingsError(f"{path} has a table or key {name!r} outside all; {nearest(name, tables)}")
    found = parsed.get(table, {})
    if not isinstance(found, dict):
        raise SettingsError(f"{path}: {table} should be a table: [{table}]")
    return cast("dict[str, Any]", found)


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        SettingsError: no such file, or no TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise SettingsError(f"there is no file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise SettingsError(f"{path} cannot be read as TOML: {error}") from None
