"""Options made from settings: one declaration, in ``pipeline/settings/``, makes both."""

import inspect
import os
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from ..pipeline.settings import Settings
from ..store.errors import SettingsError
from ..store.opening import is_store
from ..store.remote.cache import parse_size

Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file with settings; options given here win over it.")
]


def _into_environment(
    variable: str, check: Callable[[str], object] = str
) -> Callable[[str | None], str | None]:
    """Let an option say for this process what a variable of the environment says for all."""

    def put(value: str | None) -> str | None:
        if value is not None:
            check(value)
            os.environ[variable] = value
        return value

    return put


def on_this_machine(place: Path | None) -> Path | None:
    """Refuse, as the place of something that is written, a URL, and what lies within a store.

    Raises:
        SettingsError: it is one of these.
    """
    # Of s3://bucket/x a Path has made s3:/bucket/x.
    if place is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(place)):
        url = str(place).replace(":/", "://", 1)
        raise SettingsError(
            f"{url} is a URL, and this is written on this machine; name a place here. A finished store goes "
            "there by posae copy"
        )
    for folder in place.resolve().parents if place is not None else ():
        if is_store(folder):
            raise SettingsError(f"{place} lies within {folder}, which is a store; name a place beside it")
    return place


Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        help="Folder that keeps what was read from a store on a server.",
        callback=_into_environment("POSAE_CACHE"),
        metavar="DIR",
        rich_help_panel="Stores on a server",
    ),
]
CacheSize = Annotated[
    str | None,
    typer.Option(
        "--cache-size",
        help="How much it may keep, as 50GB.",
        callback=_into_environment("POSAE_CACHE_SIZE", parse_size),
        metavar="SIZE",
        rich_help_panel="Stores on a server",
    ),
]


def with_settings(stage: type[Settings]) -> Callable[[Any], Any]:
    """Give a command an option for each setting; the command gets those given as ``options``.

    Args:
        stage: the settings class.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters
        fields = stage.model_fields

        def wrapped(**values: Any) -> None:
            options = {name: _value(name, values.pop(name)) for name in fields}
            command(**values, options=options)

        parameters = [parameter for name, parameter in own.items() if name != "options"]
        for name, field in fields.items():
            kind = _option_type(field.annotation)
            text = (field.description or "").replace("\n", " ")
            if field.default is not None:
                text = f"{text} [dim]\\[default: {field.default}][/dim]"
            option = typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False)
            if kind is bool:
                flag = name.replace("_", "-")
                option = typer.Option(f"--{flag}/--no-{flag}", help=text, show_default=False)
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[Union[kind, None], option],  # noqa: UP007
                )
            )
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        wrapped.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        wrapped.__doc__ = command.__doc__
        wrapped.__name__ = command.__name__
        return wrapped

    return decorate


def _option_type(annotation: Any) -> Any:
    """The type that typer parses; lists of numbers are written as ``5,12,19``."""
    arguments = [a for a in get_args(annotation) if a is not types.NoneType]
    if get_origin(annotation) in (Union, types.UnionType) and len(arguments) == 1:
        return _option_type(arguments[0])
    if get_origin(annotation) is tuple:
        return str
    if get_origin(annotation) is Literal:
        return annotation
    return annotation


def _value(name: str, given: Any) -> Any:
    if name in ("layers", "special_token_ids") and isinstance(given, str):
        try:
            return tuple(int(part) for part in given.split(","))
        except ValueError:
            raise SettingsError(f"--{name.replace('_', '-')} {given!r}: write them as 5,12,19") from None
    return given
