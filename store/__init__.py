"""The activation store: the thing on disk, and the only thing that the two stages share."""

from typing import TYPE_CHECKING

from .. import lazy

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

__getattr__ = lazy(__name__, _HOMES)
