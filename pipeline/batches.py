"""Shuffled batches from a store: every wanted token once an epoch, its position beside it.

A window of contexts (2,048 by default) is decoded into a buffer while the one before is being
used; its tokens are permuted and cut into batches of nearly equal size, nothing is carried over.
The order follows from (data seed, window, batch size, training contexts, left-out ids) alone, so a
run resumes at any step by decoding one window. Costs: two windows of memory, and per batch one
gather on top of decoding; where all training contexts fit into one window they are decoded once. On a
GPU batches are gathered into pinned memory and cross on a stream of their own, beside the training.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..store.manifest import layer_path
from ..store.ranges import PositionRange, range_of_position
from ..store.reader import ActivationStore
from ..store.shards import stop

_SCAN_CONTEXTS = 4096


class Batch(NamedTuple):
    """Tokens of one step, sorted by position range; its memory is used again by the batch after the next."""

    step: int
    activations: NDArray[np.uint16]
    """bfloat16 bits [rows, d_model]."""

    on_device: torch.Tensor
    """The same as bfloat16 on the device that was asked for: on a CPU a view, on a GPU a copy under way."""

    positions: NDArray[np.int64]
    """Position of each row in its context; [rows]."""

    contexts: NDArray[np.int64]
    """Context that each row came from; [rows]."""

    tokens: NDArray[np.int32]
    """Token id of each row; [rows]."""

    range_offsets: NDArray[np.int64]
    """Rows of range r lie between offsets r and r + 1; [ranges + 1]."""


def as_torch(bits: NDArray[np.uint16]) -> torch.Tensor:
    """The bits of bfloat16 viewed as a bfloat16 tensor, without a copy."""
    return torch.as_tensor(bits).view(torch.bfloat16)


class _HostBuffer:
    """Memory for the rows of a batch, pinned if a GPU is to copy from it."""

    def __init__(self, device: torch.device, copying: torch.cuda.Stream | None, d_model: int) -> None:
        self._device = device
        self._copying = copying
        self._rows = torch.empty((0, d_model), dtype=torch.bfloat16)
        self._copied = torch.cuda.Event() if copying else None

    def bits(self, n_rows: int) -> NDArray[np.uint16]:
        """Room for ``n_rows``, as soon as the GPU has taken what was there; uint16 [rows, d_model]."""
        if self._copied:
            self._copied.synchronize()
        if n_rows > len(self._rows):
            shape = (n_rows, self._rows.shape[1])
            self._rows = torch.empty(shape, dtype=torch.bfloat16, pin_memory=self._copying is not None)
        bits: NDArray[np.int16] = self._rows[:n_rows].view(torch.int16).numpy()
        return bits.view(np.uint16)

    def on_device(self, n_rows: int) -> torch.Tensor:
        """The rows, ready for whatever the current stream does next; bfloat16 [rows, d_model]."""
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


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of tokens: which rows stand in which batch. Pure arithmetic on counts.

    Attributes:
        n_contexts: contexts that are read, from the first.
        context_length: positions of a context.
        chunk_contexts: contexts to a chunk of the store.
        window_contexts: contexts to a window.
        batch_size: tokens wanted in a batch.
        seed: data seed.
        wanted_by_chunk: tokens wanted in each chunk; int64 [chunks].
    """

    n_contexts: int
    context_length: int
    chunk_contexts: int
    window_contexts: int
    batch_size: int
    seed: int
    wanted_by_chunk: NDArray[np.int64]

    @property
    def n_chunks(self) -> int:
        """Chunks that are read."""
        return len(self.wanted_by_chunk)

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

    def windows_of_epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """The chunks of each window, each sorted as they lie on disk."""
        order = self.chunks_of_epoch(epoch)
        step = self.window_chunks
        return [np.sort(order[i : i + step]) for i in range(0, self.n_chunks, step)]

    def n_batches(self, n_rows: int) -> int:
        """Batches of a window with ``n_rows`` wanted rows: R / batch size, rounded, at least one.

        >>> order = Order(n_contexts=8, context_length=4, chunk_contexts=8, window_contexts=8,
        ...               batch_size=2048, seed=0, wanted_by_chunk=np.array([24]))
        >>> order.n_batches(0), order.n_batches(900), order.n_batches(5200)
        (0, 1, 3)
        """
        return max(1, round(n_rows / self.batch_size)) if n_rows else 0

    def steps_of_window(self, chunks: NDArray[np.int64]) -> int:
        """Batches of the window made of ``chunks``."""
        return self.n_batches(int(self.wanted_by_chunk[chunks].sum()))

    def find(self, step: int) -> tuple[int, int, int]:
        """Epoch, window of the epoch and batch of the window of a step."""
        epoch = 0
        while True:
            for window, chunks in enumerate(self.windows_of_epoch(epoch)):
                n_steps = self.steps_of_window(chunks)
                if step < n_steps:
                    return epoch, window, step
                step -= n_steps
            epoch += 1

    def permuted(self, epoch: int, window: int, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """A window's wanted rows, shuffled and cut into batches whose sizes differ by at most one."""
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
    ) -> None:
        """Plan the order; nothing is decoded but token ids.

        Args:
            store: an opened store.
            layer: one of its layers.
            ranges: position ranges that a batch's rows are sorted by.
            batch_size: tokens to a batch, about.
            window_contexts: contexts decoded at once.
            seed: data seed.
            leave_out: token ids whose rows are never given.
            n_contexts: contexts to read, from the first; by default the training part.
            threads: threads that decode; by default 2, for a store on a server as many as hide its latency.
            device: where ``on_device`` is to be; by default the CPU.

        Raises:
            StoreDamagedError: the tokens are not what was written.
        """
        self.store = store
        self.n_contexts = store.training_contexts(layer) if n_contexts is None else n_contexts
        self._reader = store.array(layer_path(layer))
        self._leave_out = np.array(sorted(leave_out), np.int64)
        self._range_of = range_of_position(tuple(ranges)).astype(np.int64)
        self._device = device or torch.device("cpu")
        self._n_ranges = len(ranges)
        threads = threads or (store.reading_threads if store.is_remote else 2)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="posae-decode")
        self.order = Order(
            n_contexts=self.n_contexts,
            context_length=store.context_length,
            chunk_contexts=store.manifest.chunk_contexts,
            window_contexts=window_contexts,
            batch_size=batch_size,
            seed=seed,
            wanted_by_chunk=self._count_wanted(),
        )

    def _count_wanted(self) -> NDArray[np.int64]:
        step = self.store.manifest.chunk_contexts
        counts: list[NDArray[np.int64]] = []
        for start in range(0, self.n_contexts, _SCAN_CONTEXTS):
            tokens = self.store.tokens(slice(start, min(start + _SCAN_CONTEXTS, self.n_contexts)))
            by_context = (~np.isin(tokens, self._leave_out)).sum(axis=1)
            counts.append(np.add.reduceat(by_context, np.arange(0, len(tokens), step)))
        return np.concatenate(counts)

    def steps(self, start: int, stop: int) -> Generator[Batch]:
        """The batches of steps ``start`` to ``stop``; the same whatever came before.

        One at a time: all share the buffers. Once it is ended or closed, nothing reads the store any more.

        Raises:
            StoreDamagedError: a chunk is missing or not what was written.
        """
        if not int(self.order.wanted_by_chunk.sum()) or start >= stop:
            return
        epoch, first_window, skip = self.order.find(start)
        copying = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        buffers = [_HostBuffer(self._device, copying, self.store.d_model) for _ in range(2)]
        step = start
        with closing(self._windows(epoch, first_window)) as windows:
            for window in windows:
                for rows in window.batches[skip:]:
                    yield self._batch(step, window, rows, buffers[step % 2])
                    step += 1
                    if step >= stop:
                        return
                skip = 0

    def _batch(self, step: int, window: "_Window", rows: NDArray[np.int64], buffer: _HostBuffer) -> Batch:
        length = self.store.context_length
        range_ids = self._range_of[rows % length]
        n_rows = len(window.activations)
        # By range, and within one as the rows lie in memory; one sort of one number each.
        rows = np.sort(range_ids * n_rows + rows) % n_rows
        bits = buffer.bits(len(rows))
        np.take(window.activations, rows, axis=0, out=bits, mode="clip")
        place, position = np.divmod(rows, length)
        step_contexts = self.store.manifest.chunk_contexts
        chunk, within = np.divmod(place, step_contexts)
        counts = np.bincount(range_ids, minlength=self._n_ranges)
        return Batch(
            step,
            bits,
            buffer.on_device(len(rows)),
            position,
            window.chunks[chunk] * step_contexts + within,
            window.tokens.reshape(-1)[rows],
            np.concatenate([[0], np.cumsum(counts)]),
        )

    @cached_property
    def _buffers(self) -> list[NDArray[np.uint16]]:
        # Two, reused for ever: fresh ones would cost as much in page faults as decoding.
        shape = (self.order.window_chunks * self._reader.spec.chunk_rows, *self._reader.spec.shape[1:])
        return [np.empty(shape, np.uint16) for _ in range(min(2, self.order.n_windows))]

    def _windows(self, epoch: int, window: int) -> Generator["_Window"]:
        """Every window from this one on, the next being decoded while one is used."""
        if self.order.n_windows == 1:
            chunks = self.order.windows_of_epoch(epoch)[0]
            decoded = self._decode(chunks, self._buffers[0])
            try:
                while True:
                    yield self._ready(epoch, 0, chunks, self._buffers[0], decoded)
                    epoch += 1
            finally:
                stop(decoded)
        turn = 0
        upcoming = self._schedule(epoch, window)
        chunks = next(upcoming)
        current = (*chunks, self._buffers[turn], self._decode(chunks[2], self._buffers[turn]))
        try:
            while True:
                ready = self._ready(*current)
                turn ^= 1
                following = next(upcoming)
                # The other buffer is free: its window's batches have all been taken.
                current = (*following, self._buffers[turn], self._decode(following[2], self._buffers[turn]))
                yield ready
        finally:
            stop(current[4])

    def _schedule(self, epoch: int, window: int) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        while True:
            for number, chunks in enumerate(self.order.windows_of_epoch(epoch)):
                if number >= window:
                    yield epoch, number, chunks
            epoch, window = epoch + 1, 0

    def _decode(self, chunks: NDArray[np.int64], buffer: NDArray[np.uint16]) -> list[Future[None]]:
        self._reader.will_need(int(chunk) for chunk in chunks)
        size = self._reader.spec.chunk_rows
        return [
            self._pool.submit(self._reader.read_chunk, int(chunk), buffer[i * size : (i + 1) * size])
            for i, chunk in enumerate(chunks)
        ]

    def _ready(
        self,
        epoch: int,
        window: int,
        chunks: NDArray[np.int64],
        buffer: NDArray[np.uint16],
        decoded: list[Future[None]],
    ) -> "_Window":
        size = self._reader.spec.chunk_rows
        contexts = (chunks[:, np.newaxis] * size + np.arange(size)).reshape(-1)
        there = contexts < self.n_contexts
        tokens = np.zeros((len(contexts), self.store.context_length), np.int32)
        tokens[there] = self.store.tokens(contexts[there])
        wanted = ~np.isin(tokens, self._leave_out) & there[:, np.newaxis]
        for future in decoded:
            future.result()
        return _Window(
            chunks,
            buffer.reshape(-1, buffer.shape[-1]),
            tokens,
            self.order.permuted(epoch, window, np.flatnonzero(wanted)),
        )


class _Window(NamedTuple):
    chunks: NDArray[np.int64]
    activations: NDArray[Any]  # bits [contexts · positions, d_model]
    tokens: NDArray[np.int32]  # [contexts, positions]
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
    """The contexts ``start`` to ``stop`` in order, ``batch_contexts`` at a time, rows sorted by range."""
    range_of = range_of_position(tuple(ranges))
    positions = np.arange(store.context_length)
    for number, first in enumerate(range(start, stop, batch_contexts)):
        contexts = np.arange(first, min(first + batch_contexts, stop))
        tokens = store.tokens(contexts)
        row_context, row_position = np.nonzero(~np.isin(tokens, np.array(leave_out)))
        order = np.argsort(range_of[row_position], kind="stable")
        row_context, row_position = row_context[order], row_position[order]
        counts = np.bincount(range_of[row_position], minlength=len(ranges))
        bits = store.read(layer, contexts)[row_context, row_position]
        yield Batch(
            number,
            bits,
            as_torch(bits).to(device),
            positions[row_position],
            contexts[row_context],
            tokens[row_context, row_position],
            np.concatenate([[0], np.cumsum(counts)]),
        )
