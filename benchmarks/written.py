"""A sealed store of one layer, for benchmarks that make up what is in it."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posae.store.manifest import Manifest
from posae.store.reader import ActivationStore
from posae.store.writer import StoreWriter

_AT_ONCE = 32


def written(
    root: Path,
    manifest: Manifest,
    ids: NDArray[np.int32],
    activations: Callable[[int, int], NDArray[np.uint16]],
) -> ActivationStore:
    """The store at ``root``; layer 0 is written where it is not there yet.

    Args:
        root: its folder.
        manifest: what it says of itself.
        ids: token ids [contexts, positions]; those above 3 count as ordinary.
        activations: bits [contexts, positions, d_model] of the contexts from one number up to another.
    """
    writer = StoreWriter.begin(root, manifest)
    with writer.lock():
        counts: dict[str, Any] = {"documents": 0, "documents_left_out": 0, "duplicate_contexts": 0}
        writer.write_tokens(ids, np.zeros(ids.shape, np.int64), counts | {"special_tokens": {}})
        writer.add_layers([0])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for shard in range(manifest.n_shards):
            locked = writer.lock_shard([0], shard, wait=True)
            if locked is None:
                continue
            with locked:
                for start in range(locked.contexts.start, locked.contexts.stop, _AT_ONCE):
                    stop = min(start + _AT_ONCE, locked.contexts.stop)
                    locked.append(0, activations(start, stop), ids[start:stop] > 3, pool)
                locked.commit()
    with writer.lock():
        writer.seal()
    return ActivationStore.open(root)
