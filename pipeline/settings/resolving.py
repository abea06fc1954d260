"""Settings from four sources, later ones first: default < preset < TOML file < option."""

import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from pydantic import ValidationError

from ...store.errors import SettingsError
from ...store.plain_text import shortened
from .stages import Settings

Stage = TypeVar("Stage", bound=Settings)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint: the known name nearest to ``word``, or all of them."""
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
        config: TOML file; or its contents, where the caller names it in messages.
        options: what the command line gave; None means not given.

    Raises:
        SettingsError: unknown key or preset, a value out of bounds, or a contradiction.
    """
    given, place = Given.of(stage.table, preset, config, options), place_of(config, stage.table)
    return build(stage, given.over(presets, given.preset), place, given.options)


class Given(NamedTuple):
    """Settings as they were given, by source."""

    preset: str | None
    from_file: Mapping[str, Any]
    options: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        table: str,
        preset: str | None,
        config: Path | Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> "Given":
        """The arguments of ``resolve_settings``, with the file read."""
        from_file = read_config(config, table) if isinstance(config, Path) else dict(config or {})
        of_file = from_file.pop("preset", None)
        preset = preset if preset is not None else of_file
        return cls(preset, from_file, {key: value for key, value in options.items() if value is not None})

    @property
    def values(self) -> dict[str, Any]:
        """Those of the file and the options."""
        return {**self.from_file, **self.options}

    def over(self, presets: Mapping[str, Mapping[str, Any]], preset: str | None) -> dict[str, Any]:
        """All values, those of a preset below the others.

        Raises:
            SettingsError: there is no such preset.
        """
        if preset is None:
            return self.values
        if str(preset) not in presets:
            raise SettingsError(f"there is no preset {preset!r}; {nearest(str(preset), presets)}")
        return {**presets[preset], **self.values}


def place_of(config: Path | Mapping[str, Any] | None, table: str) -> str:
    """Where a file's values are, for messages; empty where the caller names the file."""
    return f"{config}: [{table}]" if isinstance(config, Path) else ""


def refuse_unknown(names: Iterable[str], known: Collection[str], place: str) -> None:
    """Raise SettingsError for the first name that is not of a ``known`` setting."""
    for name in names:
        if name not in known:
            where = f"{place.rstrip(':')} has" if place else "there is"
            raise SettingsError(f"{where} no setting {name!r}; {nearest(name, known)}")


def where(name: str, place: str, options: Collection[str]) -> str:
    """How messages call a setting: as an option, or by its place in a file."""
    return f"--{name.replace('_', '-')}" if name in options else f"{place} {name}".strip()


def build(stage: type[Stage], values: Mapping[str, Any], place: str, options: Collection[str] = ()) -> Stage:
    """The settings of these values.

    Args:
        stage: the settings class.
        values: by name.
        place: where they are, for messages, e.g. ``f.toml: [train]``; may be empty.
        options: names of those that come from the command line, and not from there.

    Raises:
        SettingsError: one clear line for the first thing that is wrong.
    """
    refuse_unknown(values, stage.model_fields, place)
    try:
        return stage.model_validate(values)
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"][:1]))
        problem = in_plain_words(error, stage.model_fields[name].examples if name else None)
        if not name:  # settings that contradict each other, which the message names
            raise SettingsError(problem) from None
        raise SettingsError(f"{where(name, place, options)} {problem}") from None


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
"""Pydantic's types of errors in plain words; the value follows."""


def in_plain_words(error: BaseException | None, examples: Sequence[Any] | None = None) -> str:
    """``must be at least 1, not 0``: what follows the name of a setting, or of an option.

    Args:
        error: its first problem is described where it is pydantic's; of any other the result is empty.
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
    problem = f"{words.format(**known)}, not {shortened(first['input'])}"
    return f"has an entry that {problem}" if is_in_a_list else problem


def tables() -> list[str]:
    """The tables that a TOML file of posae may have: one per stage."""
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
