"""Memory for the decoded chunks of a layer, from which the rows of a batch are gathered.

On a CPU, or where a GPU has no room, chunks are in host memory: rows are gathered there (for a GPU into
pinned memory) and copied on a separate stream. Where the GPU has room, each chunk is copied once, when it is
decoded, and rows are gathered on the GPU: the host only sends row numbers.
"""

import math
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ...store.manifest import layer_path
from ...store.reader import ActivationStore
from ...store.shards import Decode
from ..device import free_bytes

_N_STAGED = 8
"""Number of chunks that may be in transfer to a GPU at once."""


class ChunkMemory(Protocol):
    """Room for a number of chunks."""

    def put(self, home: int, decode: Decode) -> None:
        """Decode a chunk into a slot; thread-safe."""

    def reuse(self) -> None:
        """Wait for pending reads before slots are overwritten."""

    def ready(self) -> None:
        """Make the chunks decoded so far available to the current stream."""

    def rows(self, places: NDArray[np.int64], buffer: "HostBuffer") -> torch.Tensor:
        """Rows of the flattened slots, on the device; bfloat16 [rows, d_model]."""
        ...


def chunk_memory(shape: Sequence[int], device: torch.device) -> ChunkMemory:
    """Memory for chunks of ``shape`` [chunks, contexts, positions, d_model], on the GPU if it has room."""
    return _OnDevice(shape, device) if has_room(device, 2 * math.prod(shape)) else _OnHost(shape)


def has_room(device: torch.device, n_bytes: int) -> bool:
    """Whether ``n_bytes`` fit into a quarter of a GPU's free memory."""
    return device.type == "cuda" and n_bytes <= free_bytes(device) // 4


class _OnHost:
    def __init__(self, shape: Sequence[int]) -> None:
        self._bits = np.empty(shape, np.uint16)
        self._rows = self._bits.reshape(-1, shape[-1])

    def put(self, home: int, decode: Decode) -> None:
        decode(self._bits[home])

    def reuse(self) -> None: ...

    def ready(self) -> None: ...

    def rows(self, places: NDArray[np.int64], buffer: "HostBuffer") -> torch.Tensor:
        np.take(self._rows, places, axis=0, out=buffer.bits(len(places)), mode="clip")
        return buffer.on_device(len(places))


class _OnDevice:
    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._chunks = torch.empty(tuple(shape), dtype=torch.bfloat16, device=device)
        self._rows = self._chunks.view(-1, shape[-1])
        self._copying = torch.cuda.Stream(device)
        self._staged: SimpleQueue[HostBuffer] = SimpleQueue()
        for _ in range(_N_STAGED):
            buffer = HostBuffer(device, self._copying, shape[-1])
            buffer.bits(shape[1] * shape[2])
            self._staged.put(buffer)

    def put(self, home: int, decode: Decode) -> None:
        chunk = self._chunks[home]
        buffer = self._staged.get()
        try:
            bits = buffer.bits(chunk.shape[0] * chunk.shape[1])
            decode(bits.reshape(chunk.shape))
            buffer.copy_to(chunk.view(-1, chunk.shape[-1]))
        finally:
            self._staged.put(buffer)

    def reuse(self) -> None:
        self._copying.wait_stream(torch.cuda.current_stream(self._device))

    def ready(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._copying)

    def rows(self, places: NDArray[np.int64], buffer: "HostBuffer") -> torch.Tensor:
        return self._rows[torch.as_tensor(places).to(self._device, non_blocking=True)]


class HostBuffer:
    """Host memory for rows, pinned if a GPU copies from it."""

    def __init__(self, device: torch.device, copying: torch.cuda.Stream | None, d_model: int) -> None:
        """Allocate nothing yet; ``copying`` is the stream for copies to a GPU."""
        self._device = device
        self._copying = copying
        self._rows = torch.empty((0, d_model), dtype=torch.bfloat16)
        self._copied = torch.cuda.Event() if copying else None

    def bits(self, n_rows: int) -> NDArray[np.uint16]:
        """Room for ``n_rows``, after waiting for the last copy to the GPU; uint16 [rows, d_model]."""
        if self._copied:
            self._copied.synchronize()
        if n_rows > len(self._rows):
            shape = (n_rows, self._rows.shape[1])
            self._rows = torch.empty(shape, dtype=torch.bfloat16, pin_memory=self._copying is not None)
        bits: NDArray[np.int16] = self._rows[:n_rows].view(torch.int16).numpy()
        return bits.view(np.uint16)

    def copy_to(self, target: torch.Tensor) -> None:
        """Start copying as many rows as ``target`` has, on the stream for copies."""
        assert self._copied is not None
        with torch.cuda.stream(self._copying):
            target.copy_(self._rows[: len(target)], non_blocking=True)
            self._copied.record()

    def on_device(self, n_rows: int) -> torch.Tensor:
        """The rows on the device, ready for the current stream; bfloat16 [rows, d_model]."""
        rows = self._rows[:n_rows]
        if self._copying is None or self._copied is None:
            return rows.to(self._device)
        with torch.cuda.stream(self._copying):
            moved = rows.to(self._device, non_blocking=True)
            self._copied.record()
        using = torch.cuda.current_stream(self._device)
        using.wait_event(self._copied)
        moved.record_stream(using)
        return moved


class DecodedLayer:
    """Memory for a whole layer, filled as it is read; successive passes may share it. 2 bytes per number.

    Attributes:
        chunks: room for all chunks.
        is_there: which chunks were decoded; bool [chunks].
    """

    def __init__(
        self, store: ActivationStore, layer: int, n_contexts: int, device: torch.device | None = None
    ) -> None:
        """Allocate the memory; nothing is read yet.

        Args:
            store: an opened store.
            layer: one of its layers.
            n_contexts: contexts to keep, from the first.
            device: the device that trains; a GPU's memory is used if it has room.
        """
        shape = self._shape(store, layer, n_contexts)
        self.chunks = chunk_memory(shape, device or torch.device("cpu"))
        self.is_there = np.zeros(shape[0], np.bool_)

    @staticmethod
    def _shape(store: ActivationStore, layer: int, n_contexts: int) -> tuple[int, ...]:
        spec = store.array(layer_path(layer)).spec
        return (-(-n_contexts // spec.chunk_rows), spec.chunk_rows, *spec.shape[1:])

    @classmethod
    def n_bytes(cls, store: ActivationStore, layer: int, n_contexts: int) -> int:
        """Memory that it takes."""
        return 2 * math.prod(cls._shape(store, layer, n_contexts))
