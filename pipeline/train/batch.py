"""A batch: the tokens of one training step, with the position, context and token id of each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..ranges import PositionRange


class Part(NamedTuple):
    """The rows of a batch that this process has, if several processes share the batch."""

    places: NDArray[np.int64]
    """Index of each row in the whole batch, ascending; [rows]."""

    positions: NDArray[np.int64]
    """Positions of all rows of the whole batch; [all rows]."""


class Batch(NamedTuple):
    """Tokens of one step, sorted by position; the batch after the next reuses its memory."""

    step: int
    on_device: torch.Tensor
    """Activations, bfloat16 [rows, d_model], on the device asked for."""

    positions: NDArray[np.int64]
    """Position of each row in its context; [rows]."""

    contexts: NDArray[np.int64]
    """Context that each row came from; [rows]."""

    tokens: NDArray[np.int32]
    """Token id of each row; [rows]."""

    range_offsets: NDArray[np.int64]
    """Rows of range r lie between offsets r and r + 1; [ranges + 1]."""

    part: Part | None = None
    """Which rows these are, unless they are the whole batch."""

    @property
    def activations(self) -> NDArray[np.uint16]:
        """The bits of ``on_device`` [rows, d_model]: the same memory on a CPU, a copy from a GPU."""
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
            The new order of this process's rows, int64 [rows]; and the batch with the new positions, whose
            activations, contexts and tokens are still in the old order.
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
        """As ``range_offsets``, for other ranges; int64 [ranges + 1]."""
        return range_offsets(self.positions, ranges)


def range_offsets(positions: NDArray[np.int64], ranges: Sequence[PositionRange]) -> NDArray[np.int64]:
    """Where the rows of each range begin in sorted positions, and where the last end; int64 [ranges + 1]."""
    edges = [0, *(stop for _, stop in ranges)]
    return np.searchsorted(positions, edges).astype(np.int64)


def as_torch(bits: NDArray[np.uint16]) -> torch.Tensor:
    """View the bits of bfloat16 as a bfloat16 tensor, without a copy."""
    return torch.as_tensor(bits).view(torch.bfloat16)
