"""What each feature did by position, and the contexts in which its largest activations stand.

A first pass over contexts adds up everything of every feature; which features are shown is chosen from that,
and a second pass reads again only the contexts in which these are largest.

Cost: 12 bytes to each feature and position, 20 with a base code, 16 to each feature and context kept; a batch
costs a few passes over its code.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .specificity import FeatureSpecificity, feature_specificity

LEVELS = 127
"""Activations of excerpts are kept in so many steps, up and down, of the feature's largest."""


class Profiles(NamedTuple):
    """Of every feature, over the ordinary tokens that were looked at."""

    n_rows: NDArray[np.int64]
    """Tokens; [positions]."""
    firings: NDArray[np.int64]
    """How often each feature fired at each position; [positions, features]."""
    sums: NDArray[np.float64]
    """Of activations; [positions, features]."""
    base_sums: NDArray[np.float64] | None
    """Of activations without position adapters; [positions, features]. None where there are none."""
    peaks: NDArray[np.float32]
    """The largest activation in size in each of the contexts where it is largest, the largest first, with its
    sign, 0 where there are fewer; [kept, features]."""
    peak_contexts: NDArray[np.int64]
    """Which contexts these are; [kept, features]."""
    peak_positions: NDArray[np.int64]
    """Where in them; [kept, features]."""

    def density(self) -> NDArray[np.float64]:
        """Share of all tokens on which each feature fires; [features]."""
        return self.firings.sum(axis=0) / max(1, int(self.n_rows.sum()))

    def by_range(self, starts: list[int]) -> "RangeProfiles":
        """The same by position range.

        Args:
            starts: first position of each range, from 0.
        """
        rows = np.add.reduceat(self.n_rows, starts)
        firings = np.add.reduceat(self.firings, starts, axis=0)
        each = np.maximum(1, rows)[:, np.newaxis]
        base = self.base_sums
        return RangeProfiles(
            firings / each,
            np.add.reduceat(self.sums, starts, axis=0) / each,
            None if base is None else np.add.reduceat(base, starts, axis=0) / each,
            feature_specificity(firings, rows),
        )


class RangeProfiles(NamedTuple):
    """Of every feature, by position range; [ranges, features] each."""

    density: NDArray[np.float64]
    """Share of the range's tokens on which it fires."""
    mean: NDArray[np.float64]
    """Mean activation over all tokens of the range."""
    base_mean: NDArray[np.float64] | None
    """The same without position adapters."""
    specificity: FeatureSpecificity
    """How much it keeps to some ranges; [features] each."""


class ProfileKeeper:
    """Adds up ``Profiles``, on the device of the codes."""

    def __init__(
        self,
        dictionary_size: int,
        context_length: int,
        *,
        n_kept: int,
        above: float,
        has_base: bool,
        device: torch.device,
    ) -> None:
        """Begin with no rows.

        Args:
            dictionary_size: features.
            context_length: positions of a context.
            n_kept: how many contexts are kept for each feature.
            above: a feature fires where its activation is larger than this in size.
            has_base: whether codes without position adapters will come too.
            device: where the codes will be.
        """
        self._above = above
        by_position = (context_length, dictionary_size)
        self._n_rows = np.zeros(context_length, np.int64)
        self._firings = torch.zeros(by_position, dtype=torch.int32, device=device)
        self._sums = torch.zeros(by_position, dtype=torch.float64, device=device)
        self._base_sums = torch.zeros_like(self._sums) if has_base else None
        kept = (n_kept, dictionary_size)
        self._peaks = torch.zeros(kept, device=device)
        self._contexts = torch.zeros(kept, dtype=torch.int64, device=device)
        self._positions = torch.zeros(kept, dtype=torch.int32, device=device)

    @torch.no_grad()
    def add(
        self,
        code: Tensor,
        base_code: Tensor | None,
        contexts: NDArray[np.int64],
        is_ordinary: NDArray[np.bool_],
    ) -> None:
        """Add whole contexts.

        Args:
            code: [contexts, positions, features], 0 on tokens that are not ordinary.
            base_code: the same without position adapters, where there are any.
            contexts: which contexts these are; [contexts].
            is_ordinary: the tokens that count; [contexts, positions].
        """
        self._n_rows += is_ordinary.sum(axis=0)
        sizes = code.abs()
        self._firings += (sizes > self._above).sum(dim=0, dtype=torch.int32)
        self._sums += code.sum(dim=0, dtype=torch.float64)
        if self._base_sums is not None and base_code is not None:
            self._base_sums += base_code.sum(dim=0, dtype=torch.float64)
        where = sizes.argmax(dim=1)
        ids = torch.as_tensor(contexts).to(code.device)
        peaks = torch.cat([self._peaks, code.gather(1, where[:, None])[:, 0]])
        _, best = peaks.abs().topk(len(self._peaks), dim=0)
        self._peaks = peaks.gather(0, best)
        self._contexts = torch.cat([self._contexts, ids[:, None].expand_as(where)]).gather(0, best)
        self._positions = torch.cat([self._positions, where.int()]).gather(0, best)

    def profiles(self) -> Profiles:
        """Of all contexts added so far."""
        peaks = self._peaks.cpu().numpy()
        fires = np.abs(peaks) > self._above
        return Profiles(
            self._n_rows.copy(),
            self._firings.cpu().numpy().astype(np.int64),
            self._sums.cpu().numpy().copy(),
            None if self._base_sums is None else self._base_sums.cpu().numpy().copy(),
            np.where(fires, peaks, np.float32(0)),
            self._contexts.cpu().numpy().copy(),
            self._positions.cpu().numpy().astype(np.int64),
        )


def choose_features(
    n_firings: NDArray[np.int64], specificity: NDArray[np.float64], n_wanted: int
) -> NDArray[np.int64]:
    """Which features are shown: int64 [at most n_wanted], ascending.

    All that fired, if they are no more. Else half of them the most position-specific, and of the others as
    many more, evenly spaced from the rarest to the densest.

    >>> choose_features(np.array([0, 5, 1, 9, 7]), np.array([0, 0.1, 0.9, 0.2, 0.3]), 3)
    array([1, 2, 3])

    Args:
        n_firings: of each feature; [features].
        specificity: of each feature, in bits; [features].
        n_wanted: at most so many.
    """
    alive = np.flatnonzero(n_firings)
    if len(alive) <= n_wanted:
        return alive
    n_specific = n_wanted // 2
    most_specific = alive[np.argsort(-specificity[alive], kind="stable")]
    rest = most_specific[n_specific:]
    by_density = rest[np.argsort(n_firings[rest], kind="stable")]
    spread = np.linspace(0, len(rest) - 1, n_wanted - n_specific).round().astype(np.int64)
    return np.sort(np.concatenate([most_specific[:n_specific], by_density[spread]]))


@torch.no_grad()
def neighbours(
    decoder: Tensor, features: NDArray[np.int64], n_nearest: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of each feature those whose directions are nearest, and the cosines, the largest first.

    Cost: a product of [features asked for, d_model] and [d_model, features], 256 rows at a time.

    Args:
        decoder: ``W_dec``, [features, d_model].
        features: those that are asked for; [asked].
        n_nearest: how many; fewer where there are not so many others.

    Returns:
        int64 and float32 [asked, nearest].
    """
    n_nearest = min(n_nearest, len(decoder) - 1)
    directions = torch.nn.functional.normalize(decoder.float(), dim=1)
    found: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    for part in np.split(features, range(256, len(features), 256)):
        rows = torch.as_tensor(part).to(decoder.device)
        cosines = directions[rows] @ directions.T
        cosines[torch.arange(len(part), device=rows.device), rows] = -torch.inf
        values, which = cosines.topk(n_nearest, dim=1)
        found.append((which.cpu().numpy(), values.cpu().numpy()))
    return np.concatenate([which for which, _ in found]), np.concatenate([values for _, values in found])


@torch.no_grad()
def turned(decoder: Tensor, inner: Tensor, outer: Tensor, alpha: float) -> NDArray[np.float32]:
    """Cosine of each feature's direction with what a decoder adapter makes of it; float32 [ranges, features].

    Args:
        decoder: rows of ``W_dec``, [features, d_model].
        inner: U of each range and of these features, [ranges, features, R].
        outer: V of each range, [ranges, R, d_model].
        alpha: how far adapters are switched on.
    """
    moved = (
        torch.cosine_similarity(decoder, decoder + alpha * (u @ v)) for u, v in zip(inner, outer, strict=True)
    )
    return torch.stack(list(moved)).cpu().numpy()


@torch.no_grad()
def in_levels(code: Tensor, peaks: Tensor) -> NDArray[np.int8]:
    """Activations as shares of the feature's largest, -127 to 127; int8 of the code's shape.

    What is not 0 is not rounded to 0: a firing stays one.

    Args:
        code: [..., features].
        peaks: size of each feature's largest activation, above 0; [features].
    """
    levels = (code / peaks * LEVELS).clamp(-LEVELS, LEVELS)
    rounded = torch.where(levels.abs() < 1, levels.sign(), levels.round())
    return rounded.to(torch.int8).cpu().numpy()
