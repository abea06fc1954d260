"""Statistics of a layer, made while its shards are written and merged when they are read.

One entry per shard, so that several processes need no common state: sums by position over the training part's
ordinary tokens (for position means), their second moments, norms of every token by position, counts of each
byte (for the bound on compression), the rounding error, and the digest of the shard's file (for the seal).
Sums run in float64, context after context, so equal shards give equal bytes. Costs about as much CPU time as
compressing the shard, in the same threads.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .layout import ArraySpec
from .manifest import Manifest, layer_path

NORM_BINS = 128
NORM_BINS_TO_AN_OCTAVE = 4
NORM_FIRST_OCTAVE = -8
"""Bin b counts norms in [2^(b/4 - 8), 2^((b+1)/4 - 8)); the first and last include all values beyond."""


def stats_specs(manifest: Manifest, layer: int) -> dict[str, ArraySpec]:
    """The arrays of one layer's statistics, by short name; axis 0 is the shard."""
    length, d_model = manifest.context_length, manifest.d_model

    def by_shard(name: str, data_type: str, *axes: tuple[str, int]) -> ArraySpec:
        return ArraySpec(
            path=f"stats/{layer_path(layer)}/{name}",
            shape=(manifest.n_shards, *(size for _, size in axes)),
            data_type=data_type,
            chunk_rows=1,
            shard_rows=1,
            dimension_names=("shard", *(axis for axis, _ in axes)),
        )

    position, feature = ("position", length), ("feature", d_model)
    found = {
        "sums": by_shard("sums", "float32", position, feature),
        "counts": by_shard("counts", "int64", position),
        "squares": by_shard("squares", "float64", feature),
        "norm_sums": by_shard("norm_sums", "float64", position),
        "norm_counts": by_shard("norm_counts", "int64", position, ("bin", NORM_BINS)),
        "sha256": by_shard("sha256", "uint8", ("byte", 32)),
    }
    if manifest.byte_counts:
        found["byte_counts"] = by_shard("byte_counts", "int64", ("plane", 2), ("value", 256))
    if manifest.mantissa_bits is not None:
        found["rounding"] = by_shard("rounding", "float64", ("measure", 2), position)
    return found


def ordinary_tokens(manifest: Manifest, tokens: NDArray[np.int32], contexts: range) -> NDArray[np.bool_]:
    """The tokens that enter the position means: those of the training part that are not special.

    Args:
        manifest: of the store.
        tokens: their ids, int32 [contexts, positions].
        contexts: their indices in the store.

    Returns:
        bool [contexts, positions].
    """
    ordinary = ~np.isin(tokens, np.array(manifest.special_token_ids))
    ordinary[np.array(contexts) >= manifest.held_out[0]] = False
    return ordinary


def bits_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16 bits; exact.

    >>> bits_to_float32(np.array([0x3F80, 0xC000], np.uint16))
    array([ 1., -2.], dtype=float32)
    """
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


class ChunkStats(NamedTuple):
    """Sums over chunks."""

    sums: NDArray[np.float64]  # [positions, d_model]
    counts: NDArray[np.int64]  # [positions]
    squares: NDArray[np.float64]  # [d_model]
    norm_sums: NDArray[np.float64]  # [positions]
    norm_counts: NDArray[np.int64]  # [positions, bins]
    byte_counts: NDArray[np.int64]  # [planes, values]
    rounding: NDArray[np.float64]  # [measures, positions]

    @classmethod
    def of(
        cls, bits: NDArray[np.uint16], ordinary: NDArray[np.bool_], exact: NDArray[np.uint16] | None = None
    ) -> "ChunkStats":
        """The statistics of some contexts.

        Args:
            bits: bfloat16 bits as stored [contexts, positions, d_model].
            ordinary: bool [contexts, positions]: tokens of the training part that are not special;
                the sums are over these, the norms over all.
            exact: ``bits`` before rounding, if they were rounded.

        Raises:
            FloatingPointError: a value is not finite.
        """
        n_contexts, length, d_model = bits.shape
        squares = np.zeros(d_model)
        sums = np.zeros((length, d_model))
        norm_sums = np.zeros(length)
        norm_counts = np.zeros((length, NORM_BINS), np.int64)
        rounding = np.zeros((2, length))
        positions = np.arange(length, dtype=np.int64)
        # In float64 from the start: a float32 square overflows from 2^64 on. One context at a time stays in
        # the processor's cache.
        rows = np.empty((length, d_model))
        for context in range(n_contexts):
            values = bits_to_float32(bits[context])
            with np.errstate(invalid="ignore"):  # a signalling NaN, reported below
                np.copyto(rows, values)
            norms = np.sqrt(np.einsum("pd,pd->p", rows, rows))
            if not np.isfinite(norms).all():
                raise FloatingPointError(int(np.flatnonzero(~np.isfinite(norms))[0]))
            norm_sums += norms
            norm_counts[positions, norm_bin(norms)] += 1
            if exact is not None:
                rounding += _rounding_errors(bits_to_float32(exact[context]), values, ordinary[context])
            if not ordinary[context].all():
                rows[~ordinary[context]] = 0
            sums += rows
            squares += np.einsum("pd,pd->d", rows, rows)
        # Only of the first context: one in eight is enough, and counting costs time.
        counts = np.bincount(bits[0].reshape(-1), minlength=2**16).reshape(256, 256)
        byte_counts = np.stack([counts.sum(axis=1), counts.sum(axis=0)]).astype(np.int64)
        n_ordinary = ordinary.sum(axis=0, dtype=np.int64)
        return cls(sums, n_ordinary, squares, norm_sums, norm_counts, byte_counts, rounding)

    def add(self, other: "ChunkStats") -> None:
        """Add the next chunk, in place."""
        for mine, theirs in zip(self, other, strict=True):
            mine += theirs

    def arrays(self, sha256: bytes) -> dict[str, NDArray[Any]]:
        """One entry of each array that ``stats_specs`` may name."""
        with np.errstate(over="ignore"):
            sums = self.sums.astype(np.float32)
        return {**self._asdict(), "sums": sums, "sha256": np.frombuffer(sha256, np.uint8)}


def _rounding_errors(
    exact: NDArray[np.float32], stored: NDArray[np.float32], ordinary: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Relative error of each token, and squared error of the ordinary ones; [2, positions]."""
    error = (exact - stored).astype(np.float64)
    squared = np.einsum("pd,pd->p", error, error)
    norms = np.sqrt(np.einsum("pd,pd->p", exact, exact, dtype=np.float64))
    relative = np.divide(np.sqrt(squared), norms, out=np.zeros_like(norms), where=norms > 0)
    return np.stack([relative, np.where(ordinary, squared, 0)])


def norm_bin(norms: NDArray[np.float64]) -> NDArray[np.int64]:
    """The histogram bin of each norm."""
    with np.errstate(divide="ignore"):
        octaves = np.log2(norms) - NORM_FIRST_OCTAVE
    return np.clip(octaves * NORM_BINS_TO_AN_OCTAVE, 0, NORM_BINS - 1).astype(np.int64)


def bin_middles() -> NDArray[np.float64]:
    """The geometric middle of each histogram bin; [bins]."""
    return 2.0 ** ((np.arange(NORM_BINS) + 0.5) / NORM_BINS_TO_AN_OCTAVE + NORM_FIRST_OCTAVE)


class LayerStats(NamedTuple):
    """A layer's statistics, merged over its committed shards."""

    sums: NDArray[np.float64]
    """Sums of ordinary training tokens' activations; [positions, d_model]."""

    counts: NDArray[np.int64]
    """Number of tokens in each row of ``sums``; [positions]."""

    squares: NDArray[np.float64]
    """Sums of their squares; [d_model]."""

    @property
    def n_tokens(self) -> int:
        """Number of ordinary tokens in the sums."""
        return int(self.counts.sum())

    @property
    def variation(self) -> float:
        """Sum of squared distances of the ordinary tokens from their mean."""
        with np.errstate(over="ignore", invalid="ignore"):  # overflow of huge numbers in a hostile store
            mean = self.sums.sum(axis=0) / max(1, self.n_tokens)
            return float(self.squares.sum() - self.n_tokens * np.dot(mean, mean))

    @property
    def position_r2(self) -> float:
        """Share of the variance that position alone explains, minus chance; NaN for too few tokens.

        One-way analysis of variance with positions as groups, adjusted for their number: 1 - (1 - R²) ·
        (n - 1) / (n - groups), about 0 without an effect of position.
        """
        there = self.counts > 0
        n_groups = int(there.sum())
        variation = self.variation
        if self.n_tokens <= n_groups or not 0 < variation < np.inf:
            return float("nan")
        with np.errstate(over="ignore", invalid="ignore"):
            mean = self.sums.sum(axis=0) / self.n_tokens
            means = self.sums[there] / self.counts[there, np.newaxis]
            between = float((self.counts[there] * np.square(means - mean).sum(axis=1)).sum())
        unexplained = 1 - between / variation
        return 1 - unexplained * (self.n_tokens - 1) / (self.n_tokens - n_groups)


class RoundingError(NamedTuple):
    """The error of rounding mantissas."""

    relative: float
    """Mean over all tokens of |error| / |activation|."""

    fvu: float
    """Squared error over the variance, for ordinary training tokens."""


class NormStats(NamedTuple):
    """Norms of every token of a layer, special and held-out ones too."""

    mean: NDArray[np.float64]
    """Mean norm by position; [positions]."""

    median: float
    """Median norm over all tokens, to the width of a histogram bin (a quarter octave)."""

    outlier_share: float
    """Share of tokens whose norm is over ten times the median, by histogram bin."""


def norm_stats(norm_sums: NDArray[np.float64], norm_counts: NDArray[np.int64]) -> NormStats:
    """Norms from merged sums [positions] and histograms [positions, bins]."""
    n_tokens = norm_counts.sum(axis=1)
    by_bin = norm_counts.sum(axis=0)
    total = int(by_bin.sum())
    if total == 0:
        return NormStats(np.full(len(norm_sums), np.nan), float("nan"), float("nan"))
    median = float(bin_middles()[np.searchsorted(np.cumsum(by_bin), total / 2)])
    outliers = int(by_bin[bin_middles() > 10 * median].sum())
    return NormStats(norm_sums / n_tokens, median, outliers / total)


def byte_plane_bound(byte_counts: NDArray[np.int64]) -> float:
    """The best ratio of coding byte by byte: 16 bits over both planes' entropies.

    Args:
        byte_counts: how often each value of the high and of the low byte occurs; [2, 256].
    """
    totals = byte_counts.sum(axis=1, keepdims=True)
    if not totals.all():
        return float("nan")
    share = byte_counts / totals
    entropy = -(share * np.log2(share, out=np.zeros_like(share), where=share > 0)).sum()
    return float(16 / entropy) if entropy > 0 else float("inf")
