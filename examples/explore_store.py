"""A look around a store, cell by cell; open it as a notebook (VS Code, Jupytext) or run it whole.

    make demo && python examples/explore_store.py data/demo.zarr

Needs no GPU and no language model; xarray (``pip install xarray``) for the last cell. Takes some seconds.
"""

# %% Open a store. Nothing is read yet but its metadata.
import sys

import numpy as np

from posae.store import ActivationStore

path = sys.argv[1] if len(sys.argv) > 1 else "data/demo.zarr"
store = ActivationStore.open(path)
layer = store.layers[len(store.layers) // 2]
print(store)

# %% What was summed up at harvest costs nothing to look at: norms by position, and what position explains.
norms = store.norms(layer)
stats = store.stats(layer)
print(f"layer {layer}: norm {norms.mean[0]:.1f} at position 0, {norms.mean[1:].mean():.1f} elsewhere")
print(f"position explains {stats.position_r2:.2%} of the variance; {norms.outlier_share:.2%} are outliers")

# %% Activations of any contexts and positions, as float32 or as the bits of bfloat16.
values = store.read(layer, contexts=slice(0, 64), positions=[0, 1, -1], dtype="float32")
print("some activations [contexts, positions, d_model]:", values.shape, values.dtype)

# %% Tokens and documents lie beside them. Which tokens have the longest activations, attention sinks maybe?
tokens = store.tokens(slice(0, 64))
lengths = np.linalg.norm(store.read(layer, slice(0, 64), dtype="float32"), axis=-1)
is_special = np.isin(tokens, store.manifest.special_token_ids)
for context, position in zip(
    *np.unravel_index(np.argsort(-lengths, axis=None)[:5], lengths.shape), strict=True
):
    kind = "special" if is_special[context, position] else "ordinary"
    print(
        f"norm {lengths[context, position]:7.1f} at context {context:2}, position {position:3}: "
        f"token {tokens[context, position]} ({kind})"
    )

# %% One part of the contexts was never trained on.
held_out = np.zeros(store.n_contexts, np.bool_)
held_out[slice(*store.held_out_part(layer))] = True
print(f"{held_out.sum()} contexts are held out, of {len(np.unique(store.documents(held_out)))} documents")

# %% In PyTorch: bfloat16 without a copy, and shuffled batches in which each row knows its position.
import torch

from posae.pipeline import as_torch, shuffled_batches
from posae.pipeline.ranges import equal_ranges

activations = as_torch(store.read(layer, slice(0, 8)))
print("as a tensor:", tuple(activations.shape), activations.dtype)
ranges = equal_ranges(store.context_length, 4)
for batch in shuffled_batches(
    store, layer, ranges, steps=2, batch_size=512, leave_out=store.manifest.special_token_ids
):
    mean = batch.on_device.float().norm(dim=1).mean()
    print(f"batch {batch.step}: {len(batch.positions)} rows, mean norm {mean:.1f}, ", end="")
    print("rows by position range", np.diff(batch.range_offsets).tolist())

# %% The position means that training may subtract: how far do they lie from the mean of all?
there = stats.counts > 0
means = torch.as_tensor(stats.sums[there] / stats.counts[there, np.newaxis])
distance = (means - means.mean(0)).norm(dim=1)
print(f"position means lie {distance.mean():.2f} from their mean; farthest is position", end=" ")
print(int(np.flatnonzero(there)[int(distance.argmax())]))

# %% With xarray: named axes, lazily read by zarr-python. bfloat16 comes as its bits.
import warnings

import xarray

from posae.store import register_bfloat16

register_bfloat16()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # zarr-python: seal.json is not part of Zarr
    dataset = xarray.open_zarr(path, consolidated=False, mask_and_scale=False)
first = dataset[f"layer_{layer}"].isel(context=slice(0, 8), position=0)
print("xarray:", dict(first.sizes), first.dtype)
assert (first.values == store.read(layer, slice(0, 8), [0])[:, 0]).all()
