"""Keeping a decoded layer in memory during training. Takes 2 bytes per number."""

from typing import Any, Literal

import torch

from ...store.reader import ActivationStore
from ..device import free_bytes
from ..processes import processes_here
from .chunk_memory import DecodedLayer, has_room


class LayerMemory:
    """Keeps at most one decoded layer in memory, for later epochs and passes.

    Attributes:
        wish: ``always``, ``never``, or ``auto``: on a GPU or from a server, if the layer is read more than
            once and fits into a quarter of the GPU's free memory or half of the machine's.
    """

    def __init__(self, wish: Literal["auto", "always", "never"] = "auto") -> None:
        """Nothing is kept yet."""
        self.wish = wish
        self._of: tuple[Any, ...] | None = None
        self._kept: DecodedLayer | None = None

    def of(
        self, store: ActivationStore, layer: int, n_contexts: int, *, n_tokens: int, device: torch.device
    ) -> DecodedLayer | None:
        """Memory for a layer, with the chunks decoded so far; None if it is not kept.

        Args:
            store: an opened store.
            layer: one of its layers.
            n_contexts: contexts that are read, from the first.
            n_tokens: tokens that will be read in total.
            device: the device that trains.
        """
        which = (store.address, layer, n_contexts, device)
        if which != self._of:
            self._of, self._kept = which, None
        if self._kept is None:
            # On a CPU decoding costs little beside the matrix products.
            is_waited_for = device.type != "cpu" or store.is_remote
            is_read_again = n_tokens > n_contexts * store.context_length
            # Each process ends up with the whole layer, as its part changes from epoch to epoch.
            n_bytes = DecodedLayer.n_bytes(store, layer, n_contexts)
            in_all = n_bytes * processes_here().n_local
            fits = has_room(device, n_bytes) or in_all <= free_bytes(torch.device("cpu")) // 2
            is_worth_it = is_waited_for and is_read_again and fits
            if self.wish == "always" or (self.wish == "auto" and is_worth_it):
                self._kept = DecodedLayer(store, layer, n_contexts, device)
        return self._kept
