"""Batches from a store: shuffled for training, or in order for scoring; each row carries its position.

A window of contexts (2,048 by default) is decoded into a buffer while the previous one is used; its tokens
are permuted and cut into batches of nearly equal size (order.py). Resuming at a step reads the token ids of
the windows before it in its epoch, and all of them once an epoch is complete; starting reads those of one
window.
Costs: two windows of memory, and per batch one gather on top of decoding. A layer that is kept decoded
(``DecodedLayer``) costs its whole size in memory, and is read once for all epochs and passes. A GPU holds
windows in its own memory if it has room, and gathers there (chunk_memory.py). Several processes can share the
same batches: each decodes some chunks of every window, and has the rows of these.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...store.manifest import layer_path
from ...store.reader import ActivationStore
from ...store.threads import stop
from ..ranges import PositionRange
from .batch import Batch, Part, as_torch, range_offsets
from .chunk_memory import ChunkMemory, DecodedLayer, HostBuffer, chunk_memory
from .order import Order

_SCAN_CHUNKS = 512


class ShuffledBatches:
    """Batches of one layer of a store; iterate over ``steps``.

    Attributes:
        order: which row is in which batch.
        n_contexts: training contexts, the first of the store.
    """

    def __init__(
        self,
        store: ActivationStore,
        layer: int,
        ranges: Sequence[PositionRange],
        *,
        batch_size: int = 2048,
        window_contexts: int = 2048,
        seed: int = 0,
        leave_out: Sequence[int] = (),
        n_contexts: int | None = None,
        threads: int | None = None,
        device: torch.device | None = None,
        decoded: DecodedLayer | None = None,
        part: int = 0,
        n_parts: int = 1,
    ) -> None:
        """Plan the order; nothing is read yet.

        Args:
            store: an opened store.
            layer: one of its layers.
            ranges: position ranges of ``range_offsets``.
            batch_size: tokens per batch, about.
            window_contexts: contexts decoded at once.
            seed: data seed.
            leave_out: token ids whose rows are left out.
            n_contexts: contexts to read, from the first; by default the training part.
            threads: threads that decode; by default 2, with a GPU up to 8, for a store on a server as many
                as hide its latency.
            device: of ``on_device``; by default the CPU.
            decoded: keeps the layer decoded in memory; of the same layer and contexts. By default the layer
                is kept if it is a single window.
            part: which part of every batch to read, from 0: every ``n_parts``-th chunk of a window.
            n_parts: number of parts; together they have each row once.
        """
        self.store = store
        self.n_contexts = store.training_contexts(layer) if n_contexts is None else n_contexts
        self._reader = store.array(layer_path(layer))
        self._leave_out = np.array(sorted(leave_out), np.int64)
        self._ranges = tuple(ranges)
        self._device = device or torch.device("cpu")
        self._part, self._n_parts = part, n_parts
        usual = 2 if self._device.type == "cpu" else min(8, os.cpu_count() or 1)
        threads = threads or (store.reading_threads if store.is_remote else usual)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="posae-decode")
        self.order = Order(
            n_contexts=self.n_contexts,
            context_length=store.context_length,
            chunk_contexts=store.manifest.chunk_contexts,
            window_contexts=window_contexts,
            batch_size=batch_size,
            seed=seed,
            wanted_of=self._wanted_of,
        )
        self._wanted = np.full(self.order.n_chunks, -1)  # -1 until the tokens of the chunk are read
        if decoded is None and self.order.n_windows == 1:
            decoded = DecodedLayer(store, layer, self.n_contexts, self._device)
        self._kept = decoded

    @property
    def is_empty(self) -> bool:
        """Whether no token is wanted; reads token ids until one is.

        Raises:
            StoreDamagedError: the tokens are not what was written.
        """
        return self.order.find(0) is None

    @property
    def usual_size(self) -> int:
        """Tokens per batch in the first window that has any; less than asked for if a window holds less.

        Raises:
            StoreDamagedError: the tokens are not what was written.
        """
        in_windows = (int(self._wanted_of(chunks).sum()) for chunks in self.order.windows_of_epoch(0))
        n_rows = next((n for n in in_windows if n), 0)
        return n_rows // max(1, self.order.n_batches(n_rows))

    def _wanted_of(self, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        unknown = np.sort(chunks[self._wanted[chunks] < 0])
        for start in range(0, len(unknown), _SCAN_CHUNKS):
            self._read_tokens(unknown[start : start + _SCAN_CHUNKS])
        return self._wanted[chunks]

    def _read_tokens(self, chunks: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids of whole chunks and which of them are wanted; both [contexts, positions]."""
        size = self._reader.spec.chunk_rows
        contexts = (chunks[:, np.newaxis] * size + np.arange(size)).reshape(-1)
        exists = contexts < self.n_contexts
        tokens = np.zeros((len(contexts), self.store.context_length), np.int32)
        tokens[exists] = self.store.tokens(contexts[exists])
        wanted = ~np.isin(tokens, self._leave_out) & exists[:, np.newaxis]
        self._wanted[chunks] = wanted.reshape(len(chunks), -1).sum(axis=1)
        return tokens, wanted

    def steps(self, start: int, stop: int) -> Generator[Batch]:
        """The batches of steps ``start`` to ``stop``; they depend on the step alone.

        Iterate over one at a time, as all share the buffers. Once the iterator is closed, no thread reads the
        store.

        Raises:
            StoreDamagedError: a chunk is missing or not what was written.
        """
        place = self.order.find(start) if start < stop else None
        if place is None:
            return
        epoch, first_window, skip = place
        copying = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        buffers = [HostBuffer(self._device, copying, self.store.d_model) for _ in range(2)]
        step = start
        with closing(self._windows(epoch, first_window)) as windows:
            for window in windows:
                for rows in window.batches[skip:]:
                    yield self._batch(step, window, rows, buffers[step % 2])
                    step += 1
                    if step >= stop:
                        return
                skip = 0

    def _batch(self, step: int, window: "_Window", rows: NDArray[np.int64], buffer: HostBuffer) -> Batch:
        length, size = self.store.context_length, self._reader.spec.chunk_rows
        place, position = np.divmod(rows, length)
        # Sorted by position, then by place in memory, as one number per row.
        n_places = len(window.chunks) * size
        position, place = np.divmod(np.sort(position * n_places + place), n_places)
        part = None
        if self._n_parts > 1:
            places = np.flatnonzero(self._is_ours(place // size))
            part = Part(places, position)
            position, place = position[places], place[places]
        chunk, within = np.divmod(place, size)
        in_memory = (window.homes[chunk] * size + within) * length + position
        return Batch(
            step,
            window.memory.rows(in_memory, buffer),
            position,
            window.chunks[chunk] * size + within,
            window.tokens[place, position],
            range_offsets(position, self._ranges),
            part,
        )

    def _is_ours(self, chunk: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether chunks, by their index in a window, are in this process's part."""
        return chunk % self._n_parts == self._part

    @cached_property
    def _buffers(self) -> list[ChunkMemory]:
        # Two buffers are reused: new ones would cost as much in page faults as decoding. The places of other
        # parts' chunks are never written, so they take no memory.
        spec = self._reader.spec
        shape = (self.order.window_chunks, spec.chunk_rows, *spec.shape[1:])
        return [chunk_memory(shape, self._device) for _ in range(2)]

    def _windows(self, epoch: int, window: int) -> Generator["_Window"]:
        """Every window from this one on; the next one is decoded while one is used."""
        upcoming = self._schedule(epoch, window)
        turn = 0
        current = self._begin(*next(upcoming), turn)
        try:
            while True:
                ready = self._ready(current)
                turn ^= 1
                # The other buffer is free: its window's batches have all been taken.
                current = self._begin(*next(upcoming), turn)
                yield ready
        finally:
            stop(current.decoding)

    def _schedule(self, epoch: int, window: int) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        while True:
            for number, chunks in enumerate(self.order.windows_of_epoch(epoch, window), window):
                yield epoch, number, chunks
            epoch, window = epoch + 1, 0

    def _begin(self, epoch: int, window: int, chunks: NDArray[np.int64], turn: int) -> "_Decoding":
        """Start to decode the chunks of a window that are not in memory yet."""
        is_missing = self._is_ours(np.arange(len(chunks)))
        if self._kept is None:
            memory, homes = self._buffers[turn], np.arange(len(chunks))
            memory.reuse()
        else:
            memory, homes = self._kept.chunks, chunks
            is_missing &= ~self._kept.is_there[chunks]
        home_of = dict(zip(chunks[is_missing].tolist(), homes[is_missing].tolist(), strict=True))
        decoding = self._reader.start_reading(
            home_of, lambda chunk, decode: memory.put(home_of[chunk], decode), self._pool
        )
        return _Decoding(epoch, window, chunks, homes, memory, decoding)

    def _ready(self, window: "_Decoding") -> "_Window":
        chunks = window.chunks
        tokens, wanted = self._read_tokens(chunks)
        for future in window.decoding:
            future.result()
        window.memory.ready()
        if self._kept is not None:
            self._kept.is_there[chunks[self._is_ours(np.arange(len(chunks)))]] = True
        return _Window(
            chunks,
            window.homes,
            window.memory,
            tokens,
            self.order.permuted(window.epoch, window.number, np.flatnonzero(wanted)),
        )


class _Decoding(NamedTuple):
    epoch: int
    number: int
    chunks: NDArray[np.int64]
    homes: NDArray[np.int64]
    memory: ChunkMemory
    decoding: list[Future[None]]


class _Window(NamedTuple):
    chunks: NDArray[np.int64]
    homes: NDArray[np.int64]  # index of each chunk in memory
    memory: ChunkMemory
    tokens: NDArray[np.int32]  # [contexts of the window, positions]
    batches: list[NDArray[np.int64]]


def shuffled_batches(
    store: ActivationStore, layer: int, ranges: Sequence[PositionRange], *, steps: int, **options: Any
) -> Iterator[Batch]:
    """The first ``steps`` batches of a layer; ``options`` are those of ``ShuffledBatches``."""
    return ShuffledBatches(store, layer, ranges, **options).steps(0, steps)


def ordered_batches(
    store: ActivationStore,
    layer: int,
    ranges: Sequence[PositionRange],
    *,
    start: int,
    stop: int,
    leave_out: Sequence[int] = (),
    batch_contexts: int = 64,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """The contexts ``start`` to ``stop`` in order, ``batch_contexts`` at a time, rows sorted by position."""
    for number, first in enumerate(range(start, stop, batch_contexts)):
        contexts = np.arange(first, min(first + batch_contexts, stop))
        tokens = store.tokens(contexts)
        row_position, row_context = np.nonzero(~np.isin(tokens, np.array(leave_out)).T)
        bits = store.read(layer, contexts)[row_context, row_position]
        yield Batch(
            number,
            as_torch(bits).to(device),
            row_position,
            contexts[row_context],
            tokens[row_context, row_position],
            range_offsets(row_position, ranges),
        )
