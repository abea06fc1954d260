"""Shuffled batches from a store: every wanted token once an epoch, its position beside it.

A window of contexts (2,048 by default) is decoded into a buffer while the one before is being
used; its tokens are permuted and cut into batches of nearly equal size, nothing is carried over.
The order follows from (data seed, window, batch size, training contexts, left-out ids) alone, so a
run resumes at any step by decoding one window, and all runs that agree in these can share one pass.
Where a step lies depends on how many tokens are left out before it, so going on at a step reads the token
ids of the windows before it in its epoch, and all once an epoch is past; beginning reads one window's.
Costs: two windows of memory, and per batch one gather on top of decoding. A layer that is kept
decoded (``DecodedLayer``) costs its whole size in memory, and is read once for all epochs and passes. A GPU
holds windows in its own memory where it has room, and gathers there (chunk_memory.py). Several
processes can share the same batches: each decodes some chunks of every window, and has the rows from these.
"""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...store.manifest import layer_path
from ...store.reader import ActivationStore
from ...store.threads import stop
from ..ranges import PositionRange
from .chunk_memory import ChunkMemory, DecodedLayer, HostBuffer, chunk_memory

_SCAN_CHUNKS = 512


class Part(NamedTuple):
    """Which rows of a batch are here, where other processes have the others."""

    places: NDArray[np.int64]
    """Where each row stands in the whole batch, rising; [rows]."""

    positions: NDArray[np.int64]
    """Of all rows of the whole batch; [all rows]."""


class Batch(NamedTuple):
    """Tokens of one step, sorted by position; its memory is used again by the batch after the next."""

    step: int
    on_device: torch.Tensor
    """Activations, bfloat16 [rows, d_model], on the device that was asked for."""

    positions: NDArray[np.int64]
    """Position of each row in its context; [rows]."""

    contexts: NDArray[np.int64]
    """Context that each row came from; [rows]."""

    tokens: NDArray[np.int32]
    """Token id of each row; [rows]."""

    range_offsets: NDArray[np.int64]
    """Rows of range r lie between offsets r and r + 1; [ranges + 1]."""

    part: Part | None = None
    """What rows these are, where they are not all of the batch."""

    @property
    def activations(self) -> NDArray[np.uint16]:
        """The bits of ``on_device`` [rows, d_model]: the same memory on a CPU; a GPU is waited for."""
        bits: NDArray[np.int16] = self.on_device.cpu().view(torch.int16).numpy()
        return bits.view(np.uint16)

    @property
    def n_rows(self) -> int:
        """Rows of the whole batch."""
        return len(self.positions) if self.part is None else len(self.part.positions)

    def with_positions_of_others(self, order: NDArray[np.int64]) -> "tuple[NDArray[np.int64], Batch]":
        """The same rows with the positions of others: row ``order[i]`` of the whole batch takes row i's.

        Args:
            order: each row of the whole batch once; int64 [all rows].

        Returns:
            What order the rows are in then, int64 [rows]; and the batch, whose activations, contexts and
            tokens are still in the old one.
        """
        if self.part is None:
            return order, self
        row_at = np.full(self.n_rows, -1)
        row_at[self.part.places] = np.arange(len(self.positions))
        rows = row_at[order]
        places = np.flatnonzero(rows >= 0)
        part = Part(places, self.part.positions)
        return rows[places], self._replace(positions=self.part.positions[places], part=part)

    def offsets_of(self, ranges: Sequence[PositionRange]) -> NDArray[np.int64]:
        """As ``range_offsets``, of other ranges; int64 [ranges + 1]."""
        return _range_offsets(self.positions, ranges)


def _range_offsets(positions: NDArray[np.int64], ranges: Sequence[PositionRange]) -> NDArray[np.int64]:
    edges = [0, *(stop for _, stop in ranges)]
    return np.searchsorted(positions, edges).astype(np.int64)


def as_torch(bits: NDArray[np.uint16]) -> torch.Tensor:
    """The bits of bfloat16 viewed as a bfloat16 tensor, without a copy."""
    return torch.as_tensor(bits).view(torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of tokens: which rows stand in which batch. Arithmetic on counts, asked for as needed.

    Attributes:
        n_contexts: contexts that are read, from the first.
        context_length: positions of a context.
        chunk_contexts: contexts to a chunk of the store.
        window_contexts: contexts to a window.
        batch_size: tokens wanted in a batch.
        seed: data seed.
        wanted_of: how many tokens are wanted in each of some chunks; int64 [chunks] of int64 [chunks].
    """

    n_contexts: int
    context_length: int
    chunk_contexts: int
    window_contexts: int
    batch_size: int
    seed: int
    wanted_of: Callable[[NDArray[np.int64]], NDArray[np.int64]]

    @property
    def n_chunks(self) -> int:
        """Chunks that are read."""
        return -(-self.n_contexts // self.chunk_contexts)

    @property
    def window_chunks(self) -> int:
        """Chunks to a full window."""
        return min(max(1, self.window_contexts // self.chunk_contexts), self.n_chunks)

    @property
    def n_windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.n_chunks // self.window_chunks)

    def chunks_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """All chunks in the epoch's order; windows are cut from it."""
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.n_chunks)

    def windows_of_epoch(self, epoch: int, first: int = 0) -> Iterator[NDArray[np.int64]]:
        """The chunks of each window from ``first`` on, each sorted as they lie on disk."""
        order = self.chunks_of_epoch(epoch)
        step = self.window_chunks
        return (np.sort(order[i : i + step]) for i in range(first * step, self.n_chunks, step))

    def n_batches(self, n_rows: int) -> int:
        """Batches of a window with ``n_rows`` wanted rows: R / batch size, rounded, at least one.

        >>> order = Order(n_contexts=8, context_length=4, chunk_contexts=8, window_contexts=8,
        ...               batch_size=2048, seed=0, wanted_of=np.zeros_like)
        >>> order.n_batches(0), order.n_batches(900), order.n_batches(5200)
        (0, 1, 3)
        """
        return int(self._n_batches(np.array([n_rows]))[0])

    def _n_batches(self, n_rows: NDArray[np.int64]) -> NDArray[np.int64]:
        batches = np.rint(n_rows / self.batch_size).astype(np.int64)
        return np.where(n_rows > 0, np.maximum(1, batches), 0)

    def steps_of_window(self, chunks: NDArray[np.int64]) -> int:
        """Batches of the window made of ``chunks``."""
        return self.n_batches(int(self.wanted_of(chunks).sum()))

    def find(self, step: int) -> tuple[int, int, int] | None:
        """Epoch, window of the epoch and batch of the window of a step; None where no token is wanted.

        Goes through all windows before it, and counts no chunk past it. Costs some 20 ns a chunk
        and epoch beside the counting.
        """
        most = self.n_batches(self.window_chunks * self.chunk_contexts * self.context_length)
        size, epoch = self.window_chunks, 0
        while True:
            chunks, window, is_empty = self.chunks_of_epoch(epoch), 0, True
            while window < self.n_windows:
                # No window has more steps than a full one: the step lies in the last of these or later.
                passed = chunks[window * size : (window + step // most + 1) * size]
                wanted = np.add.reduceat(self.wanted_of(passed), np.arange(0, len(passed), size))
                ends = np.cumsum(self._n_batches(wanted))
                if step < ends[-1]:
                    within = int(np.searchsorted(ends, step, side="right"))
                    return epoch, window + within, step - int(ends[within - 1] if within else 0)
                step -= int(ends[-1])
                window += len(ends)
                is_empty = is_empty and not ends[-1]
            if is_empty:
                return None
            epoch += 1

    def permuted(self, epoch: int, window: int, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """A window's wanted rows, shuffled and cut into batches whose sizes differ by at most one."""
        if not len(rows):
            return []
        shuffle = np.random.Generator(np.random.PCG64([self.seed, epoch, window + 1]))
        return np.array_split(shuffle.permutation(rows), self.n_batches(len(rows)))


class ShuffledBatches:
    """Batches of one layer of a store; iterate over ``steps``.

    Attributes:
        order: which row stands in which batch.
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
            ranges: position ranges that ``range_offsets`` are of.
            batch_size: tokens to a batch, about.
            window_contexts: contexts decoded at once.
            seed: data seed.
            leave_out: token ids whose rows are never given.
            n_contexts: contexts to read, from the first; by default the training part.
            threads: threads that decode; by default 2, beside a GPU up to 8, for a store on a server as many
                as hide its latency.
            device: where ``on_device`` is to be; by default the CPU.
            decoded: memory of the same layer and contexts, where it is to be kept; by default it is kept
                where all of it is one window.
            part: which part of every batch to give, from 0; the chunks of each window are dealt out.
            n_parts: parts that there are; together they have each row once.
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
        self._wanted = np.full(self.order.n_chunks, -1)  # of chunks whose tokens were read
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
        """Tokens to a batch of the first window that has some: less than asked for where a window holds less.

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
        there = contexts < self.n_contexts
        tokens = np.zeros((len(contexts), self.store.context_length), np.int32)
        tokens[there] = self.store.tokens(contexts[there])
        wanted = ~np.isin(tokens, self._leave_out) & there[:, np.newaxis]
        self._wanted[chunks] = wanted.reshape(len(chunks), -1).sum(axis=1)
        return tokens, wanted

    def steps(self, start: int, stop: int) -> Generator[Batch]:
        """The batches of steps ``start`` to ``stop``; the same whatever came before.

        One at a time: all share the buffers. Once it is ended or closed, nothing reads the store any more.

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
        # By position, and at one position as the rows lie in memory; one sort of one number each.
        n_places = len(window.chunks) * size
        position, place = np.divmod(np.sort(position * n_places + place), n_places)
        part = None
        if self._n_parts > 1:
            places = np.flatnonzero(self._is_ours(place // size))
            part = Part(places, position)
            position, place = position[places], place[places]
        chunk, within = np.divmod(place, size)
        lies = (window.homes[chunk] * size + within) * length + position
        return Batch(
            step,
            window.memory.rows(lies, buffer),
            position,
            window.chunks[chunk] * size + within,
            window.tokens[place, position],
            _range_offsets(position, self._ranges),
            part,
        )

    def _is_ours(self, chunk: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether chunks, by their number in a window, are of our part."""
        return chunk % self._n_parts == self._part

    @cached_property
    def _buffers(self) -> list[ChunkMemory]:
        # Two, reused for ever: fresh ones would cost as much in page faults as decoding. Where other parts'
        # chunks would lie is never touched, and so takes no memory.
        spec = self._reader.spec
        shape = (self.order.window_chunks, spec.chunk_rows, *spec.shape[1:])
        return [chunk_memory(shape, self._device) for _ in range(2)]

    def _windows(self, epoch: int, window: int) -> Generator["_Window"]:
        """Every window from this one on, the next being decoded while one is used."""
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
        """Decode what of a window is not there yet, into one of the buffers or where it is kept."""
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
    homes: NDArray[np.int64]  # where each chunk lies in memory, in chunks
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
            _range_offsets(row_position, ranges),
        )
