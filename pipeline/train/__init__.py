"""Stage two: autoencoders from an activation store; no language model is needed.

Batches come from the store in an order that its settings fix; each row carries its position. A run
resumes at its last checkpoint with the same batches and, on the same machine, the same weights. Several
runs that read the same batches train side by side in one pass, each to the weights that it has alone; and
several processes can share one training (data_parallel.py). The autoencoder is float32, the activations
bfloat16. Costs: three products with the weights a step, while alpha is 0 nothing for adapters; three times
the weights for gradient and optimizer, of each run that trains; two windows of the store, or the layer where
it is kept decoded.
"""

from .data_parallel import Team
from .resident import LayerMemory
from .resolving import resolve
from .training import Ongoing, Trained, Training, side_by_side, train_together

__all__ = [
    "LayerMemory",
    "Ongoing",
    "Team",
    "Trained",
    "Training",
    "resolve",
    "side_by_side",
    "train_together",
]
