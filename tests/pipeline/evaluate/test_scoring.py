"""Scores of features on rows and counts made by hand, and nulls against what they stand for."""

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from posae.pipeline.errors import RunError
from posae.pipeline.evaluate.scoring.base_phase import base_decoder, drift, n_retained, retained
from posae.pipeline.evaluate.scoring.ce_loss import CeKeeper, Replace, ce_loss
from posae.pipeline.evaluate.scoring.clusters import clusters
from posae.pipeline.evaluate.scoring.features import N_TOP, FeatureKeeper, FeatureSums
from posae.pipeline.evaluate.scoring.information import (
    drawn_firings,
    mutual_information,
    position_r2,
    specialisation,
)
from posae.pipeline.evaluate.scoring.specificity import feature_specificity, purity, specificity
from posae.pipeline.sae.sparse import SparseCode

LENGTH, FEATURES, CONTEXTS = 6, 5, 9
safetensors = cast(Any, safetensors_torch)
torch.set_num_threads(1)


class Rows:
    """Codes of random rows: a feature that never fires, one below what counts, negative numbers too."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.contexts, self.positions = np.divmod(rng.permutation(CONTEXTS * LENGTH), LENGTH)
        code = rng.standard_normal((len(self.positions), FEATURES))
        code[rng.random(code.shape) < 0.5] = 0
        code[:, 2] = 0
        code[:, 3] *= 1e-5
        self.code = torch.tensor(code, dtype=torch.float32)
        self.tokens = rng.integers(0, 4, len(self.positions), dtype=np.int32)

    def sums(self, cuts: list[int]) -> FeatureSums:
        keeper = FeatureKeeper(
            FEATURES, LENGTH, (100, 100 + CONTEXTS), above=1e-3, device=torch.device("cpu")
        )
        for start, stop in pairwise(sorted({0, *cuts, len(self.code)})):
            rows = slice(start, stop)
            contexts = self.contexts[rows] + 100
            keeper.add(self.code[rows], self.positions[rows], contexts, self.tokens[rows])
        return keeper.sums()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), cuts=st.lists(st.integers(0, CONTEXTS * LENGTH), max_size=5))
def test_sums_of_features_do_not_depend_on_the_batches(seed: int, cuts: list[int]) -> None:
    rows = Rows(seed)
    found, code = rows.sums(cuts), rows.code.double().numpy()
    fired = np.abs(code) > 1e-3
    for p in range(LENGTH):
        here = rows.positions == p
        assert found.n_rows[p] == here.sum() == CONTEXTS
        assert (found.firings[p] == fired[here].sum(axis=0)).all()
        np.testing.assert_allclose(found.sums[p], code[here].sum(axis=0), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found.squares, (code**2).sum(axis=0), rtol=1e-6)
    for k in range(FEATURES):
        order = np.argsort(-np.abs(code[:, k]))[: fired[:, k].sum()][:N_TOP]
        assert found.top_tokens[k, : len(order)].tolist() == rows.tokens[order].tolist()
        assert (found.top_tokens[k, len(order) :] == -1).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), n_active=st.integers(0, 4), n_rows=st.integers(1, 300))
def test_sums_of_a_listed_code_are_those_of_the_dense_one(seed: int, n_active: int, n_rows: int) -> None:
    rng = np.random.default_rng(seed)
    code = torch.zeros(n_rows, 90)
    for row in code:
        features = rng.choice(90 if seed % 2 else 9, n_active, replace=False)
        row[torch.as_tensor(features)] = torch.as_tensor(rng.standard_normal(n_active), dtype=torch.float32)
    code[:, 3] *= 1e-5
    listed = SparseCode.of(code)
    assert listed is not None
    contexts, positions = np.divmod(np.arange(n_rows), LENGTH)
    found: list[FeatureSums] = []
    for one in (code, listed):
        keeper = FeatureKeeper(90, LENGTH, (0, n_rows), above=1e-3, device=torch.device("cpu"))
        keeper.add(one, positions, contexts, contexts.astype(np.int32))
        found.append(keeper.sums())
    for values, wanted in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(values, wanted, rtol=1e-12)
    some = torch.as_tensor(np.flatnonzero(rng.random(n_rows) < 0.5))
    assert torch.equal(listed.of_rows(some).dense(), code[some])


def test_turning_moves_all_tokens_of_a_context_alike() -> None:
    rows = Rows(0)
    rows.code[:] = 0
    rows.code[:, 0] = torch.as_tensor(rows.positions == 1).float()
    rows.code[:, 1] = torch.as_tensor(rows.positions == 2).float()
    found = rows.sums([7, 30])
    assert (found.turned_rows == CONTEXTS).all()
    assert found.turned_firings.sum(axis=0).tolist() == found.n_firings.tolist() == [9, 9, 0, 0, 0]
    assert (np.roll(found.turned_firings[:, 0], 1) == found.turned_firings[:, 1]).all()
    assert np.count_nonzero(found.turned_firings[:, 0]) > 1


def test_only_the_largest_activations_are_kept_with_their_tokens() -> None:
    n = 3 * N_TOP
    code = torch.arange(1, n + 1, dtype=torch.float32)[:, None] * torch.tensor([1.0, -1.0])
    order = np.random.default_rng(0).permutation(n)
    keeper = FeatureKeeper(2, 1, (0, n), above=1e-3, device=torch.device("cpu"))
    for part in np.array_split(order, 5):
        keeper.add(code[part], np.zeros(len(part), np.int64), part, part.astype(np.int32))
    expected = list(range(n - 1, n - 1 - N_TOP, -1))
    assert keeper.sums().top_tokens.tolist() == [expected, expected]


def test_density_counts_features_by_the_share_of_tokens() -> None:
    firings = np.array([[0, 1, 10, 500, 1000]])
    zeros = np.zeros((1, 5))
    sums = FeatureSums(
        *(np.array([1000]), firings, zeros, zeros[0], np.array([1000]), firings),
        top_tokens=np.full((5, N_TOP), -1),
    )
    found = sums.density()
    assert found.never == 1
    filled = {edge: count for edge, count in zip(found.edges, found.counts, strict=False) if count}
    # log10 of .001, .01, .5 and 1; the last bin holds its upper edge, 0, too.
    assert filled == {-3.0: 1, -2.0: 1, -0.5: 1, -0.25: 1}


def test_position_explains_of_a_feature_what_an_analysis_of_variance_says() -> None:
    rng = np.random.default_rng(0)
    positions = np.repeat(np.arange(8), 50)
    x = rng.standard_normal((400, 3))
    x[:, 0] += positions
    x[:, 2] = 3.25
    n_rows = np.bincount(positions, minlength=10)  # two positions without rows
    sums = np.stack([x[positions == p].sum(axis=0) for p in range(10)])
    found = position_r2(n_rows, sums, (x**2).sum(axis=0))
    for k in range(2):
        within = sum(((x[positions == p, k] - x[positions == p, k].mean()) ** 2).sum() for p in range(8))
        total = ((x[:, k] - x[:, k].mean()) ** 2).sum()
        assert found[k] == pytest.approx(1 - (within / (400 - 8)) / (total / 399))
    assert found[0] > 0.8
    assert abs(found[1]) < 0.05
    assert np.isnan(found[2])


def test_mutual_information_and_specialisation_by_hand() -> None:
    n_rows = np.array([50, 50])
    firings = np.array([[50, 10, 25], [0, 10, 0]])
    information, to_a_firing = mutual_information(firings, n_rows), specialisation(firings, n_rows)
    assert information[0] == pytest.approx(1)  # firing is the range
    assert information[1] == pytest.approx(0)
    # H(F) - H(F | range): fires on 1/4 of all; on 1/2 and on none.
    assert information[2] == pytest.approx(0.811278124459 - 0.5)
    assert to_a_firing.tolist() == pytest.approx([1, 0, 1])


def test_the_null_is_what_permuting_positions_gives() -> None:
    rng = np.random.default_rng(1)
    n_rows, n_firings = np.array([40, 0, 100, 60]), np.array([0, 3, 60, 150, 200])
    ranges = np.repeat(np.arange(4), n_rows)
    drawn = drawn_firings(n_firings, n_rows, 4000, rng)
    assert (drawn.sum(axis=1) == n_firings).all()
    assert ((drawn >= 0) & (drawn <= n_rows[:, None])).all()
    shuffled = np.zeros((4000, 4, 5), np.int64)
    for draw in range(4000):
        order = rng.permutation(ranges)
        for k, n in enumerate(n_firings):
            shuffled[draw, :, k] = np.bincount(order[:n], minlength=4)
    np.testing.assert_allclose(drawn.mean(axis=0), shuffled.mean(axis=0), atol=0.3)
    np.testing.assert_allclose(drawn.std(axis=0), shuffled.std(axis=0), atol=0.15)
    ours, theirs = (np.sort(mutual_information(counts, n_rows), axis=0) for counts in (drawn, shuffled))
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), rtol=0.08, atol=1e-9)
    np.testing.assert_allclose(ours[3960], theirs[3960], rtol=0.2, atol=1e-9)


def test_one_feature_in_a_hundred_is_above_the_null_by_chance_and_planted_ones_are() -> None:
    rng = np.random.default_rng(2)
    n_rows = np.array([500, 700, 400])
    n_firings = rng.integers(20, 800, 3000)
    by_chance = drawn_firings(n_firings, n_rows, 1, rng)[0]
    found = feature_specificity(by_chance, n_rows)
    assert 0.004 < found.is_above.mean() < 0.016
    assert found.information.mean() == pytest.approx(found.null_mean.mean(), rel=0.05)
    assert abs(found.specialisation.mean()) < 1e-3
    planted = np.array([[200, 20], [100, 40], [100, 10]])
    assert feature_specificity(planted, n_rows).is_above.tolist() == [True, False]


def test_purity_is_1_of_one_token_and_0_of_a_mixture_like_the_text() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 100, 50)
    mixed = rng.choice(50, (200, N_TOP), p=counts / counts.sum())
    found = purity(np.concatenate([np.full((1, N_TOP), 7), mixed]), counts)
    assert found[0] == 1
    assert abs(found[1:].mean()) < 0.01
    assert np.isnan(purity(mixed * 0, np.array([5]))).all()


def test_specificity_of_features_that_fire_in_one_range_on_one_token() -> None:
    """Half the features: in one range, on token 1; the other half: anywhere, on tokens at random."""
    rng = np.random.default_rng(3)
    length, n_contexts, n = 8, 200, 40
    contexts, positions = np.divmod(np.arange(length * n_contexts), length)
    tokens = rng.integers(2, 40, len(positions), dtype=np.int32)
    tokens[rng.random(len(tokens)) < 0.3] = 1
    code = np.zeros((len(positions), n), np.float32)
    for k in range(n):
        fires = (positions < 4) & (tokens == 1) if k < n // 2 else rng.random(len(positions)) < 0.2
        code[fires & (rng.random(len(fires)) < 0.9), k] = 1 + rng.random()
    keeper = FeatureKeeper(n, length, (0, n_contexts), above=1e-3, device=torch.device("cpu"))
    keeper.add(torch.as_tensor(code), positions, contexts, tokens)
    found = specificity(keeper.sums(), [(0, 4), (4, 8)], np.bincount(tokens))
    assert found.ranges == ["0:4", "4:8"]
    assert found.above_null_share == pytest.approx(0.5, abs=0.05)
    assert found.above_null_share_turned is not None
    assert found.above_null_share_turned < 0.2
    assert sum(found.histogram.counts) == n
    assert found.curve.features == [4] * 10
    assert found.curve.specialisation[-1] == pytest.approx(1, abs=0.02)
    assert abs(found.curve.specialisation[0]) < 0.05
    assert found.curve.interpretability[-1] == pytest.approx(1)
    assert found.curve.interpretability[0] < 0.2
    assert found.curve.rank_correlation is not None
    assert found.curve.rank_correlation > 0.7


def test_of_features_that_never_fire_nothing_is_told() -> None:
    keeper = FeatureKeeper(3, LENGTH, (0, 2), above=1e-3, device=torch.device("cpu"))
    contexts, positions = np.divmod(np.arange(2 * LENGTH), LENGTH)
    keeper.add(torch.zeros(len(positions), 3), positions, contexts, np.ones(len(positions), np.int32))
    sums = keeper.sums()
    found = specificity(sums, [(0, 3), (3, 6)], np.array([0, 12]))
    assert (found.mean, found.above_null_share, found.curve.features) == (None, None, [])
    assert sums.position_features().features == 0
    assert clusters(sums.firings, sums.n_rows) is None


# Groups


def profiles(n_features: int, shape: str, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Firings of features in 64 positions, the first without rows."""
    rng = np.random.default_rng(seed)
    n_rows = np.full(64, 400)
    n_rows[0] = 0
    firings = np.zeros((64, n_features), np.int64)
    for k in range(n_features):
        rate = np.ones(64)
        if shape == "four":
            rate[16 * (k % 4) : 16 * (k % 4) + 16] += 2
        elif shape == "slope":
            rate = np.exp(rng.normal() * np.linspace(-1, 1, 64))
        share = rate * n_rows
        firings[:, k] = rng.multinomial(rng.integers(200, 2000), share / share.sum())
    return firings, n_rows


def test_four_planted_groups_are_found() -> None:
    found = clusters(*profiles(200, "four"))
    assert found is not None
    assert (found.best_n, found.sizes) == (4, [50] * 4)
    assert found.score > found.null_score + 0.2
    for group, profile in enumerate(found.profiles):
        highest = sorted(np.argsort(profile)[-4:].tolist())
        assert highest == list(range(4 * group, 4 * group + 4))
    assert found.spread is not None
    assert found.spread > 5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["flat", "slope"])
def test_without_groups_there_is_one(shape: str, seed: int) -> None:
    found = clusters(*profiles(200, shape, seed), seed)
    assert found is not None
    assert (found.best_n, found.sizes) == (1, [200])
    assert found.spread is not None
    if shape == "flat":
        assert found.spread == pytest.approx(1, abs=0.15)
    else:
        assert found.spread > 3


def test_groups_are_the_same_when_asked_again_and_too_few_features_tell_nothing() -> None:
    firings, n_rows = profiles(40, "four")
    assert clusters(firings, n_rows) == clusters(firings, n_rows)
    assert clusters(firings[:, :31], n_rows) is None
    assert clusters(firings // 50, n_rows) is None


# The base


def test_retention_by_hand() -> None:
    assert [n_retained(k) for k in (2, 8, 128, 4096)] == [1, 2, 32, 32]
    base = torch.tensor([[9.0, 8, 1, 0, 0, 0, 0, 0], [0, 0, 3, 0, 0, 0, 0, 0], [0] * 8])
    code = torch.tensor([[-9.0, 0, 0, 0, 0, 0, 0, 5], [1, 2, 0, 0, 0, 0, 0, 0], [1] * 8])
    # First: of {0, 1} only 0 is kept. Second: its one feature is not. Third: there is none to keep.
    assert retained(base, code) == (0.5, 2)
    assert retained(base, base) == (2, 2)


def test_drift_is_1_where_nothing_moved_whatever_the_scale(tmp_path: Path) -> None:
    decoder = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    assert drift(decoder * 7, decoder) == pytest.approx((1, 1))
    moved = decoder.clone()
    moved[:5] *= -1
    assert drift(moved, decoder) == pytest.approx((0, 0.5))
    assert base_decoder(tmp_path) is None
    path = tmp_path / "base_phase.safetensors"
    path.write_bytes(safetensors.save({"W_dec": decoder}))
    assert torch.equal(cast(torch.Tensor, base_decoder(tmp_path)), decoder)
    path.write_bytes(b"what is this")
    with pytest.raises(RunError, match="damaged"):
        base_decoder(tmp_path)
    with pytest.raises(RunError, match=r"\[3, 4\], and this run has one \[10, 4\]"):
        drift(decoder, decoder[:3])


# CE loss


def test_ce_loss_by_hand() -> None:
    """A vocabulary of two: what a token predicts is told by one number, its logit for token 1."""
    tokens = torch.tensor([[0, 1, 1], [0, 0, 1]])
    counted = torch.tensor([[False, True, True], [True, True, True]])

    def logits(replace: Any) -> torch.Tensor:
        one = torch.full((2, 3), 2.0)
        one = one if replace is None else replace(one)
        return torch.stack([torch.zeros(2, 3), one], dim=-1)

    keeper = CeKeeper(3)
    replacements: dict[str, Replace] = {
        "spliced": lambda x: x / 2,
        "zero": lambda x: x * 0,
        "mean": lambda x: x,
    }
    for row in range(2):

        def of_row(replace: Any, row: int = row) -> torch.Tensor:
            return logits(replace)[row : row + 1]

        keeper.add(tokens[row : row + 1], counted[row : row + 1], of_row, replacements)
    found = ce_loss(keeper.sums(), [(0, 1), (1, 2), (2, 3)], "made-up", 2)

    def ce(logit: float, target: int) -> float:
        return float(np.log1p(np.exp(logit)) - logit * target)

    # Counted: position 0 of the second context (next is 0), position 1 of both (next is 1).
    clean = (ce(2, 0) + 2 * ce(2, 1)) / 3
    spliced = (ce(1, 0) + 2 * ce(1, 1)) / 3
    p = 1 / (1 + np.exp(-2))
    q = 1 / (1 + np.exp(-1))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert found.n_rows == 3
    assert found.clean == pytest.approx(clean)
    assert found.mean == pytest.approx(clean)
    assert found.spliced == pytest.approx(spliced)
    assert found.zero == pytest.approx(np.log(2))
    assert found.recovered == pytest.approx((np.log(2) - spliced) / (np.log(2) - clean))
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.kl_by_range[:2] == pytest.approx([kl, kl], rel=1e-5)
    assert found.clean_by_range[:2] == pytest.approx([ce(2, 0), ce(2, 1)])
    assert np.isnan(cast(float, found.clean_by_range[2]))
