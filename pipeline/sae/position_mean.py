"""What is taken from activations at their position before they are encoded, and added back after decoding.

Where a model knows positions by adding something to the residual stream, an autoencoder that is not told
spends features on it: 16 to 23 % of its code on a sentence encoder. The means by position come from
the store's own statistics, so nothing is learned, and they cost a row of a table to an activation.

    none        nothing is taken
    range       a mean for each position range
    exact       a mean for each position
    lowrank:16  the same, as the mean of all plus 16 directions: nearly all of it, in fewer numbers

Such a table is a buffer: saved with the weights, and not a parameter.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...store.errors import SettingsError
from ..ranges import PositionRange, range_of_position


class PositionMean(nn.Module):
    """A mean activation by position, of one of four forms.

    Attributes:
        form: ``none``, ``range``, ``exact`` or ``lowrank:R``.
    """

    table: Tensor
    """[rows, d_model], a row to a range or a position; of ``lowrank`` [1, d_model], the mean of all."""
    left: Tensor
    """[positions, rank]: how much of each direction; of other forms [positions, 0]."""
    right: Tensor
    """[rank, d_model]: directions."""
    row_of_position: Tensor
    """int64 [positions]: which of the table's."""

    def __init__(
        self, form: str, ranges: Sequence[PositionRange], d_model: int, device: torch.device
    ) -> None:
        """Make the table, filled with zeros.

        Args:
            form: see above.
            ranges: position ranges, from 0 to the context length.
            d_model: length of an activation.
            device: of the table; "meta" for one that is to be counted or replaced.

        Raises:
            SettingsError: no such form, or a rank that is no number from 1 to what there is.
        """
        super().__init__()
        self.form = form
        length = ranges[-1].stop
        name, _, rank_text = form.partition(":")
        rank = int(rank_text) if rank_text.isdecimal() else 0
        if form not in ("none", "range", "exact") and not (
            name == "lowrank" and 1 <= rank <= min(length, d_model)
        ):
            raise SettingsError(
                f"position_mean is {form}; it must be none, range, exact, or lowrank:R with R from 1 to "
                f"{min(length, d_model)}"
            )
        n_rows = {"none": 0, "range": len(ranges), "exact": length}.get(form, 1)
        index = {"range": range_of_position(tuple(ranges)), "exact": np.arange(length)}
        self._rows_of_table = index.get(form, np.zeros(length, np.int64)).astype(np.int64)
        # Beside the table, so that a GPU is sent it once; never on "meta", as it is not saved.
        row_of_position = torch.as_tensor(
            self._rows_of_table, device=None if device.type == "meta" else device
        )
        self.register_buffer("row_of_position", row_of_position, persistent=False)
        shapes = {
            "table": (n_rows, d_model),
            "left": (length if rank else 0, rank),
            "right": (rank, d_model if rank else 0),
        }
        for name, shape in shapes.items():
            # What is empty is not saved, as other programs need not know of it, and so never on "meta".
            is_kept = math.prod(shape) > 0
            kept = torch.zeros(shape, device=device if is_kept else None)
            self.register_buffer(name, kept, persistent=is_kept)

    @property
    def is_none(self) -> bool:
        """Whether nothing is taken."""
        return self.form == "none"

    def n_numbers(self) -> int:
        """How many numbers are kept."""
        return self.table.numel() + self.left.numel() + self.right.numel()

    @torch.no_grad()
    def fit(self, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Fill the table from what a store summed up.

        A position without rows is given the mean of all. Low rank is the best one in squared error over
        the rows summed up: a singular value decomposition with positions weighted by their rows.

        Args:
            sums: of activations by position; [positions, d_model].
            counts: how many each is over; [positions].
        """
        if self.is_none:
            return
        n_rows = max(1, int(counts.sum()))
        mean = sums.sum(axis=0) / n_rows
        if self.left.numel():
            centred = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None] - mean, 0)
            weights = np.sqrt(np.maximum(counts, 1) / n_rows)[:, None]
            u, s, vt = np.linalg.svd(centred * weights, full_matrices=False)
            rank = self.right.shape[0]
            self.left.copy_(torch.as_tensor(u[:, :rank] * s[:rank] / weights))
            self.right.copy_(torch.as_tensor(vt[:rank]))
            self.table.copy_(torch.as_tensor(mean[None]))
            return
        merged = np.zeros(tuple(self.table.shape))
        total = np.zeros(len(merged))
        np.add.at(merged, self._rows_of_table, sums)
        np.add.at(total, self._rows_of_table, counts)
        means = np.where(total[:, None] > 0, merged / np.maximum(total, 1)[:, None], mean)
        self.table.copy_(torch.as_tensor(means))

    def rows(self, positions: Tensor) -> Tensor:
        """The mean of each position; float32 [rows, d_model].

        Args:
            positions: integers [rows], each below the context length.
        """
        if self.left.numel():
            # Not in bfloat16, in which large means would be off by more than what is left of activations.
            with torch.autocast(positions.device.type, enabled=False):
                return torch.addmm(self.table, self.left[positions], self.right)
        return self.table[self.row_of_position[positions]]
