"""The scores of one pass over the rows of held-out contexts; a row is one token.

Special tokens are scored separately, as training leaves them out; so are outliers by norm.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....store.errors import StoreIncompleteError
from ...metrics import ABOVE, ScoreKeeper
from ...ranges import PositionRange, equal_ranges
from ...sae.sparse import SparseCode
from ...train.batch import Batch
from ...train.batches import ordered_batches
from ..held_out import HeldOut
from .base_phase import retained
from .clusters import clusters
from .features import FeatureKeeper
from .specificity import specificity

OUTLIER_NORM = 10
"""A norm above this multiple of the median is an outlier, as in ``posae inspect-store``."""

_CODE_NUMBERS = 2**23
"""Numbers of a code to hold at once, about: 32 MB; on a GPU more, if it has the memory."""


def row_batches(held_out: HeldOut) -> Iterator[Batch]:
    """All tokens of the held-out contexts, special ones too, each batch sorted by position."""
    return ordered_batches(
        held_out.store,
        held_out.layer,
        [PositionRange(position, position + 1) for position in range(held_out.store.context_length)],
        start=held_out.start,
        stop=held_out.stop,
        batch_contexts=held_out.batch_contexts(_CODE_NUMBERS),
        device=held_out.device,
    )


class RowScores:
    """Adds up all scores that need no language model, batch by batch."""

    def __init__(self, held_out: HeldOut) -> None:
        """Begin with no rows."""
        store, autoencoder = held_out.store, held_out.autoencoder
        self._held_out = held_out
        self._length = store.context_length
        # Ordinary tokens, ordinary tokens that are outliers by norm, and special tokens.
        self._ordinary, self._outliers, self._special = (
            ScoreKeeper(store.d_model, autoencoder.dictionary_size, self._length) for _ in range(3)
        )
        self._features = FeatureKeeper(
            autoencoder.dictionary_size,
            self._length,
            (held_out.start, held_out.stop),
            above=ABOVE,
            device=held_out.device,
        )
        self._threshold = OUTLIER_NORM * store.norms(held_out.layer).median
        self._token_counts = np.zeros(store.manifest.vocabulary_size, np.int64)
        self._n_rows = self._n_outliers = self._n_retained = 0
        self._retained = 0.0

    def add(self, batch: Batch) -> None:
        """Score the rows of a batch of ``row_batches``."""
        is_special = self._held_out.is_special(batch.tokens)
        if not is_special.all():
            self._add_ordinary(batch, np.flatnonzero(~is_special))
        if is_special.any():
            _Coded(self._held_out, batch, np.flatnonzero(is_special)).add_to(self._special)

    def _add_ordinary(self, batch: Batch, rows: NDArray[np.int64]) -> None:
        coded = _Coded(self._held_out, batch, rows)
        is_outlier: NDArray[np.bool_] = (coded.x.square().sum(1).sqrt() > self._threshold).cpu().numpy()
        if is_outlier.any():
            coded.add_to(self._outliers, np.flatnonzero(is_outlier))
            coded.add_to(self._ordinary, np.flatnonzero(~is_outlier))
        else:
            coded.add_to(self._ordinary)
        self._n_rows += len(rows)
        self._n_outliers += int(is_outlier.sum())
        if coded.output.base_code is not None:
            share, n = retained(coded.output.base_code, coded.output.code)
            self._retained += share
            self._n_retained += n
        tokens = batch.tokens[rows]
        self._features.add(coded.output.codes.code, coded.positions, batch.contexts[rows], tokens)
        self._token_counts += np.bincount(tokens, minlength=len(self._token_counts))

    def scores(self) -> dict[str, Any]:
        """Every score by its key in ``evaluation.json``.

        Raises:
            StoreIncompleteError: all tokens were special.
        """
        if not self._n_rows:
            raise StoreIncompleteError(
                f"{self._held_out.store.root} holds only special tokens out of training, so nothing can be "
                "scored; harvest more contexts"
            )
        ordinary = self._ordinary + self._outliers
        by_position = ordinary.scores()
        scores = ordinary.merged(self._held_out.ranges).scores()
        sums = self._features.sums()
        groups = clusters(sums.firings, sums.n_rows)
        has_inliers = self._n_outliers < self._n_rows
        return {
            **scores._asdict(),
            "l0_by_position": by_position.l0_by_range,
            "fvu_by_position": by_position.fvu_by_range,
            "fvu_with_special": (ordinary + self._special).scores().fvu,
            "fvu_without_outliers": self._ordinary.scores().fvu if has_inliers else None,
            "norm_outliers": {"threshold": self._threshold, "n_rows": self._n_outliers},
            "density_histogram": sums.density().model_dump(),
            "retention": self._retained / self._n_retained if self._n_retained else None,
            "position_features": sums.position_features().model_dump(),
            "specificity": specificity(sums, self._specificity_ranges(), self._token_counts).model_dump(),
            "clusters": None if groups is None else groups.model_dump(),
        }

    def _specificity_ranges(self) -> tuple[PositionRange, ...]:
        ranges = self._held_out.ranges
        return ranges if len(ranges) > 1 else equal_ranges(self._length, min(4, self._length))


class _Coded:
    """Some rows of a batch, through the autoencoder."""

    def __init__(self, held_out: HeldOut, batch: Batch, rows: NDArray[np.int64]) -> None:
        self.positions = batch.positions[rows]
        self.x = batch.on_device[torch.as_tensor(rows).to(batch.on_device.device)].float()
        self._length = held_out.store.context_length
        at = torch.as_tensor(self.positions).to(self.x.device)
        offsets = _offsets(self.positions, [r.start for r in held_out.ranges] + [self._length])
        self.output = held_out.autoencoder(self.x, offsets, at)
        base_code = self.output.base_code
        self._base = None if base_code is None else held_out.autoencoder.decode(base_code, at)

    def add_to(self, keeper: ScoreKeeper, some: NDArray[np.int64] | None = None) -> None:
        """Add all rows, or those at indices ``some``."""
        x, reconstruction, code, base = self.x, self.output.reconstruction, self.output.codes.code, self._base
        positions = self.positions
        if some is not None:
            index = torch.as_tensor(some).to(x.device)
            positions = positions[some]
            x, reconstruction, code = x[index], reconstruction[index], _rows_of(code, index)
            base = None if base is None else base[index]
        keeper.add(x, reconstruction, code, _offsets(positions, range(self._length + 1)), base)


def _rows_of(code: Tensor | SparseCode, rows: Tensor) -> Tensor | SparseCode:
    return code.of_rows(rows) if isinstance(code, SparseCode) else code[rows]


def _offsets(positions: NDArray[np.int64], edges: Iterable[int]) -> Tensor:
    """Where each range begins in sorted positions, and where the last one ends; int64 [edges]."""
    return torch.as_tensor(np.searchsorted(positions, np.fromiter(edges, np.int64)))
