"""The activation store: the thing on disk, and the only thing that the two stages share."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bfloat16 import register_bfloat16 as register_bfloat16
    from .errors import PosaeError as PosaeError
    from .manifest import Manifest as Manifest
    from .reader import ActivationStore as ActivationStore

_HOMES = {
    "ActivationStore": "reader",
    "Manifest": "manifest",
    "PosaeError": "errors",
    "register_bfloat16": "bfloat16",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
