"""The two stages and their parts: harvest, train, evaluate, report."""

from typing import TYPE_CHECKING

from .. import lazy

if TYPE_CHECKING:
    from .runs import Run as Run
    from .sae.saving import load_autoencoder as load_autoencoder
    from .train.batch import as_torch as as_torch
    from .train.batches import shuffled_batches as shuffled_batches

_HOMES = {
    "Run": "runs",
    "as_torch": "train.batch",
    "load_autoencoder": "sae.saving",
    "shuffled_batches": "train.batches",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__ = lazy(__name__, _HOMES)
