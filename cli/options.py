"""Command-line options made from declared settings."""

import inspect
import os
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from ..pipeline.settings import Group, Settings
from ..pipeline.settings.declared import FieldInfo, group_of, is_hidden
from ..store.errors import SettingsError
from ..store.opening import is_store
from ..store.remote.cache import parse_size

Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file with settings; options override it.")
]


def _into_environment(
    variable: str, check: Callable[[str], object] = str
) -> Callable[[str | None], str | None]:
    """A callback that sets an environment variable to the option's value, for this process."""

    def put(value: str | None) -> str | None:
        if value is not None:
            check(value)
            os.environ[variable] = value
        return value

    return put


def on_this_machine(place: Path | None) -> Path | None:
    """Refuse a URL, or a place within a store, as the destination of something that is written.

    Raises:
        SettingsError: ``place`` is one of these.
    """
    # Path turns s3://bucket/x into s3:/bucket/x.
    if place is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(place)):
        url = str(place).replace(":/", "://", 1)
        raise SettingsError(
            f"{url} is a URL, but this command writes to a local folder; give a folder, and send the "
            "finished store there with posae copy"
        )
    for folder in place.resolve().parents if place is not None else ():
        if is_store(folder):
            raise SettingsError(f"{place} lies inside the store {folder}; choose a folder outside of it")
    return place


Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        help="Folder for a local cache of what is read from servers.",
        callback=_into_environment("POSAE_CACHE"),
        metavar="DIR",
        rich_help_panel="Stores on a server",
    ),
]
CacheSize = Annotated[
    str | None,
    typer.Option(
        "--cache-size",
        help="Maximum size of the cache, e.g. 50GB.",
        callback=_into_environment("POSAE_CACHE_SIZE", parse_size),
        metavar="SIZE",
        rich_help_panel="Stores on a server",
    ),
]


def with_settings(stage: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per setting of a stage; the values are passed to it as ``options``."""
    return with_fields(stage.model_fields)


def with_fields(
    fields: Mapping[str, FieldInfo],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same for settings by name; options are ordered by their panels where they have some."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters

        def wrapped(**values: Any) -> None:
            options = {name: _value(name, values.pop(name)) for name in fields}
            command(**values, options=options)

        parameters = [parameter for name, parameter in own.items() if name != "options"]
        parameters += [_parameter(name, field) for name, field in fields.items()]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        parameters.sort(key=_panel)
        wrapped.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        wrapped.__doc__ = command.__doc__
        wrapped.__name__ = command.__name__
        return wrapped

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """The option of one setting."""
    kind, flag = _option_type(field.annotation), name.replace("_", "-")
    text = (field.description or "").replace("\n", " ")
    if field.default is not None:
        text = f"{text} [dim]\\[default: {field.default}][/dim]"
    option = typer.Option(
        f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
        help=text,
        show_default=False,
        hidden=is_hidden(field),
        rich_help_panel=group_of(field),
    )
    annotation = Annotated[Union[kind, None], option]  # noqa: UP007
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _panel(parameter: inspect.Parameter) -> int:
    """The place of its panel among those of settings; what has none stays first."""
    (declared,) = parameter.annotation.__metadata__
    panel, groups = declared.rich_help_panel, [str(group) for group in Group]
    return groups.index(panel) if panel in groups else len(groups) if panel else -1


def _option_type(annotation: Any) -> Any:
    """The type that typer parses; lists of numbers are strings such as ``5,12,19``."""
    arguments = [a for a in get_args(annotation) if a is not types.NoneType]
    if get_origin(annotation) in (Union, types.UnionType) and len(arguments) == 1:
        return _option_type(arguments[0])
    if get_origin(annotation) is tuple:
        return str
    if get_origin(annotation) is Literal:
        return annotation
    return annotation


def _value(name: str, value: Any) -> Any:
    if name in ("layers", "special_token_ids") and isinstance(value, str):
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            option = f"--{name.replace('_', '-')}"
            raise SettingsError(f"{option} {value!r} is not a list of numbers; write e.g. 5,12,19") from None
    return value
