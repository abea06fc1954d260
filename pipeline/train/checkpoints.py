"""Checkpoints written beside the training: a step waits for a copy of the state in memory, not for the disk.

One is written at a time; who saves another, or ends, waits for it. Costs a copy of the weights and of the
optimizer's moments in memory until it is on the disk.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from torch import Tensor

from ..runs import Run


class CheckpointWriter:
    """Writes checkpoints in a thread of its own; a context, at whose end all are on the disk."""

    def __init__(self) -> None:
        """Nothing is written yet."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="posae-checkpoint")
        self._writing: Future[None] | None = None

    def save(self, run: Run, step: int, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Begin to write a checkpoint, once the last one is written.

        Args:
            run: whose it is.
            step: steps done.
            tensors: copies the state.

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
        """Nothing more."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Wait for what is being written, also where something failed: that error is the one to tell."""
        with self._thread:
            try:
                self.wait()
            except Exception:
                if error is None:
                    raise
