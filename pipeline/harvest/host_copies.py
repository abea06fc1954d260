"""Copying activations from a device to host memory while the device keeps computing.

On a GPU they are copied into pinned memory on a separate stream: the host launches the next batch before it
waits for the last, so the GPU is always busy. Memory is allocated once, for three batches: one in transfer
and two being encoded. On the CPU nothing is copied.
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
    """Memory for one batch, pinned if a GPU copies into it."""

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
    """The activations of one batch, in memory or in transfer."""

    def __init__(
        self, values: Mapping[int, torch.Tensor], room: _Room | None, copied: torch.cuda.Event | None
    ) -> None:
        """Describe a copy; ``HostCopies.start`` makes one."""
        self._values = values
        self._room = room
        self._copied = copied

    def bits(self) -> dict[int, NDArray[np.uint16]]:
        """The bits by layer, after waiting for the copy; uint16 [contexts, positions, d_model]."""
        if self._copied:
            self._copied.synchronize()
        found: dict[int, NDArray[np.uint16]] = {}
        for layer, values in self._values.items():
            signed: NDArray[np.int16] = values.contiguous().view(torch.int16).numpy()
            found[layer] = signed.view(np.uint16)
        return found

    def read_by(self, readers: Sequence[Future[Any]]) -> None:
        """Register readers of the bits: the memory is reused when all of them are done."""
        if self._room:
            self._room.readers += readers


class HostCopies:
    """Copies batches from a device to memory, one after another."""

    def __init__(self, device: torch.device) -> None:
        """Copy from ``device``; memory is allocated with the first batch."""
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._rooms = deque(_Room(pinned=self._copying is not None) for _ in range(_N_ROOMS))

    def start(self, activations: Mapping[int, torch.Tensor]) -> HostCopy:
        """Start copying a batch; on a GPU without waiting for the copy or the model.

        Waits for the readers of the batch that used the memory before.

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
                # Its memory on the device must not be reused before it is copied.
                values.record_stream(self._copying)
            copied.record()
        return HostCopy(places, room, copied)
