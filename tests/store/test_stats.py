"""What position explains: nothing of noise, all of a table, and NaN where it cannot be told."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from posae.store.stats import LayerStats

Array = NDArray[np.float64]


def stats_of(x: Array, **changes: Any) -> LayerStats:
    """Of activations [contexts, positions, d_model]."""
    n_contexts, n_positions, _ = x.shape
    sums, squares = x.sum(axis=0), np.square(x).sum(axis=(0, 1))
    return LayerStats(sums, np.full(n_positions, n_contexts), squares)._replace(**changes)


def test_position_explains_nothing_of_noise() -> None:
    draw = np.random.default_rng(0)
    shares = [stats_of(3 + draw.normal(size=(4, 32, 8))).position_r2 for _ in range(40)]
    # Without the correction for chance this would be 31 / 127 = .24.
    assert np.mean(shares) == pytest.approx(0, abs=0.01)
    assert min(shares) < 0


def test_position_explains_all_or_its_share() -> None:
    draw = np.random.default_rng(1)
    tables = draw.normal(size=(1, 32, 8))
    assert stats_of(np.repeat(tables, 5, axis=0)).position_r2 == pytest.approx(1, abs=1e-5)
    noise = draw.normal(size=(400, 32, 8))
    tables *= 0.5 / tables.std(axis=1, keepdims=True)
    assert stats_of(tables + noise).position_r2 == pytest.approx(0.25 / 1.25, abs=0.01)


def test_positions_without_rows_are_left_out() -> None:
    draw = np.random.default_rng(2)
    stats = stats_of(draw.normal(size=(20, 6, 4)) + draw.normal(size=(1, 6, 4)))
    longer = LayerStats(
        np.concatenate([np.zeros((1, 4)), stats.sums]), np.array([0] + [20] * 6), stats.squares
    )
    assert longer.position_r2 == pytest.approx(stats.position_r2)


def test_position_r2_is_nan_where_nothing_can_be_told() -> None:
    draw = np.random.default_rng(3)
    assert np.isnan(stats_of(draw.normal(size=(1, 4, 2))).position_r2), "a row to a position"
    assert np.isnan(stats_of(np.full((3, 4, 2), 2.0)).position_r2), "nothing varies"
    assert np.isnan(stats_of(draw.normal(size=(3, 4, 2)), sums=np.full((4, 2), np.nan)).position_r2)
    assert np.isnan(stats_of(draw.normal(size=(3, 4, 2)), squares=np.full(2, np.inf)).position_r2)
