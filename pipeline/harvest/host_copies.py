"""Activations on their way from a device to memory, while the device goes on computing.

On a GPU they are copied into pinned memory by a stream of their own: the host asks for the next batch
before it waits for the last, so the GPU has work at all times. Memory is taken once, room for three batches:
one that arrives and two that are being encoded. On the CPU nothing is copied.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_N_ROOMS = 3


class _Room:
    """Memory for one batch, pinned if a GPU is to copy into it."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._values: dict[int, torch.Tensor] = {}
        self.readers: list[Future[Any]] = []

    def of(self, layer: int, shape: torch.Size) -> torch.Tensor:
        """Memory for one layer; bfloat16 of ``shape``."""
        there = self._values.get(layer)
        if there is None or there.numel() < shape.numel():
            there = torch.empty(shape.numel(), dtype=torch.bfloat16, pin_memory=self._pinned)
            self._values[layer] = there
        return there[: shape.numel()].view(shape)


class HostCopy:
    """The activations of one batch in memory, or on their way there."""

    def __init__(
        self, values: Mapping[int, torch.Tensor], room: _Room | None, copied: torch.cuda.Event | None
    ) -> None:
        """Speak of a copy; ``HostCopies.start`` makes one."""
        self._values = values
        self._room = room
        self._copied = copied

    def bits(self) -> dict[int, NDArray[np.uint16]]:
        """The bits by layer, as soon as they are there; uint16 [contexts, positions, d_model]."""
        if self._copied:
            self._copied.synchronize()
        found: dict[int, NDArray[np.uint16]] = {}
        for layer, values in self._values.items():
            signed: NDArray[np.int16] = values.contiguous().view(torch.int16).numpy()
            found[layer] = signed.view(np.uint16)
        return found

    def read_by(self, readers: Sequence[Future[Any]]) -> None:
        """Say who reads the bits: their memory is used again when all of them are done."""
        if self._room:
            self._room.readers += readers


class HostCopies:
    """Batches brought from a device to memory, one after the other."""

    def __init__(self, device: torch.device) -> None:
        """Bring them from ``device``; memory is taken with the first of them."""
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._rooms = deque(_Room(pinned=self._copying is not None) for _ in range(_N_ROOMS))

    def start(self, activations: Mapping[int, torch.Tensor]) -> HostCopy:
        """Begin to copy a batch, and on a GPU do not wait for it, nor for the model that computes it.

        Waits for the readers of the batch that had the memory before.

        Args:
            activations: by layer, bfloat16 [contexts, positions, d_model] on the device.
        """
        if self._device.type == "cpu":
            return HostCopy(activations, None, None)
        room = self._rooms[0]
        self._rooms.rotate(-1)
        wait(room.readers)
        room.readers.clear()
        places = {layer: room.of(layer, values.shape) for layer, values in activations.items()}
        if self._copying is None:
            for layer, values in activations.items():
                places[layer].copy_(values)
            return HostCopy(places, room, None)
        copied = torch.cuda.Event()
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copying):
            for layer, values in activations.items():
                places[layer].copy_(values, non_blocking=True)
                # Its memory on the device is not to be used again before it is copied.
                values.record_stream(self._copying)
            copied.record()
        return HostCopy(places, room, copied)
