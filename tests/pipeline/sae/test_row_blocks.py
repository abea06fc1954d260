"""The paper's adapters by blocks of rows: the same numbers and gradients as by plain formulas."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from posae.pipeline.ranges import equal_ranges
from posae.pipeline.sae import row_blocks
from posae.pipeline.sae.hierarchical import Hierarchical, dropout_mask

D_MODEL, SIZE, DROPOUT, L1 = 6, 12, 0.25, 0.1
OFFSETS = [0, 3, 3, 15, 20]
"""Of four ranges, one without rows and two of more rows than a block."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "_BLOCK", 4 * SIZE)


def hierarchical(*, alpha: float = 0.6, **settings: Any) -> Hierarchical:
    autoencoder = Hierarchical(
        d_model=D_MODEL,
        dictionary_size=SIZE,
        ranges=equal_ranges(16, 4),
        generator=torch.Generator().manual_seed(0),
        l1_coefficient=L1,
        adapter_width=3,
        dropout=DROPOUT,
        **settings,
    ).double()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in autoencoder.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=draw)
    autoencoder.alpha = alpha
    return autoencoder


def rows() -> Tensor:
    return 2 * torch.randn(OFFSETS[-1], D_MODEL, generator=torch.Generator().manual_seed(1)).double()


def loss_by_formulas(autoencoder: Hierarchical, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 2, 3 and 5, by what autograd knows: h_r, and the loss."""
    w, alpha = dict(autoencoder.named_parameters()), autoencoder.alpha

    def norm(name: str, z: Tensor) -> Tensor:
        return functional.layer_norm(z, (SIZE,), w[f"{name}.weight"], w[f"{name}.bias"])

    base = torch.relu(norm("norm", x @ w["W_enc"] + w["b_enc"]))
    offsets = [0, len(x)] if autoencoder.shared_adapters else OFFSETS
    outputs: list[Tensor] = []
    for a, (start, stop) in enumerate(pairwise(offsets)):
        hidden = torch.relu(base[start:stop] @ w[f"adapters.{a}.W_in"] + w[f"adapters.{a}.b_in"])
        outputs.append(
            norm(f"adapters.{a}.norm", hidden @ w[f"adapters.{a}.W_out"] + w[f"adapters.{a}.b_out"])
        )
    code = base + alpha * torch.cat(outputs) * mask
    penalty = base.abs().sum() + alpha * (code - base).abs().sum()
    return code, ((x - code @ w["W_dec"]).square().sum() + L1 * penalty) / len(x)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_code_loss_and_gradients_are_those_of_the_formulas(
    alpha: float, is_training: bool, is_shared: bool
) -> None:
    autoencoder = hierarchical(alpha=alpha, shared_adapters=is_shared).train(is_training)
    same, mask = torch.Generator(), torch.ones((), dtype=torch.float64)
    same.set_state(autoencoder.generator.get_state())
    if is_training:
        mask = dropout_mask((OFFSETS[-1], SIZE), DROPOUT, same).double() / (1 - DROPOUT)
    code, loss = loss_by_formulas(autoencoder, rows(), mask)
    weights = list(autoencoder.parameters())
    expected = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)

    output = autoencoder(rows(), OFFSETS)
    found = torch.autograd.grad(output.losses.total, weights, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(output.code, code)
    torch.testing.assert_close(output.losses.total, loss)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_what_is_seldom_asked_for() -> None:
    # The base code alone, the code alone, and the same graph a second time.
    autoencoder = hierarchical().eval()
    w = autoencoder.W_enc
    code, _ = loss_by_formulas(autoencoder, rows(), torch.ones((), dtype=torch.float64))
    output = autoencoder(rows(), OFFSETS)
    for _ in range(2):
        (found,) = torch.autograd.grad(output.code.square().sum(), w, retain_graph=True)
        (expected,) = torch.autograd.grad(code.square().sum(), w, retain_graph=True)
        torch.testing.assert_close(found, expected)
    autoencoder.alpha = 0.0
    code, _ = loss_by_formulas(autoencoder, rows(), torch.ones((), dtype=torch.float64))
    assert output.base_code is not None
    (found,) = torch.autograd.grad(output.base_code.square().sum(), w)
    torch.testing.assert_close(found, torch.autograd.grad(code.square().sum(), w)[0])


def test_a_silent_adapter_learns_its_gain() -> None:
    # With a gain of 0, as paper-15pct begins, no trace of the gain is in what comes out.
    autoencoder = hierarchical().eval()
    with torch.no_grad():
        for name, weight in autoencoder.adapters.named_parameters():
            if "norm" in name:
                weight.zero_()
    output = autoencoder(rows(), OFFSETS)
    _, loss = loss_by_formulas(autoencoder, rows(), torch.ones((), dtype=torch.float64))
    gains = [w for name, w in autoencoder.adapters.named_parameters() if name.endswith("norm.weight")]
    expected = torch.autograd.grad(loss, gains)
    for one, other in zip(torch.autograd.grad(output.losses.total, gains), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert expected[0].abs().min() > 0


def test_under_autocast_plain_operations_are_used() -> None:
    autoencoder = hierarchical().float().eval()
    exact = autoencoder(rows().float(), OFFSETS)
    with torch.autocast("cpu", torch.bfloat16):
        output = autoencoder(rows().float(), OFFSETS)
    torch.autograd.backward(output.losses.total)
    assert all(weight.grad is not None for weight in autoencoder.parameters())
    torch.testing.assert_close(output.losses.total, exact.losses.total, rtol=0.05, atol=0)
