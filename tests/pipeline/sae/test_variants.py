"""What the paper left open or called failed: each variant does what its setting says, and nothing else."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from posae.pipeline.ranges import equal_ranges
from posae.pipeline.sae.hierarchical import Hierarchical
from posae.pipeline.sae.jumprelu import JumpReLU
from posae.pipeline.sae.masked import Masked
from posae.pipeline.sae.separate import Separate
from posae.pipeline.sae.standard import Standard
from posae.store.errors import SettingsError

D_MODEL, SIZE, LENGTH = 6, 12, 16
RANGES = equal_ranges(LENGTH, 4)
OFFSETS = [0, 4, 8, 12, 16]
POSITIONS = torch.arange(LENGTH)


def common(**more: Any) -> dict[str, Any]:
    return {
        "d_model": D_MODEL,
        "dictionary_size": SIZE,
        "ranges": RANGES,
        "generator": torch.Generator().manual_seed(0),
    } | more


def rows(seed: int = 1) -> Tensor:
    return 2 * torch.randn(LENGTH, D_MODEL, generator=torch.Generator().manual_seed(seed))


def hierarchical(**more: Any) -> Hierarchical:
    autoencoder = Hierarchical(**common(l1_coefficient=0.1, adapter_width=3) | more)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in autoencoder.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=draw)
    autoencoder.alpha = 0.6
    return autoencoder.eval()


def parts(autoencoder: Hierarchical, **inner: Any) -> tuple[Tensor, Tensor]:
    """h_b, and the adapters' output, by plain formulas."""
    w = dict(autoencoder.named_parameters())

    def norm(name: str, z: Tensor) -> Tensor:
        return functional.layer_norm(z, (SIZE,), w.get(f"{name}.weight"), w.get(f"{name}.bias"))

    x = rows() - w.get("b_dec", 0)
    before = x @ w["W_enc"] + w["b_enc"]
    has_norm = autoencoder.layer_norm
    base = torch.relu(norm("norm", before) if has_norm in ("both", "base") else before)
    outputs: list[Tensor] = []
    for r in range(4):
        a = f"adapters.{r}."
        part = base[4 * r : 4 * r + 4]
        if autoencoder.adapter_norm == "before":
            part = norm(a + "norm", part)
        out = torch.relu(part @ w[a + "W_in"] + w[a + "b_in"]) @ w[a + "W_out"] + w[a + "b_out"]
        if autoencoder.adapter_norm == "after" and has_norm in ("both", "adapter"):
            out = norm(a + "norm", out)
        outputs.append(out)
    return base, torch.cat(outputs)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layer_norm": "none"},
        {"layer_norm": "base"},
        {"layer_norm": "adapter"},
        {"layer_norm_affine": False},
        {"adapter_norm": "before"},
        {"residual": False},
        {"rectify": True},
        {"decoder_bias": True},
    ],
    ids=str,
)
def test_the_code_of_each_reading(change: dict[str, Any]) -> None:
    autoencoder = hierarchical(**change)
    base, adaptation = parts(autoencoder)
    expected = base * (1.0 if autoencoder.residual else 0.4) + 0.6 * adaptation
    if autoencoder.rectify:
        expected = torch.relu(expected)
    output = autoencoder(rows(), OFFSETS)
    torch.testing.assert_close(output.code, expected)
    bias = autoencoder.b_dec if autoencoder.b_dec is not None else 0
    torch.testing.assert_close(output.reconstruction, expected @ autoencoder.W_dec + bias)


@pytest.mark.parametrize("penalty", ["text", "code", "base"])
def test_what_lambda_is_put_on(penalty: str) -> None:
    autoencoder = hierarchical(penalty=penalty)
    output = autoencoder(rows(), OFFSETS)
    assert output.base_code is not None
    h_b, h_r = output.base_code.abs().sum(), output.code.abs().sum()
    change = (output.code - output.base_code).abs().sum()
    wanted = {"text": h_b + 0.6 * change, "code": h_r, "base": h_b}[penalty]
    torch.testing.assert_close(output.losses.sparsity, 0.1 * wanted / LENGTH)


def test_losses_of_reconstruction() -> None:
    x = rows()
    squared = hierarchical()(x, OFFSETS)
    errors = (x - squared.reconstruction).square().sum(1)
    torch.testing.assert_close(squared.losses.reconstruction, errors.mean())
    norm = hierarchical(reconstruction_loss="norm")(x, OFFSETS)
    torch.testing.assert_close(norm.losses.reconstruction, errors.sqrt().mean())
    both = hierarchical(base_loss_coefficient=0.5)
    output = both(x, OFFSETS)
    assert output.base_code is not None
    of_base = (x - both.decode(output.base_code)).square().sum(1).mean()
    torch.testing.assert_close(output.losses.reconstruction, errors.mean() + 0.5 * of_base)


def test_the_norm_of_no_error_has_no_gradient() -> None:
    autoencoder = Standard(**common(l1_coefficient=0.1, reconstruction_loss="norm"))
    torch.autograd.backward(autoencoder(torch.zeros(LENGTH, D_MODEL), OFFSETS).losses.total)
    for weight in autoencoder.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()


@pytest.mark.parametrize("axis", [0, 1])
def test_the_axis_of_the_decoders_norm(axis: int) -> None:
    autoencoder = hierarchical(decoder_norm="outputs" if axis == 0 else "features")
    autoencoder.normalise_decoder()
    norms = autoencoder.W_dec.square().sum(axis)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    torch.autograd.backward(autoencoder(rows(), OFFSETS).losses.total)
    autoencoder.project_gradient()
    gradient = autoencoder.W_dec.grad
    assert gradient is not None
    assert gradient.abs().max() > 1e-3
    along = (gradient * autoencoder.W_dec).sum(axis)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-5, rtol=0)


def test_a_hard_mask_gives_each_range_its_own_features() -> None:
    autoencoder = Masked(**common(l1_coefficient=0.0, mask="hard"))
    plain = Standard(**common(l1_coefficient=0.0))
    code, whole = (a(rows(), OFFSETS, POSITIONS).code.detach() for a in (autoencoder, plain))
    for position in range(LENGTH):
        own = slice(3 * (position // 4), 3 * (position // 4) + 3)
        expected = torch.zeros(SIZE)
        expected[own] = whole[position, own]
        assert torch.equal(code[position], expected)


def test_a_gaussian_mask_falls_off_with_the_distance() -> None:
    autoencoder = Masked(**common(l1_coefficient=0.0, mask="gaussian"))
    plain = Standard(**common(l1_coefficient=0.0))
    code, whole = (a(rows(), OFFSETS, POSITIONS).code for a in (autoencoder, plain))
    centres = (np.arange(SIZE) + 0.5) * LENGTH / SIZE
    distance = np.arange(LENGTH)[:, None] - centres
    mask = np.exp(-(distance**2) / (2 * (LENGTH / 8) ** 2))
    torch.testing.assert_close(code, whole * torch.as_tensor(mask).float())


def test_a_scheduled_mask_comes_in_with_alpha() -> None:
    autoencoder = Masked(**common(l1_coefficient=0.0, mask_schedule="curriculum"))
    fixed = Masked(**common(l1_coefficient=0.0))
    plain = Standard(**common(l1_coefficient=0.0))
    x = rows()
    for alpha in (0.0, 0.25, 1.0):
        autoencoder.alpha = fixed.alpha = alpha
        code, masked, whole = (a(x, OFFSETS, POSITIONS).code for a in (autoencoder, fixed, plain))
        torch.testing.assert_close(code, (1 - alpha) * whole + alpha * masked)
    with pytest.raises(SettingsError, match="at least a feature for each range"):
        Masked(**common(l1_coefficient=0.0, dictionary_size=3))


def test_each_range_has_its_own_encoder() -> None:
    autoencoder = Separate(**common(l1_coefficient=0.0))
    assert torch.equal(autoencoder.W_enc[2], autoencoder.W_dec.T)
    with torch.no_grad():
        autoencoder.W_enc[2] *= -1
    x = rows()
    plain = Standard(**common(l1_coefficient=0.0))
    code = autoencoder(x, OFFSETS).code
    expected = plain(x, OFFSETS).code.detach().clone()
    expected[8:12] = torch.relu(-x[8:12] @ plain.W_enc)
    torch.testing.assert_close(code, expected)
    assert autoencoder.base_parameters() == plain.n_parameters()
    shared = Separate(**common(l1_coefficient=0.0, shared_adapters=True))
    assert shared.n_parameters() == plain.n_parameters()


def test_jumprelu_keeps_what_lies_above_its_threshold() -> None:
    autoencoder = JumpReLU(**common(target_l0=3))
    with torch.no_grad():
        autoencoder.threshold.copy_(torch.linspace(0.1, 3, SIZE) / D_MODEL**0.5)
    output = autoencoder(rows(), OFFSETS)
    before = torch.relu(rows() @ autoencoder.W_enc)
    torch.testing.assert_close(output.code, torch.where(before > torch.linspace(0.1, 3, SIZE), before, 0))
    l0 = (output.code != 0).sum() / LENGTH
    torch.testing.assert_close(output.losses.sparsity, D_MODEL * (l0 / 3 - 1).square())


def test_the_gradient_of_a_threshold_is_that_of_a_widened_step() -> None:
    width = 0.5
    autoencoder = JumpReLU(**common(target_l0=3, bandwidth=width / D_MODEL**0.5, l0_coefficient=0.7))
    with torch.no_grad():
        autoencoder.threshold.fill_(0.8 / D_MODEL**0.5)
    x = rows()
    output = autoencoder(x, OFFSETS)
    torch.autograd.backward(output.losses.sparsity)
    before = torch.relu(x @ autoencoder.W_enc)
    n_near = ((before - 0.8).abs() < width / 2).sum(0)
    l0 = (before > 0.8).sum() / LENGTH
    outer = 0.7 * D_MODEL * 2 * (l0 / 3 - 1) / 3
    gradient = autoencoder.threshold.grad
    assert gradient is not None
    torch.testing.assert_close(gradient, -outer * D_MODEL**0.5 * n_near / width / LENGTH)
    assert n_near.sum() > 5


def test_jumprelu_is_pulled_to_its_target() -> None:
    autoencoder = JumpReLU(**common(target_l0=2, bandwidth=0.2))
    optimiser: Any = torch.optim.Adam(autoencoder.parameters(), lr=3e-2)
    x = rows()
    for _ in range(800):
        optimiser.zero_grad()
        torch.autograd.backward(autoencoder(x, OFFSETS).losses.total)
        optimiser.step()
        autoencoder.normalise_decoder()
    l0 = (autoencoder(x, OFFSETS).code != 0).sum().item() / LENGTH
    assert l0 == pytest.approx(2, abs=0.3)
