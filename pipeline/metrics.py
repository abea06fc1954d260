"""How good an autoencoder is, added up batch by batch: sparsity, and what it fails to reconstruct.

Every score is one sum divided by another, both over all rows seen, never a mean over batches: how
the rows were cut into batches changes nothing but the rounding of float64. Keepers of different rows
can be added, and those of neighbouring ranges merged.

Cost: a batch is read once, some rows after the others, with a few float64 copies of those activations;
what is kept is [n_ranges, d_model] and [dictionary_size]. The sums stay on the device of the first batch,
so nothing waits for a GPU before ``scores``. Of a code that is a list only the list is read.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .device import blocks_of_rows
from .sae.sparse import SparseCode

ABOVE = 1e-3
"""From what size on ``l0_above`` counts: a dense code holds many numbers that are nearly 0."""


def null_if_not_finite(value: Any) -> Any:
    """The same value with None for NaN and infinity, also inside mappings and lists: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: null_if_not_finite(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [null_if_not_finite(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Scores(NamedTuple):
    """NaN where these rows determine no value: for a range without rows, or rows without variance."""

    l0: float
    """Numbers of a code that are not 0, mean over rows."""
    l0_above: float
    """Numbers of a code larger than ``ABOVE`` in size, mean over rows."""
    l0_by_range: tuple[float, ...]
    fvu: float
    """Fraction of variance unexplained: Σ‖x - x̂‖² / Σ‖x - mean‖², the mean over all rows."""
    fvu_by_range: tuple[float, ...]
    """Both sums over the rows of one range, but around the same mean over all rows."""
    fvu_base: float | None
    """``fvu`` of the base code's reconstruction; None where none was given."""
    dead_fraction: float
    """Features that were 0 on every row, as a fraction of the dictionary."""
    n_rows: int


@dataclass
class _Sums:
    """What is added up, on one device; float64 and int64, [n_ranges] where not said otherwise."""

    shift: Tensor
    """[d_model]: taken from activations before they are added, see ``ScoreKeeper``."""
    shifted: Tensor
    """[n_ranges, d_model]: Σ (x - shift)."""
    squares: Tensor
    """Σ ‖x - shift‖²."""
    errors: Tensor
    """Σ ‖x - x̂‖²."""
    base_error: Tensor
    """A scalar, as is ``active_above``."""
    active: Tensor
    active_above: Tensor
    fired: Tensor
    """bool [dictionary_size]: whether a feature was ever active."""

    def merged(self, ranges: Sequence[tuple[int, int]]) -> "_Sums":
        """The same with the sums of neighbouring ranges added up."""
        by_range = ("shifted", "squares", "errors", "active")
        sums: dict[str, Tensor] = {name: getattr(self, name) for name in by_range}
        added = {
            name: torch.stack([values[start:stop].sum(0) for start, stop in ranges])
            for name, values in sums.items()
        }
        return replace(self, **added)

    def plus(self, other: "_Sums", n_rows: Tensor) -> "_Sums":
        """The sums of both; ``n_rows`` [n_ranges] are the other's."""
        # x less our shift is x less the other's, plus how far that lies from ours.
        moved, counts = other.shift - self.shift, n_rows.to(self.shift)
        squares = other.squares + 2 * other.shifted @ moved + counts * moved.square().sum()
        return _Sums(
            shift=self.shift,
            shifted=self.shifted + other.shifted + counts[:, None] * moved,
            squares=self.squares + squares,
            errors=self.errors + other.errors,
            base_error=self.base_error + other.base_error,
            active=self.active + other.active,
            active_above=self.active_above + other.active_above,
            fired=self.fired | other.fired,
        )


class ScoreKeeper:
    """Adds up what ``Scores`` are made of.

    Variance is added up around the mean of the first batch, not around 0: activations have large
    constant directions, which would leave the small difference of two huge sums.
    """

    def __init__(self, d_model: int, dictionary_size: int, n_ranges: int) -> None:
        """Begin with no rows."""
        self._d_model, self._dictionary_size = d_model, dictionary_size
        self._n_rows = [0] * n_ranges
        self._n_base_rows = 0
        self._sums: _Sums | None = None

    @torch.no_grad()
    def add(
        self,
        x: Tensor,
        reconstruction: Tensor,
        code: Tensor | SparseCode,
        range_offsets: Sequence[int] | Tensor,
        base_reconstruction: Tensor | None = None,
    ) -> None:
        """Add a batch, its rows sorted by range.

        Args:
            x: activations [rows, d_model] in raw units, any float dtype.
            reconstruction: of the same shape and units.
            code: [rows, dictionary_size], or what is not 0 in it.
            range_offsets: int64 [n_ranges + 1] on the CPU: range r has the rows from
                ``range_offsets[r]`` up to ``range_offsets[r + 1]``.
            base_reconstruction: what the base code alone decodes to; in each batch or in none.
        """
        if len(x) == 0:
            return
        if self._sums is None:
            self._sums = self._zeros_around(x.double().mean(0))
        sums = self._sums
        lengths = [int(stop) - int(start) for start, stop in pairwise(range_offsets)]
        self._n_rows = [n + more for n, more in zip(self._n_rows, lengths, strict=True)]
        range_of_row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        range_of_row = range_of_row.to(x.device, non_blocking=True)
        if base_reconstruction is not None:
            self._n_base_rows += len(x)
        for rows in blocks_of_rows(x):
            exact, ranges = x[rows].double(), range_of_row[rows]
            shifted = exact - sums.shift
            sums.shifted.index_add_(0, ranges, shifted)
            sums.squares.index_add_(0, ranges, shifted.square().sum(1))
            sums.errors.index_add_(0, ranges, (exact - reconstruction[rows]).square().sum(1))
            if base_reconstruction is not None:
                sums.base_error += (exact - base_reconstruction[rows]).square().sum()
        if isinstance(code, SparseCode):
            sums.active.index_add_(0, range_of_row, code.n_active())
            sums.active_above += code.n_active(ABOVE).sum()
            sums.fired |= code.fired()
            return
        for rows in blocks_of_rows(code):
            active = code[rows] != 0
            sums.active.index_add_(0, range_of_row[rows], active.sum(1))
            sums.active_above += (code[rows].abs() > ABOVE).sum()
            sums.fired |= active.any(0)

    def _zeros_around(self, shift: Tensor) -> _Sums:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=shift.device)

        n_ranges = len(self._n_rows)
        return _Sums(
            shift=shift,
            shifted=zeros(n_ranges, self._d_model),
            squares=zeros(n_ranges),
            errors=zeros(n_ranges),
            base_error=zeros(),
            active=zeros(n_ranges, dtype=torch.int64),
            active_above=zeros(dtype=torch.int64),
            fired=zeros(self._dictionary_size, dtype=torch.bool),
        )

    def on_cpu(self) -> "ScoreKeeper":
        """A keeper of the same rows that another process can be sent."""
        found = ScoreKeeper(self._d_model, self._dictionary_size, len(self._n_rows))
        found._n_rows, found._n_base_rows = list(self._n_rows), self._n_base_rows
        if self._sums is not None:
            found._sums = _Sums(**{name: value.cpu() for name, value in vars(self._sums).items()})
        return found

    def merged(self, ranges: Sequence[tuple[int, int]]) -> "ScoreKeeper":
        """A keeper of the same rows, each of whose ranges is several neighbours of this one's.

        Args:
            ranges: of each new range the first of those that it is made of, and one past the last.
        """
        found = ScoreKeeper(self._d_model, self._dictionary_size, len(ranges))
        found._n_rows = [sum(self._n_rows[start:stop]) for start, stop in ranges]
        found._n_base_rows = self._n_base_rows
        found._sums = None if self._sums is None else deepcopy(self._sums).merged(ranges)
        return found

    def __add__(self, other: "ScoreKeeper") -> "ScoreKeeper":
        """A keeper of the rows of both, which have the same ranges."""
        found = ScoreKeeper(self._d_model, self._dictionary_size, len(self._n_rows))
        found._n_rows = [mine + theirs for mine, theirs in zip(self._n_rows, other._n_rows, strict=True)]
        found._n_base_rows = self._n_base_rows + other._n_base_rows
        found._sums = deepcopy(self._sums or other._sums)
        if self._sums is not None and other._sums is not None:
            found._sums = self._sums.plus(other._sums, torch.tensor(other._n_rows))
        return found

    def scores(self) -> Scores:
        """The scores of all rows added so far.

        Raises:
            ValueError: no row was added, or only some batches had a base reconstruction.
        """
        n_rows = sum(self._n_rows)
        if self._sums is None:
            raise ValueError("no row was added, so there is nothing to score")
        if self._n_base_rows not in (0, n_rows):
            raise ValueError("give a base reconstruction with every batch or with none")
        sums = self._sums
        # Σ‖x - mean‖² = Σ‖y‖² - 2 m·Σy + n‖m‖², where y = x - shift and m is the mean of y.
        mean = sums.shifted.sum(0) / n_rows
        counts = torch.tensor(self._n_rows, dtype=torch.float64, device=mean.device)
        variation = sums.squares - 2 * sums.shifted @ mean + counts * mean.square().sum()
        base_error = float(sums.base_error)
        return Scores(
            l0=float(sums.active.sum()) / n_rows,
            l0_above=float(sums.active_above) / n_rows,
            l0_by_range=_ratios(sums.active, counts),
            fvu=_ratio(float(sums.errors.sum()), float(variation.sum())),
            fvu_by_range=_ratios(sums.errors, variation),
            fvu_base=_ratio(base_error, float(variation.sum())) if self._n_base_rows else None,
            dead_fraction=float((~sums.fired).sum()) / self._dictionary_size,
            n_rows=n_rows,
        )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def _ratios(numerators: Tensor, denominators: Tensor) -> tuple[float, ...]:
    pairs = zip(numerators.cpu(), denominators.cpu(), strict=True)
    return tuple(_ratio(float(numerator), float(denominator)) for numerator, denominator in pairs)
