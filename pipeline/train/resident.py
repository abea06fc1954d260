"""Whether a layer is kept decoded in memory while it is trained on. Costs its size, 2 bytes a number."""

from typing import Any, Literal

import torch

from ...store.reader import ActivationStore
from ..device import free_bytes
from ..processes import processes_here
from .chunk_memory import DecodedLayer, has_room


class LayerMemory:
    """Whether a layer is kept decoded in memory, for later epochs and passes; one at a time is.

    Attributes:
        wish: ``always``, ``never``, or ``auto``: where a GPU or a server would have to be waited for, a
            quarter of the GPU's free memory or half of the machine's holds it, and it is read more than once.
    """

    def __init__(self, wish: Literal["auto", "always", "never"] = "auto") -> None:
        """Nothing is kept yet."""
        self.wish = wish
        self._of: tuple[Any, ...] | None = None
        self._kept: DecodedLayer | None = None

    def of(
        self, store: ActivationStore, layer: int, n_contexts: int, *, n_tokens: int, device: torch.device
    ) -> DecodedLayer | None:
        """Memory for a layer, with what is there of it; None: it is not kept.

        Args:
            store: whose layer it is.
            layer: which.
            n_contexts: that are read, from the first.
            n_tokens: that will be read in all.
            device: what they are read for.
        """
        which = (store.address, layer, n_contexts, device)
        if which != self._of:
            self._of, self._kept = which, None
        if self._kept is None:
            # Beside the products of a CPU decoding is next to nothing.
            is_waited_for = device.type != "cpu" or store.is_remote
            is_read_again = n_tokens > n_contexts * store.context_length
            # In time each process of a machine comes to hold all of it: parts change from epoch to epoch.
            n_bytes = DecodedLayer.n_bytes(store, layer, n_contexts)
            in_all = n_bytes * processes_here().n_local
            fits = has_room(device, n_bytes) or in_all <= free_bytes(torch.device("cpu")) // 2
            is_worth_it = is_waited_for and is_read_again and fits
            if self.wish == "always" or (self.wish == "auto" and is_worth_it):
                self._kept = DecodedLayer(store, layer, n_contexts, device)
        return self._kept
