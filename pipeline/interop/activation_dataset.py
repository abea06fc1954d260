"""A store's training part for other trainers: a PyTorch data set, and a buffer of activations.

The order is that of ``posae train`` with the same seed, window and batch size: fixed, with each token once
per epoch. Costs a copy of each batch in addition to ``ShuffledBatches``.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ...store.reader import ActivationStore
from ..ranges import PositionRange
from ..train.batch import as_torch
from ..train.batches import ShuffledBatches


class Rows(NamedTuple):
    """Tokens of one batch, in no order."""

    activations: Tensor
    """[rows, d_model]."""

    positions: Tensor
    """int64 [rows]: the position in the context; without meaning if an imported store has none."""

    tokens: Tensor
    """int32 [rows]: token ids; 0 if an imported store has none."""


class ActivationDataset(IterableDataset[Rows]):
    """Batches of a layer, shuffled; give it to ``DataLoader(dataset, batch_size=None)``.

    Workers do not change the batches or their order. Each worker decodes everything and yields its share of
    the batches: one relieves the trainer of decoding, more only share the copying.
    """

    def __init__(
        self,
        store: ActivationStore | Path | str,
        layer: int,
        *,
        steps: int | None = None,
        batch_size: int = 2048,
        window_contexts: int = 2048,
        seed: int = 0,
        special_tokens: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Check that there is such a layer; nothing is decoded yet.

        Args:
            store: an opened store, or its folder or URL; each worker opens it for itself.
            layer: one of its layers.
            steps: number of batches; by default those of one epoch. Further epochs have other orders.
            batch_size: approximate number of tokens per batch.
            window_contexts: contexts decoded at once, twice in memory; a multiple of the store's chunks.
            seed: of the order.
            special_tokens: whether to include special tokens (BOS, EOS …).
            dtype: of the activations; the store has bfloat16.

        Raises:
            StoreError: no store, a damaged one, or one without this layer.
        """
        opened = store if isinstance(store, ActivationStore) else ActivationStore.open(store)
        opened.check_layer(layer)
        self.address = opened.address
        self.layer = layer
        self.steps = steps
        self.dtype = dtype
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "window_contexts": window_contexts,
            "seed": seed,
            "leave_out": () if special_tokens else opened.manifest.special_token_ids,
            # Otherwise a growing store would have another order in each worker.
            "n_contexts": opened.training_contexts(layer),
        }

    def __iter__(self) -> Iterator[Rows]:
        """The batches from the first; of each iteration the same.

        Raises:
            StoreDamagedError: a chunk is missing or not what was written.
        """
        store = ActivationStore.open(self.address)
        everywhere = [PositionRange(0, store.context_length)]
        batches = ShuffledBatches(store, self.layer, everywhere, **self._options)
        order = batches.order
        steps = self.steps
        if steps is None:
            steps = sum(order.steps_of_window(chunks) for chunks in order.windows_of_epoch(0))
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in islice(batches.steps(0, steps), first, None, stride):
            yield Rows(
                as_torch(batch.activations).to(self.dtype, copy=True),
                torch.as_tensor(batch.positions),
                torch.as_tensor(batch.tokens),
            )


class ActivationBuffer:
    """The activations alone, as dictionary_learning's ``trainSAE`` takes them: ``data=ActivationBuffer(…)``.

    Attributes:
        config: what that saves beside the autoencoders.
    """

    def __init__(self, dataset: ActivationDataset, device: torch.device | str = "cpu") -> None:
        """Give the batches of ``dataset`` on ``device``."""
        self.dataset = dataset
        self.device = torch.device(device)
        self.config = {"store": dataset.address, "layer": dataset.layer, "steps": dataset.steps}

    def __iter__(self) -> Iterator[Tensor]:
        """[rows, d_model] of each batch.

        Raises:
            StoreDamagedError: a chunk is missing or not what was written.
        """
        for rows in self.dataset:
            yield rows.activations.to(self.device)
