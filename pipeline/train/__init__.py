"""Stage two: training autoencoders from an activation store; no language model is needed.

Batches are read in an order fixed by the settings; each row has its position. A run resumes from its last
checkpoint with the same batches and, on the same machine, the same weights. Several runs that read the same
batches train side by side in one pass, with the same weights as alone; several processes can share one run
(data_parallel.py). The autoencoder is float32, the activations bfloat16. Costs three products with the
weights per step, and nothing for adapters while alpha is 0. Memory: three times the weights for gradient and
optimizer, per run; two windows of the store, or the decoded layer.
"""

from typing import TYPE_CHECKING

from ... import lazy

if TYPE_CHECKING:
    from .data_parallel import Team as Team
    from .ongoing import Ongoing as Ongoing
    from .passes import side_by_side as side_by_side
    from .passes import train_together as train_together
    from .resident import LayerMemory as LayerMemory
    from .resolving import resolve as resolve
    from .training import Trained as Trained
    from .training import Training as Training

_HOMES = {
    "LayerMemory": "resident",
    "Ongoing": "ongoing",
    "Team": "data_parallel",
    "Trained": "training",
    "Training": "training",
    "resolve": "resolving",
    "side_by_side": "passes",
    "train_together": "passes",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__ = lazy(__name__, _HOMES)  # the homes need torch
