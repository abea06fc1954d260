"""TopK and BatchTopK: exactly so many active, the same for a token alone, and dead features come back."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posae.pipeline.ranges import equal_ranges
from posae.pipeline.sae.topk import BatchTopK, TopK
from posae.store.errors import SettingsError

D_MODEL, DICTIONARY_SIZE, L0 = 8, 24, 3
RANGES = equal_ranges(16, 4)


def settings(seed: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "d_model": D_MODEL,
        "dictionary_size": DICTIONARY_SIZE,
        "ranges": RANGES,
        "generator": torch.Generator().manual_seed(seed),
        "target_l0": L0,
    } | more


def rows(n_rows: int = 40, seed: int = 1) -> Tensor:
    return 3 * torch.randn(n_rows, D_MODEL, generator=torch.Generator().manual_seed(seed))


def activations(autoencoder: TopK, x: Tensor) -> np.ndarray[Any, Any]:
    w = {name: weight.double().numpy() for name, weight in autoencoder.state_dict().items()}
    return np.maximum((x.double().numpy() - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)


def test_topk_keeps_the_largest_of_each_token() -> None:
    autoencoder, x = TopK(**settings()), rows()
    output = autoencoder(x, [0, 40, 40, 40, 40])
    all_of_them = activations(autoencoder, x)
    for found, before in zip(output.code.detach().numpy(), all_of_them, strict=True):
        kept = np.argsort(-before)[:L0]
        expected = np.zeros(DICTIONARY_SIZE)
        expected[kept] = before[kept]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    decoded = output.code @ autoencoder.W_dec + autoencoder.b_dec
    torch.testing.assert_close(output.reconstruction, decoded)
    assert output.losses.total == output.losses.reconstruction
    assert output.losses.reconstruction.item() == pytest.approx((x - decoded).square().sum().item() / 40)


def test_batchtopk_keeps_the_largest_of_the_batch() -> None:
    autoencoder, x = BatchTopK(**settings()), rows()
    code = autoencoder(x, [0, 40, 40, 40, 40]).code.detach().numpy()
    before = activations(autoencoder, x)
    least = np.sort(before, axis=None)[-40 * L0]
    np.testing.assert_allclose(code, np.where(before >= least - 1e-9, before, 0), rtol=1e-5, atol=1e-6)
    assert (code > 0).sum() == 40 * L0
    assert len(set((code > 0).sum(axis=1))) > 1, "each token has as many"
    assert autoencoder.threshold.item() == pytest.approx(least, rel=1e-5)


def test_of_equal_activations_as_many_are_kept_as_are_wanted() -> None:
    autoencoder, x = BatchTopK(**settings()), rows(200)
    with torch.autocast("cpu", torch.bfloat16):
        code = autoencoder(x, [0, 200, 200, 200, 200]).code
    assert (code > 0).sum() == 200 * L0


def test_outside_of_training_a_code_does_not_depend_on_its_neighbours() -> None:
    autoencoder = BatchTopK(**settings())
    for seed in range(300):
        autoencoder(rows(64, seed), [0, 64, 64, 64, 64])
    autoencoder.eval()
    x = rows(2000, 999)
    together = autoencoder(x, [0, 2000, 2000, 2000, 2000]).code
    alone = torch.cat([autoencoder(row[None], [0, 1, 1, 1, 1]).code for row in x[:50]])
    torch.testing.assert_close(together[:50], alone)
    assert (together > 0).sum(dim=1).float().mean().item() == pytest.approx(L0, rel=0.1)


def test_a_batch_with_too_few_active_keeps_those() -> None:
    autoencoder = BatchTopK(**settings())
    with torch.no_grad():
        autoencoder.b_enc.fill_(-1e3)
        autoencoder.b_enc[3] = 1e3
    code = autoencoder(rows(), [0, 40, 40, 40, 40]).code
    assert ((code > 0).sum(dim=1) == 1).all()
    assert autoencoder.threshold.item() == 0


@pytest.mark.parametrize("kind", [TopK, BatchTopK])
def test_dead_features_learn_what_is_left_over_and_others_do_not(kind: type[TopK]) -> None:
    autoencoder = kind(**settings())
    x = rows()
    autoencoder.dead = torch.tensor([4, 7])
    with torch.no_grad():
        autoencoder.b_enc[[4, 7]] = -2.0  # too little to be among the largest, at times above 0
        autoencoder.W_enc[:, [4, 7]] *= 0.7
    output = autoencoder(x, [0, 40, 40, 40, 40])
    assert output.losses.auxiliary > 0
    torch.autograd.backward(output.losses.auxiliary)
    assert autoencoder.W_dec.grad is not None
    moved = autoencoder.W_dec.grad.abs().sum(dim=1) > 0
    assert moved[[4, 7]].all()
    assert moved.sum() == 2
    residual = (x - output.reconstruction).detach().double().numpy()
    w_dec = autoencoder.W_dec.detach().double().numpy()
    used = np.where(np.isin(np.arange(DICTIONARY_SIZE), [4, 7]), activations(autoencoder, x), 0)
    error = np.square(residual - used @ w_dec).sum() / len(x)
    share = 2 / (D_MODEL // 2)
    assert output.losses.auxiliary.item() == pytest.approx(share / 32 * error, rel=1e-4)
    assert autoencoder.eval()(x, [0, 40, 40, 40, 40]).losses.auxiliary == 0


def test_without_dead_features_there_is_no_auxiliary_loss() -> None:
    assert TopK(**settings())(rows(), [0, 40, 40, 40, 40]).losses.auxiliary == 0


def test_the_decoders_bias_begins_as_the_mean_unless_that_is_taken_off_by_position() -> None:
    sums, counts = np.arange(16.0 * D_MODEL).reshape(16, D_MODEL), np.full(16, 2)
    mean = sums.sum(axis=0) / 32
    plain = TopK(**settings(activation_scale=0.5))
    plain.fit_means(sums, counts)
    np.testing.assert_allclose(plain.b_dec.detach().numpy(), 0.5 * mean, rtol=1e-6)
    by_position = TopK(**settings(position_mean="exact"))
    by_position.fit_means(sums, counts)
    assert not by_position.b_dec.any()


@pytest.mark.parametrize("change", [{"target_l0": 0}, {"target_l0": 25}, {"auxiliary_coefficient": -1.0}])
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="it must be"):
        BatchTopK(**settings(**change))
