"""What each feature did, added up batch by batch: where it fired, how strongly, and on which tokens.

All that is said of single features (how often they fire, whether position explains them, what they
specialise in, which tokens they stand for) is made of these sums, so a store is read once.

Firing is counted a second time in contexts that are turned: all tokens of one context are moved by the
same random number of positions, the last ones coming first again. That keeps everything but where in
its context a feature fires, bursts too, and so shows what would be found where position means nothing.

Cost: 16 bytes to each feature and position, and 768 to each feature. Of a code that is a list (sparse.py)
only what is active is added. Adding a dense one costs about half as much as encoding it, a block of rows at a
time: on a CPU what is made of a block stays in the cache, on a GPU blocks are large.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...device import blocks_of_rows
from ...sae.sparse import SparseCode
from .evaluation import DensityHistogram, PositionFeatures
from .information import position_r2

POSITION_R2 = 0.1
"""What position must explain of a feature's activation for it to count as a position feature."""
DENSITY_EDGES = [step / 4 for step in range(-28, 1)]
"""Of the density histogram: log10 of the share of rows that a feature fires on."""
N_TOP = 64
"""How many of a feature's largest activations are kept, with their tokens."""


class FeatureSums(NamedTuple):
    """Of all rows; a row is one token."""

    n_rows: NDArray[np.int64]
    """[positions]."""
    firings: NDArray[np.int64]
    """How often each feature fired at each position; [positions, features]."""
    sums: NDArray[np.float64]
    """Of activations; [positions, features]."""
    squares: NDArray[np.float64]
    """Of activations, over all positions; [features]."""
    turned_rows: NDArray[np.int64]
    """[positions], with contexts turned; as is the next."""
    turned_firings: NDArray[np.int64]
    """[positions, features]."""
    top_tokens: NDArray[np.int64]
    """Of the largest activations, the largest first, -1 where there are fewer; [features, N_TOP]."""

    @property
    def n_firings(self) -> NDArray[np.int64]:
        """How often each feature fired; [features]."""
        return self.firings.sum(axis=0)

    def density(self) -> DensityHistogram:
        """How often features fire."""
        fired = self.n_firings[self.n_firings > 0]
        logs = np.log10(fired / max(1, self.n_rows.sum()))
        counts = np.histogram(np.clip(logs, DENSITY_EDGES[0], 0), DENSITY_EDGES)[0]
        never = len(self.n_firings) - len(fired)
        return DensityHistogram(edges=DENSITY_EDGES, counts=counts.tolist(), never=never)

    def position_features(self) -> PositionFeatures:
        """Those that stand for a position."""
        explained = position_r2(self.n_rows, self.sums, self.squares) > POSITION_R2
        slots = self.n_firings[explained].sum() / max(1, self.n_rows.sum())
        return PositionFeatures(features=int(explained.sum()), slots=float(slots))


class FeatureKeeper:
    """Adds up what ``FeatureSums`` are made of, on the device of the codes."""

    def __init__(
        self,
        dictionary_size: int,
        context_length: int,
        contexts: tuple[int, int],
        *,
        above: float,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        """Begin with no rows.

        Args:
            dictionary_size: features.
            context_length: positions of a context.
            contexts: the first context that will come, and one past the last.
            above: a feature fires where its activation is larger than this in size.
            device: where the codes will be.
            seed: of how far each context is turned.
        """
        self._above = above
        self._length = context_length
        self._first = contexts[0]
        self._turns = np.random.default_rng(seed).integers(context_length, size=contexts[1] - contexts[0])
        self._n_rows = np.zeros(context_length, np.int64)
        self._turned_rows = np.zeros(context_length, np.int64)
        by_position = (context_length, dictionary_size)
        self._firings = torch.zeros(by_position, dtype=torch.int32, device=device)
        self._turned_firings = torch.zeros(by_position, dtype=torch.int32, device=device)
        self._sums = torch.zeros(by_position, dtype=torch.float64, device=device)
        self._squares = torch.zeros(dictionary_size, dtype=torch.float64, device=device)
        self._top = torch.zeros((dictionary_size, N_TOP), device=device)
        self._top_tokens = torch.full((dictionary_size, N_TOP), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(
        self,
        code: Tensor | SparseCode,
        positions: NDArray[np.int64],
        contexts: NDArray[np.int64],
        tokens: NDArray[np.int32],
    ) -> None:
        """Add a batch.

        Args:
            code: [rows, features], or what is not 0 in it.
            positions: of each row; [rows].
            contexts: of each row; [rows].
            tokens: id of each row's token; [rows].
        """
        turned = (positions + self._turns[contexts - self._first]) % self._length
        self._n_rows += np.bincount(positions, minlength=self._length)
        self._turned_rows += np.bincount(turned, minlength=self._length)
        by_position, by_turned, ids = (
            torch.as_tensor(values.astype(np.int64)).to(self._top.device, non_blocking=True)
            for values in (positions, turned, tokens)
        )
        if isinstance(code, SparseCode):
            self._add_listed(code, by_position, by_turned, ids)
            return
        for rows in blocks_of_rows(code):
            block, sizes = code[rows].double(), code[rows].abs()
            fired = (sizes > self._above).int()
            self._firings.index_add_(0, by_position[rows], fired)
            self._turned_firings.index_add_(0, by_turned[rows], fired)
            self._sums.index_add_(0, by_position[rows], block)
            self._squares += block.square().sum(0)
            self._keep_largest(torch.where(fired > 0, sizes, 0), ids[rows])

    def _add_listed(self, code: SparseCode, by_position: Tensor, by_turned: Tensor, ids: Tensor) -> None:
        rows, features, values = code.places.rows, code.places.features, code.values.double()
        sizes = code.values.abs()
        fired = sizes > self._above
        at, at_turned = (where[rows] * len(self._top) + features for where in (by_position, by_turned))
        self._firings.view(-1).index_add_(0, at, fired.int())
        self._turned_firings.view(-1).index_add_(0, at_turned, fired.int())
        self._sums.view(-1).index_add_(0, at, values)
        self._squares.index_add_(0, features, values.square())
        is_large = (fired & (sizes > self._top[features, -1])).nonzero()[:, 0]
        self._keep_largest_listed(features[is_large], sizes[is_large], ids[rows[is_large]])

    def _keep_largest_listed(self, features: Tensor, sizes: Tensor, tokens: Tensor) -> None:
        """Take in activations, each of the feature that is named beside it; [entries] each."""
        order = sizes.argsort(descending=True, stable=True)
        order = order[features[order].argsort(stable=True)]
        features = features[order]
        is_first = torch.ones_like(features, dtype=torch.bool)
        is_first[1:] = features[1:] != features[:-1]
        first = is_first.nonzero()[:, 0]
        touched, row = features[first], is_first.cumsum(0) - 1
        rank = torch.arange(len(order), device=order.device) - first[row]
        is_among = rank < N_TOP
        row, rank, order = row[is_among], rank[is_among], order[is_among]
        values = self._top.new_zeros(len(touched), N_TOP)
        ids = self._top_tokens.new_full((len(touched), N_TOP), -1)
        values[row, rank], ids[row, rank] = sizes[order], tokens[order]
        self._merge(touched, values, ids)

    def _keep_largest(self, sizes: Tensor, tokens: Tensor) -> None:
        """Take in those of a block that are among the largest so far."""
        touched = (sizes > self._top[:, -1]).any(0).nonzero().flatten()
        self._merge(touched, sizes[:, touched].T, tokens.expand(len(touched), -1))

    def _merge(self, touched: Tensor, values: Tensor, tokens: Tensor) -> None:
        """Keep the largest of what some features have and these; [touched, any number]."""
        values = torch.cat([self._top[touched], values], dim=1)
        ids = torch.cat([self._top_tokens[touched], tokens], dim=1)
        largest, places = values.topk(N_TOP, dim=1)
        self._top[touched] = largest
        self._top_tokens[touched] = torch.where(largest > 0, ids.gather(1, places), -1)

    def sums(self) -> FeatureSums:
        """Of all rows added so far."""
        return FeatureSums(
            self._n_rows.copy(),
            self._firings.cpu().numpy().astype(np.int64),
            self._sums.cpu().numpy().copy(),
            self._squares.cpu().numpy().copy(),
            self._turned_rows.copy(),
            self._turned_firings.cpu().numpy().astype(np.int64),
            self._top_tokens.cpu().numpy().copy(),
        )
