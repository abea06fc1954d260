"""How a setting is declared: its default and bounds, its group in help, and what kind of setting it is."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple, cast

from pydantic import Field
from pydantic.fields import FieldInfo as FieldInfo


class Group(StrEnum):
    """The panels of ``posae train --help``, in their order."""

    BASICS = "Basics"
    DATA = "What to train on"
    ARCHITECTURE = "Architecture"
    SPARSITY = "Sparsity"
    POSITION = "Position and tokens"
    OPTIMIZER = "Optimizer"
    RESOURCES = "Sweeps and resources"
    OUTPUT = "Output"


class Preset(NamedTuple):
    """Settings that go together."""

    about: str
    """One sentence."""
    values: Mapping[str, Any]
    """By name, without the architecture."""


def setting(
    default: Any, group: Group, *, is_hidden: bool = False, needs_positions: bool = False, **bounds: Any
) -> Any:
    """A field of a settings class.

    Args:
        default: its default; None where the store or the device decides.
        group: its panel in help.
        is_hidden: only rebuilds the paper's published scripts: left out of help, listed in docs/paper.md.
        needs_positions: means nothing where nothing depends on position; agnostic controls take the default.
        **bounds: as for ``pydantic.Field``: ge, gt, le, lt, multiple_of.
    """
    about: dict[str, Any] = {"group": group, "is_hidden": is_hidden, "needs_positions": needs_positions}
    return cast(Any, Field)(default, json_schema_extra=about, **bounds)


def _about(field: FieldInfo) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", field.json_schema_extra or {})


def group_of(field: FieldInfo) -> Group | None:
    """The panel of a setting; None where it was declared without one."""
    return _about(field).get("group")


def is_hidden(field: FieldInfo) -> bool:
    """Whether help leaves the setting out."""
    return bool(_about(field).get("is_hidden"))


def needs_positions(field: FieldInfo) -> bool:
    """Whether the setting means nothing where nothing depends on position."""
    return bool(_about(field).get("needs_positions"))
