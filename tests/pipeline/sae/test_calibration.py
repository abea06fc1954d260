"""The threshold of BatchTopK is put where L0 over the rows given is the target, exactly."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posae.pipeline.ranges import PositionRange
from posae.pipeline.sae.calibration import calibrate_threshold
from posae.pipeline.sae.topk import BatchTopK

RANGES = (PositionRange(0, 4), PositionRange(4, 8))


def autoencoder(target_l0: int, seed: int = 0) -> BatchTopK:
    generator = torch.Generator().manual_seed(seed)
    return BatchTopK(
        target_l0=target_l0, d_model=6, dictionary_size=24, ranges=RANGES, generator=generator
    ).eval()


def batch(x: Tensor) -> tuple[Tensor, list[int], Tensor]:
    return x, [0, len(x), len(x)], torch.zeros(len(x), dtype=torch.int64)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), target=st.integers(1, 9), cuts=st.lists(st.integers(1, 63), max_size=4))
def test_l0_is_the_target_however_rows_are_cut_into_batches(seed: int, target: int, cuts: list[int]) -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
    x[32:] *= 0.1  # later rows have no part in the largest of all
    sae = autoencoder(target, seed)
    edges = [0, *sorted(set(cuts)), 64]
    found = calibrate_threshold(sae, (batch(x[a:b]) for a, b in pairwise(edges)), 64)
    code = sae.encode(x, torch.zeros(64, dtype=torch.int64))
    assert int((code != 0).sum()) == 64 * target
    assert found == pytest.approx(calibrate_threshold(sae, [batch(x)], 64))


def test_where_fewer_activations_are_above_0_all_are_kept() -> None:
    sae = autoencoder(24)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    assert calibrate_threshold(sae, [batch(x)], 8) == 0
    code = sae.encode(x, torch.zeros(8, dtype=torch.int64))
    assert torch.equal(code, torch.addmm(sae.b_enc, x - sae.b_dec, sae.W_enc).relu())


def test_rows_past_the_most_are_not_read_and_the_mode_stays() -> None:
    sae = autoencoder(2).train()
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(4))
    once = calibrate_threshold(sae, [batch(x[:16])], 16)
    assert calibrate_threshold(sae, [batch(x[:16]), batch(x[16:])], 20) == once
    assert sae.training
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate_threshold(sae, [batch(x)], 8)
