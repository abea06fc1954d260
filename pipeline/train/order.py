"""The order in which training reads tokens: a permutation that needs no memory and resumes at any step.

It follows from (data seed, window, batch size, training contexts, left-out ids) alone, so a run resumes at
any step by decoding one window, and runs that agree in these can share one pass over the store.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of tokens: which rows are in which batch. Arithmetic on counts, which are read as needed.

    Attributes:
        n_contexts: contexts to read, from the first.
        context_length: positions of a context.
        chunk_contexts: contexts per chunk of the store.
        window_contexts: contexts per window.
        batch_size: tokens wanted in a batch.
        seed: data seed.
        wanted_of: counts the wanted tokens of chunks: int64 [chunks] to int64 [chunks].
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
        """Chunks to read."""
        return -(-self.n_contexts // self.chunk_contexts)

    @property
    def window_chunks(self) -> int:
        """Chunks per full window."""
        return min(max(1, self.window_contexts // self.chunk_contexts), self.n_chunks)

    @property
    def n_windows(self) -> int:
        """Windows per epoch."""
        return -(-self.n_chunks // self.window_chunks)

    def chunks_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """All chunks in the order of an epoch, which is cut into windows."""
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.n_chunks)

    def windows_of_epoch(self, epoch: int, first: int = 0) -> Iterator[NDArray[np.int64]]:
        """The chunks of each window from ``first`` on, in the order of the disk."""
        order = self.chunks_of_epoch(epoch)
        step = self.window_chunks
        return (np.sort(order[i : i + step]) for i in range(first * step, self.n_chunks, step))

    def n_batches(self, n_rows: int) -> int:
        """Batches of a window with ``n_rows`` wanted rows: rows / batch size, rounded, at least one.

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
        """Epoch, window in the epoch and batch in the window of a step; None if no token is wanted.

        Counts the tokens of all windows before it, and of no chunk after it. Costs some 20 ns per chunk and
        epoch beside the counting.
        """
        most = self.n_batches(self.window_chunks * self.chunk_contexts * self.context_length)
        size, epoch = self.window_chunks, 0
        while True:
            chunks, window, is_empty = self.chunks_of_epoch(epoch), 0, True
            while window < self.n_windows:
                # No window has more steps than a full one, so the step is in the last of these or later.
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
