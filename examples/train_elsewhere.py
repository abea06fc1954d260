"""Trainers that are not posae's, on a store: plain PyTorch, and dictionary_learning where it is installed.

    make demo && python examples/train_elsewhere.py data/demo.zarr

Needs no GPU and no language model. Takes some seconds.
"""

# %% A data set of PyTorch: each item is a batch, shuffled already, so the loader makes none.
import importlib
import sys
import tempfile
from typing import Any

import torch
from torch.utils.data import DataLoader

from posae.pipeline.interop.activation_dataset import ActivationBuffer, ActivationDataset
from posae.store import ActivationStore

path = sys.argv[1] if len(sys.argv) > 1 else "data/demo.zarr"
steps = 60
store = ActivationStore.open(path)
layer = store.layer_or_middle(None)
dataset = ActivationDataset(store, layer, steps=steps, batch_size=512)
loader: DataLoader[Any] = DataLoader(dataset, batch_size=None)

# %% An autoencoder in ten lines; positions are beside the activations, for whoever wants them.
torch.manual_seed(0)
encoder = torch.nn.Linear(store.d_model, 4 * store.d_model)
decoder = torch.nn.Linear(4 * store.d_model, store.d_model)
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
errors: list[float] = []
for x, positions, _tokens in loader:
    assert len(x) == len(positions)
    error = (decoder(encoder(x).relu()) - x).square().sum() / (x - x.mean(0)).square().sum()
    optimizer.zero_grad()
    error.backward()
    optimizer.step()
    errors.append(float(error.detach()))
print(f"plain PyTorch, {len(errors)} steps: FVU {errors[0]:.2f} in the first, {errors[-1]:.2f} in the last")


# %% The trainers of dictionary_learning take an iterator of activations: a buffer of theirs, or this one.
try:
    training: Any = importlib.import_module("dictionary_learning.training")
    top_k: Any = importlib.import_module("dictionary_learning.trainers.top_k")
except ImportError:
    print("dictionary_learning: not installed; pip install dictionary-learning")
else:
    settings: dict[str, Any] = {
        "trainer": top_k.TopKTrainer,
        "activation_dim": store.d_model,
        "dict_size": 4 * store.d_model,
        "k": 8,
        "lr": 1e-3,
        "layer": layer,
        "lm_name": store.manifest.model,
        "steps": steps,
        "warmup_steps": 5,
        "device": "cpu",
        "seed": 0,
    }
    data = ActivationBuffer(dataset)
    with tempfile.TemporaryDirectory() as folder:
        training.trainSAE(data, trainer_configs=[settings], steps=steps, device="cpu", save_dir=folder)
        trained = top_k.AutoEncoderTopK.from_pretrained(f"{folder}/trainer_0/ae.pt", k=8)
    x = next(iter(data))
    error = (trained(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    print(f"dictionary_learning, {steps} steps of TopK: FVU {float(error):.2f} in the first batch")
