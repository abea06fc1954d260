"""The two stages and their parts: harvest, train, evaluate, report."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runs import Run as Run
    from .sae.saving import load_autoencoder as load_autoencoder
    from .train.batches import as_torch as as_torch
    from .train.batches import shuffled_batches as shuffled_batches

_HOMES = {
    "Run": "runs",
    "as_torch": "train.batches",
    "load_autoencoder": "sae.saving",
    "shuffled_batches": "train.batches",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
