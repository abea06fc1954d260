import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posae.pipeline.metrics import ScoreKeeper, Scores

N_RANGES, D_MODEL, DICTIONARY_SIZE = 3, 5, 7
Array = np.ndarray[Any, np.dtype[np.float64]]


class Rows:
    """Random activations, codes and reconstructions, far from 0 and with a range for each row."""

    def __init__(self, n_rows: int, seed: int = 0, mean: float = 300.0) -> None:
        draw = np.random.default_rng(seed)
        spread = draw.normal(size=(n_rows, D_MODEL))
        self.x = torch.tensor(mean + spread, dtype=torch.float32)
        self.reconstruction = self.x + torch.tensor(0.3 * draw.normal(size=spread.shape)).float()
        self.base = self.x + torch.tensor(0.5 * draw.normal(size=spread.shape)).float()
        sizes = draw.choice([0, 0, 5e-4, -2, 1], size=(n_rows, DICTIONARY_SIZE))
        self.code = torch.tensor(sizes).float()
        self.code[:, 2] = 0
        self.range_of_row = torch.tensor(draw.integers(N_RANGES, size=n_rows))

    def add_to(self, keeper: ScoreKeeper, rows: slice, *, base: bool) -> None:
        order = rows.start + self.range_of_row[rows].argsort(stable=True)
        offsets = torch.searchsorted(self.range_of_row[order], torch.arange(N_RANGES + 1))
        keeper.add(
            self.x[order],
            self.reconstruction[order],
            self.code[order],
            offsets,
            self.base[order] if base else None,
        )


def squared(values: Tensor) -> Array:
    return (values.double().numpy() ** 2).sum(1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_rows=st.integers(2, 80),
    cuts=st.lists(st.integers(0, 80), max_size=5),
    base=st.booleans(),
)
def test_scores_do_not_depend_on_the_batches(seed: int, n_rows: int, cuts: list[int], base: bool) -> None:
    rows = Rows(n_rows, seed)
    keeper = ScoreKeeper(D_MODEL, DICTIONARY_SIZE, N_RANGES)
    rows.add_to(keeper, slice(0, 0), base=base)
    edges = sorted({0, n_rows, *(min(cut, n_rows) for cut in cuts)})
    for start, stop in pairwise(edges):
        rows.add_to(keeper, slice(start, stop), base=base)
    scores = keeper.scores()

    x, code = rows.x.double().numpy(), rows.code.numpy()
    errors, variation = squared(rows.x.double() - rows.reconstruction), ((x - x.mean(0)) ** 2).sum(1)
    active = (code != 0).sum(1)
    assert scores.n_rows == n_rows
    assert scores.fvu == pytest.approx(errors.sum() / variation.sum(), rel=1e-8)
    assert scores.l0 == pytest.approx(active.mean(), rel=1e-8)
    assert scores.l0_above == pytest.approx((np.abs(code) > 1e-3).sum(1).mean(), rel=1e-8)
    assert scores.dead_fraction == pytest.approx((code == 0).all(0).mean(), rel=1e-8)
    if base:
        base_errors = squared(rows.x.double() - rows.base)
        assert scores.fvu_base == pytest.approx(base_errors.sum() / variation.sum(), rel=1e-8)
    else:
        assert scores.fvu_base is None
    for r in range(N_RANGES):
        here = rows.range_of_row.numpy() == r
        if not here.any():
            assert math.isnan(scores.fvu_by_range[r])
            assert math.isnan(scores.l0_by_range[r])
            continue
        fvu = errors[here].sum() / variation[here].sum()
        assert scores.fvu_by_range[r] == pytest.approx(fvu, rel=1e-8)
        assert scores.l0_by_range[r] == pytest.approx(active[here].mean(), rel=1e-8)


def flat(scores: Scores) -> list[float]:
    """All numbers of ``scores``, one after the other."""
    values = (value if isinstance(value, tuple) else (value,) for value in scores)
    return [number for numbers in values for number in numbers if number is not None]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 60), base=st.booleans())
def test_keepers_of_parts_add_up_to_that_of_all_and_merged_ranges_to_one(
    seed: int, cut: int, base: bool
) -> None:
    rows = Rows(60, seed)
    whole, first, second = (ScoreKeeper(D_MODEL, DICTIONARY_SIZE, N_RANGES) for _ in range(3))
    rows.add_to(whole, slice(0, 60), base=base)
    rows.add_to(first, slice(0, cut), base=base)
    rows.add_to(second, slice(cut, 60), base=base)
    expected = whole.scores()
    for scores in ((first + second).scores(), (second + first).scores()):
        assert flat(scores) == pytest.approx(flat(expected), rel=1e-9, nan_ok=True)
    merged = whole.merged([(0, 1), (1, 3)])
    found = merged.scores()
    assert found.fvu_by_range[0] == pytest.approx(expected.fvu_by_range[0], nan_ok=True)
    in_all = {"l0_by_range": (), "fvu_by_range": ()}
    assert flat(found._replace(**in_all)) == pytest.approx(flat(expected._replace(**in_all)))
    here = rows.range_of_row.numpy() > 0
    if here.any():
        assert found.l0_by_range[1] == pytest.approx((rows.code.numpy() != 0).sum(1)[here].mean())
    both = first + second
    before = flat(both.scores()), flat(found)
    for keeper in (first, second, whole):  # what was made of them shares nothing with them
        rows.add_to(keeper, slice(0, 60), base=base)
    assert (flat(both.scores()), flat(merged.scores())) == before


def keeper_of(x: Tensor, reconstruction: Tensor) -> Scores:
    keeper = ScoreKeeper(x.shape[1], 1, 1)
    for rows in torch.arange(len(x)).chunk(4):
        keeper.add(x[rows], reconstruction[rows], torch.ones(len(rows), 1), [0, len(rows)])
    return keeper.scores()


def test_a_mean_far_larger_than_the_spread_costs_no_digits() -> None:
    draw = torch.Generator().manual_seed(0)
    x = 1e8 + torch.randn(4000, 3, generator=draw, dtype=torch.float64)
    exact = torch.var(x, dim=0, correction=0).sum() * len(x)
    scores = keeper_of(x, x + 1)  # the 1 itself is known to 1e-8
    assert scores.fvu == pytest.approx(3 * len(x) / float(exact), rel=1e-7)


def test_fvu_is_0_for_the_activations_and_1_for_their_mean() -> None:
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 7
    assert keeper_of(x, x).fvu == 0
    assert keeper_of(x, x.mean(0).expand_as(x)).fvu == pytest.approx(1, rel=1e-12)


def test_activations_in_bfloat16_are_taken_as_they_are() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert keeper_of(x, x.float() + 0.1) == keeper_of(x.float(), x.float() + 0.1)


def test_activations_that_never_vary_have_no_fvu() -> None:
    assert math.isnan(keeper_of(torch.full((8, 2), 3.0), torch.zeros(8, 2)).fvu)


def test_scores_keep_nothing_of_the_gradient() -> None:
    rows = Rows(10)
    rows.code.requires_grad_()
    keeper = ScoreKeeper(D_MODEL, DICTIONARY_SIZE, N_RANGES)
    rows.add_to(keeper, slice(0, 10), base=True)
    rows.add_to(keeper, slice(0, 10), base=True)
    assert keeper.scores().n_rows == 20


def test_wrong_use_is_refused() -> None:
    keeper = ScoreKeeper(D_MODEL, DICTIONARY_SIZE, N_RANGES)
    with pytest.raises(ValueError, match="no row was added"):
        keeper.scores()
    rows = Rows(10)
    rows.add_to(keeper, slice(0, 10), base=True)
    rows.add_to(keeper, slice(0, 10), base=False)
    with pytest.raises(ValueError, match="every batch or with none"):
        keeper.scores()
    with pytest.raises(ValueError, match="shorter"):
        keeper.add(rows.x, rows.x, rows.code, [0, 10])
