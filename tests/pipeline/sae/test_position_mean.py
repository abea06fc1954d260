"""What is taken off by position: the means that the store summed up, in each form."""

from typing import Any

import numpy as np
import pytest
import torch

from posae.pipeline.ranges import parse_ranges
from posae.pipeline.sae.position_mean import PositionMean
from posae.pipeline.sae.registry import new_autoencoder
from posae.pipeline.sae.topk import TopK
from posae.store.errors import SettingsError

LENGTH, D_MODEL = 16, 6
RANGES = parse_ranges("0:1,1:4,4:10,10:16", LENGTH)
DRAW = np.random.default_rng(0)
COUNTS = np.array([0, *DRAW.integers(5, 50, LENGTH - 1)])
MEANS = DRAW.normal(size=(LENGTH, 2)) @ DRAW.normal(size=(2, D_MODEL)) + 4  # of rank 2 around their mean
SUMS = MEANS * COUNTS[:, None]
OVERALL = SUMS.sum(axis=0) / COUNTS.sum()


def fitted(form: str) -> PositionMean:
    mean = PositionMean(form, RANGES, D_MODEL, torch.device("cpu"))
    mean.fit(SUMS, COUNTS)
    return mean


def rows_of(form: str) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return fitted(form).rows(torch.arange(LENGTH)).numpy()


def test_exact_is_each_positions_mean_and_that_of_all_where_there_is_none() -> None:
    np.testing.assert_allclose(rows_of("exact")[1:], MEANS[1:], rtol=1e-5)
    np.testing.assert_allclose(rows_of("exact")[0], OVERALL, rtol=1e-5)


def test_range_is_the_mean_of_a_ranges_rows() -> None:
    found = rows_of("range")
    for start, stop in RANGES[1:]:
        expected = SUMS[start:stop].sum(axis=0) / COUNTS[start:stop].sum()
        np.testing.assert_allclose(found[start:stop], np.tile(expected, (stop - start, 1)), rtol=1e-5)
    np.testing.assert_allclose(found[0], OVERALL, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_rank_is_the_best_of_its_rank(rank: int) -> None:
    found = rows_of(f"lowrank:{rank}")
    weights = np.sqrt(COUNTS / COUNTS.sum())[:, None]
    _, singular, _ = np.linalg.svd((MEANS - OVERALL) * weights)
    error = np.square((found - MEANS) * weights).sum()
    assert error == pytest.approx(np.square(singular[rank:]).sum(), rel=1e-5, abs=1e-9)
    assert np.linalg.matrix_rank((found - OVERALL)[1:], tol=1e-4) <= rank
    np.testing.assert_allclose(found[0], OVERALL, rtol=1e-4)


def test_numbers_are_counted() -> None:
    kept = {"none": 0, "range": 4 * D_MODEL, "exact": LENGTH * D_MODEL, "lowrank:3": 3 * (LENGTH + D_MODEL)}
    for form, expected in kept.items():
        extra = D_MODEL if form.startswith("lowrank") else 0
        assert fitted(form).n_numbers() == expected + extra


def test_a_store_without_rows_gives_zeros() -> None:
    for form in ("range", "exact", "lowrank:2"):
        mean = PositionMean(form, RANGES, D_MODEL, torch.device("cpu"))
        mean.fit(np.zeros((LENGTH, D_MODEL)), np.zeros(LENGTH, np.int64))
        assert not mean.rows(torch.arange(LENGTH)).any()


def test_an_autoencoder_that_takes_means_off_wants_positions() -> None:
    autoencoder = TopK(
        d_model=D_MODEL,
        dictionary_size=12,
        ranges=RANGES,
        generator=torch.Generator(),
        target_l0=2,
        position_mean="exact",
    )
    x = torch.zeros(3, D_MODEL)
    with pytest.raises(SettingsError, match="needs the position of each row"):
        autoencoder(x, [0, 3, 3, 3, 3])
    with pytest.raises(SettingsError, match="needs the position of each row"):
        autoencoder.decode(torch.zeros(3, 12))
    with pytest.raises(SettingsError, match="positions lie between 0 and 16"):
        autoencoder.decode(torch.zeros(3, 12), torch.tensor([0, 1, 16]))


def test_what_is_taken_off_is_added_back() -> None:
    autoencoder = TopK(
        d_model=D_MODEL,
        dictionary_size=12,
        ranges=RANGES,
        generator=torch.Generator().manual_seed(0),
        target_l0=2,
        activation_scale=0.3,
        position_mean="exact",
    ).eval()
    autoencoder.fit_means(SUMS, COUNTS)
    positions = torch.arange(1, LENGTH)
    x = torch.as_tensor(MEANS[1:], dtype=torch.float32)
    assert autoencoder.encode(x, positions).abs().max() < 1e-5
    torch.testing.assert_close(autoencoder.decode(torch.zeros(LENGTH - 1, 12), positions), x)


def test_means_are_not_rounded_where_products_are() -> None:
    mean = fitted("lowrank:2")
    mean.table += 3000.0
    with torch.autocast("cpu", torch.bfloat16):
        found = mean.rows(torch.arange(LENGTH))
    assert torch.equal(found, mean.rows(torch.arange(LENGTH)))


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_a_large_mean_costs_no_digits_where_products_are_rounded(architecture: str) -> None:
    own: dict[str, Any] = {"target_l0": 3} if architecture == "topk" else {"l1_coefficient": 0.1}
    common: dict[str, Any] = {"d_model": D_MODEL, "dictionary_size": 24, "ranges": RANGES}
    autoencoder = new_autoencoder(architecture, **common, generator=torch.Generator().manual_seed(0), **own)
    x = torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(1))
    offsets = [0, 64, 64, 64, 64]
    wanted = autoencoder(x, offsets).code
    with torch.no_grad():
        dict(autoencoder.named_parameters())["b_dec"].add_(1000.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = autoencoder(x + 1000.0, offsets).code.float()
    # Rounding can change which are the largest of a few rows.
    assert torch.isclose(found, wanted, rtol=0.02, atol=0.02).all(dim=1).float().mean() > 0.9
