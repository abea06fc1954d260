"""Settings from four sources, later ones first: default < preset < TOML file < option."""

import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from ...store.errors import SettingsError
from ...store.plain_text import shortened
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
    *,
    presets: Mapping[str, Mapping[str, Any]],
    preset: str | None = None,
    config: Path | Mapping[str, Any] | None = None,
    options: Mapping[str, Any],
) -> Stage:
    """Settings of one stage: default < preset < TOML file < option.

    Args:
        stage: the settings class; it names its table in the file.
        presets: presets by name.
        preset: one of them; a file's key ``preset`` counts where this is None.
        config: TOML file; or what a file says, where the caller names it in messages.
        options: what was given on the command line; None means not given.

    Raises:
        SettingsError: unknown key or preset, a value out of bounds, or a contradiction.
    """
    given = {name: value for name, value in options.items() if value is not None}
    from_file = read_config(config, stage.table) if isinstance(config, Path) else dict(config or {})
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
    place = f"{config}: [{stage.table}]" if isinstance(config, Path) else ""
    return build(stage, {**base, **wanted}, place, given)


def build(stage: type[Stage], values: Mapping[str, Any], place: str, options: Collection[str] = ()) -> Stage:
    """The settings of these values.

    Args:
        stage: the settings class.
        values: by name.
        place: where they stand, for messages, as ``f.toml: [train]``; may be empty.
        options: names of those that come from the command line, and not from there.

    Raises:
        SettingsError: one clear line for the first thing that is wrong.
    """
    for name in values:
        if name not in stage.model_fields:
            told = f"{place.rstrip(':')} has" if place else "there is"
            raise SettingsError(f"{told} no setting {name!r}; {nearest(name, stage.model_fields)}")
    try:
        return stage.model_validate(values)
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"][:1]))
        told = in_plain_words(error, stage.model_fields[name].examples if name else None)
        if not name:  # settings that contradict each other, which the message names
            raise SettingsError(told) from None
        where = f"--{name.replace('_', '-')}" if name in options else f"{place} {name}".strip()
        raise SettingsError(f"{where} {told}") from None


_PLAINLY = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "literal_error": "must be {expected}",
    "string_too_short": "must not be empty",
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "must be a number"),
    "finite_number": "must be a finite number",
    **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false"),
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a table",
}
"""What pydantic calls an error, in words for whoever typed the value; the value comes behind it."""


def in_plain_words(error: BaseException | None, examples: Sequence[Any] | None = None) -> str:
    """``must be at least 1, not 0``: what follows the name of a setting, or of an option.

    Args:
        error: of pydantic, whose first complaint is told; of another there is nothing to tell.
        examples: how the value may be written, where it has a form of its own.
    """
    if not isinstance(error, ValidationError):
        return ""
    first = error.errors()[0]
    words = _PLAINLY.get(first["type"])
    if first["type"] == "string_pattern_mismatch" and examples:
        words = f"is written as {examples[0]}"
    if words is None:
        return first["msg"].removeprefix("Value error, ")
    known = {
        key: f"{value:,g}" if isinstance(value, int | float) else value
        for key, value in first.get("ctx", {}).items()
    }
    is_in_a_list = any(isinstance(step, int) for step in first["loc"][1:])
    told = f"{words.format(**known)}, not {shortened(first['input'])}"
    return f"has an entry that {told}" if is_in_a_list else told


def tables() -> list[str]:
    """The tables that a TOML file of posae may have: that of each stage whose settings are declared."""
    return sorted(stage.table for stage in Settings.__subclasses__() if stage.table)


def read_config(path: Path, table: str) -> dict[str, Any]:
    """One table of a TOML file.

    Raises:
        SettingsError: no such file, no TOML, or tables that posae does not have.
    """
    known, parsed = tables(), read_toml(path)
    for name, value in parsed.items():
        if isinstance(value, dict) and name not in known:
            raise SettingsError(f"{path} has a table [{name}]; {nearest(name, known)}")
        if not isinstance(value, dict):
            remedy = f"write [{name}] and settings below it" if name in known else f"put it under [{table}]"
            raise SettingsError(f"{path}: {name} stands outside of a table; {remedy}")
    return cast("dict[str, Any]", parsed.get(table, {}))


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
