"""Stage two: training autoencoders from an activation store; no language model is needed.

Batches are read in an order fixed by the settings; each row has its position. A run resumes from its last
checkpoint with the same batches and, on the same machine, the same weights. Several runs that read the same
batches train side by side in one pass, with the same weights as alone; several processes can share one run
(data_parallel.py). The autoencoder is float32, the activations bfloat16. Costs three products with the
weights per step, and nothing for adapters while alpha is 0. Memory: three times the weights for gradient and
optimizer, per run; two windows of the store, or the decoded layer.
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
