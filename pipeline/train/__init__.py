"""Stage two: autoencoders from an activation store; no language model is needed.

Batches come from the store in an order that its settings fix; each row carries its position. A run
resumes at its last checkpoint with the same batches and, on the same machine, the same weights. Several
runs that read the same batches train side by side in one pass, each to the weights that it has alone; and
several processes can share one training (data_parallel.py). The autoencoder is float32, the activations
bfloat16. Costs: three products with the weights a step, while alpha is 0 nothing for adapters; three times
the weights for gradient and optimizer, of each run that trains; two windows of the store, or the layer where
it is kept decoded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data_parallel import Team as Team
    from .resident import LayerMemory as LayerMemory
    from .resolving import resolve as resolve
    from .training import Ongoing as Ongoing
    from .training import Trained as Trained
    from .training import Training as Training
    from .training import side_by_side as side_by_side
    from .training import train_together as train_together

_HOMES = {
    "LayerMemory": "resident",
    "Ongoing": "training",
    "Team": "data_parallel",
    "Trained": "training",
    "Training": "training",
    "resolve": "resolving",
    "side_by_side": "training",
    "train_together": "training",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first asked for (PEP 562): the homes need torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
