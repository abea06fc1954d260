"""Statistics of what features did at which positions, on counts alone; nulls with both margins fixed.

Cost: of a null its draws times ranges times features, in numbers of 8 bytes, a few times over.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def mutual_information(firings: Counts, n_rows: Counts) -> Floats:
    """Of firing and range, in bits; [..., features].

    Args:
        firings: how often each feature fired in each range; [..., ranges, features].
        n_rows: rows of each range; [ranges].
    """
    n = n_rows.sum()
    fired = firings.sum(axis=-2, keepdims=True)
    rows = n_rows[:, np.newaxis]
    joint = np.stack([firings, rows - firings])
    if_independent = np.stack([fired, n - fired]) * (rows / n)
    return _plogp(joint / n, if_independent / n).sum(axis=(0, -2))


def specialisation(firings: Counts, n_rows: Counts) -> Floats:
    """What a firing tells of the range, in bits: the entropy of its range relative to all rows'.

    Args:
        firings: [..., ranges, features].
        n_rows: [ranges].

    Returns:
        [..., features]; 0 for a feature that never fired.
    """
    share = firings / np.maximum(1, firings.sum(axis=-2, keepdims=True))
    return _plogp(share, np.broadcast_to((n_rows / n_rows.sum())[:, np.newaxis], share.shape)).sum(axis=-2)


def _plogp(p: Floats, q: Floats) -> Floats:
    """Terms p · log2(p / q) of a relative entropy, 0 where p is 0."""
    there = p > 0
    ratio = np.divide(p, q, out=np.ones_like(p), where=there)
    return p * np.log2(ratio)


def drawn_firings(n_firings: Counts, n_rows: Counts, n_draws: int, rng: np.random.Generator) -> Counts:
    """Firings by range if positions are permuted among tokens; [draws, ranges, features].

    With both margins fixed the counts are multivariate hypergeometric: drawn one range after the other.

    Args:
        n_firings: of each feature; [features].
        n_rows: of each range; [ranges].
        n_draws: how often.
        rng: draws.
    """
    drawn = np.zeros((n_draws, len(n_rows), len(n_firings)), np.int64)
    left = np.broadcast_to(n_firings, (n_draws, len(n_firings))).copy()
    rows_left = int(n_rows.sum())
    for r, rows in enumerate(n_rows.tolist()):
        rows_left -= rows
        drawn[:, r] = rng.hypergeometric(rows, rows_left, left) if rows_left else left
        left -= drawn[:, r]
    return drawn


def position_r2(n_rows: Counts, sums: Floats, squares: Floats) -> Floats:
    """Share of each feature's variance that exact position explains, less what chance would; [features].

    One-way analysis of variance with positions as groups: 1 - (1 - R²) · (n - 1) / (n - groups). NaN of a
    feature that never varies, and of too few rows.

    Args:
        n_rows: of each position; [positions].
        sums: of activations; [positions, features].
        squares: of activations; [features].
    """
    there = n_rows > 0
    n, n_groups = int(n_rows.sum()), int(there.sum())
    if n <= n_groups:
        return np.full(len(squares), np.nan)
    constant = sums.sum(axis=0) ** 2 / n
    variation = squares - constant
    between = (sums[there] ** 2 / n_rows[there, np.newaxis]).sum(axis=0) - constant
    # What is left of equal numbers is rounding.
    varies = variation > 1e-9 * squares
    unexplained = 1 - np.divide(between, variation, out=np.full_like(squares, np.nan), where=varies)
    return 1 - unexplained * (n - 1) / (n - n_groups)


def entropies(tokens: Counts) -> Floats:
    """Entropy in bits of each row's ids; [rows] of [rows, ids].

    >>> entropies(np.array([[7, 7, 7, 7], [1, 1, 2, 2]]))
    array([0., 1.])
    """
    n_rows, n_ids = tokens.shape
    ordered = np.sort(tokens, axis=1)
    begins = np.ones_like(ordered, dtype=np.bool_)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    begin = np.flatnonzero(begins)  # each row begins anew, so that no run of equal ids leads into the next
    share = np.diff(begin, append=n_rows * n_ids) / n_ids
    return np.abs(np.bincount(begin // n_ids, -share * np.log2(share), minlength=n_rows))


def rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's; NaN where one of them does not vary.

    >>> rank_correlation(np.array([1.0, 2.0, 9.0]), np.array([-1.0, -2.0, -3.0]))
    -1.0
    """
    x, y = _centred_ranks(x), _centred_ranks(y)
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else float("nan")


def _centred_ranks(values: Floats) -> Floats:
    """Rank of each value less the mean rank, equal ones sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks - (len(values) + 1) / 2
