"""Checkpoints written in the background: a step waits for a copy of the state, not for the disk.

One is written at a time; saving another, or the end of training, waits for it. Takes memory for a copy of the
weights and the optimizer's moments until it is on disk.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from torch import Tensor

from ..runs import Run


class CheckpointWriter:
    """Writes checkpoints in a thread; a context manager that ends when all are on disk."""

    def __init__(self) -> None:
        """Nothing is written yet."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="posae-checkpoint")
        self._writing: Future[None] | None = None

    def save(self, run: Run, step: int, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Start writing a checkpoint, after waiting for the previous one.

        Args:
            run: the run.
            step: steps done.
            tensors: returns a copy of the state.

        Raises:
            StoreWriteError: the disk refused the last one.
        """
        self.wait()
        self._writing = self._thread.submit(run.save_checkpoint, step, tensors())

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            StoreWriteError: the disk refused.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Wait for the pending checkpoint, also after an error, which then takes precedence over its own."""
        with self._thread:
            try:
                self.wait()
            except Exception:
                if error is None:
                    raise
