"""What of a batch an autoencoder is given: here all of it.

Where several processes train one autoencoder, each has some rows of every batch. Nearly all that is computed
is of single rows. What is of the whole batch, a number to be kept, a mean, a draw, is asked of a share; the
trainer's asks the other processes.
"""

from collections.abc import Callable

from torch import Tensor


class Share:
    """All rows of a batch."""

    def n_rows(self, n_here: int) -> int:
        """Rows of the whole batch, ``n_here`` of which are here."""
        return n_here

    def mean(self, of_rows: Tensor) -> Tensor:
        """Of means over the rows that are here the mean over all rows; gradients are of what is here."""
        return of_rows

    def all_values(self, values: Tensor) -> Tensor:
        """These values, [n], and those of the other rows; no gradient."""
        return values

    def largest(self, values: Tensor, n: int) -> Tensor:
        """The ``n`` largest of the whole batch, in no order; no gradient, and a GPU is not waited for.

        Args:
            values: the ``n`` largest that are here, or all where there are fewer; at least 0.
            n: no more than the whole batch has.
        """
        return values

    def drawn(self, n_here: int, draw: Callable[[int], Tensor]) -> Tensor:
        """What ``draw`` gives for so many rows as the whole batch has, of the rows that are here."""
        return draw(n_here)
