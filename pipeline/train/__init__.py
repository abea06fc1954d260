"""Stage two: autoencoders from an activation store; no language model is needed.

Batches come from the store in an order that follows from the settings; each row carries its position. A run
resumes at its last checkpoint with the same batches and, on the same machine, the same weights. Several runs
that read the same batches train in one pass, each to the same weights as alone, and several processes can
share one run (data_parallel.py). The autoencoder is float32, the activations bfloat16. Costs: three products
with the weights per step, and nothing for adapters while alpha is 0; three times the weights for gradient and
optimizer of each run; two windows of the store, or the whole layer if it is kept decoded.
"""

from .data_parallel import Team
from .ongoing import Ongoing
from .passes import side_by_side, train_together
from .resident import LayerMemory
from .resolving import resolve
from .training import Trained, Training

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
