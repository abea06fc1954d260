"""What of a batch an autoencoder is given: all of it, or some of its rows.

Where several processes train one autoencoder, each has some rows of every batch. Nearly all that is computed
is of single rows. What is of the whole batch, a number to be kept, a mean, a draw, is asked of a share; the
trainer has one that asks the other processes.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Share(Protocol):
    """Rows of a batch, of which others may be elsewhere."""

    def n_rows(self, n_here: int) -> int:
        """Rows of the whole batch, ``n_here`` of which are here."""
        ...

    def mean(self, of_rows: Tensor) -> Tensor:
        """Of means over the rows that are here the mean over all rows; gradients are of what is here."""
        ...

    def all_values(self, values: Tensor) -> Tensor:
        """These values, float32 [n], and those of the other rows; no gradient."""
        ...

    def drawn(self, n_here: int, draw: Callable[[int], Tensor]) -> Tensor:
        """What ``draw`` gives for so many rows as the whole batch has, of the rows that are here."""
        ...


class AllRows:
    """The whole batch; a ``Share``."""

    def n_rows(self, n_here: int) -> int:
        """These."""
        return n_here

    def mean(self, of_rows: Tensor) -> Tensor:
        """The same."""
        return of_rows

    def all_values(self, values: Tensor) -> Tensor:
        """The same."""
        return values

    def drawn(self, n_here: int, draw: Callable[[int], Tensor]) -> Tensor:
        """What ``draw`` gives."""
        return draw(n_here)
