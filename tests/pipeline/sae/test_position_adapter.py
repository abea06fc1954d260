"""Position adapters: what each does to a row, that alpha brings them in, and what sharing takes from them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posae.pipeline.ranges import parse_ranges, range_of_position
from posae.pipeline.sae.autoencoder import Autoencoder
from posae.pipeline.sae.registry import ARCHITECTURES, new_autoencoder
from posae.store.errors import SettingsError

D_MODEL, SIZE, LENGTH, SCALE, ALPHA = 6, 10, 16, 0.5, 0.7
RANGES = parse_ranges("0:1,1:4,4:10,10:16", LENGTH)
OWN: dict[str, dict[str, Any]] = {
    "hierarchical": {"l1_coefficient": 0.04, "adapter_width": 3},
    "standard": {"l1_coefficient": 0.04},
    "topk": {"target_l0": 4},
    "batchtopk": {"target_l0": 4},
    "jumprelu": {"target_l0": 4},
    "masked": {"l1_coefficient": 0.04},
    "separate": {"l1_coefficient": 0.04},
}
FORMS = ("bias", "gate", "table", "decoder:2")
each_form = pytest.mark.parametrize("form", [*FORMS, "bias+gate+table+decoder:3"])


def made(architecture: str = "standard", form: str = "none", **more: Any) -> Autoencoder:
    """One whose weights are far from their first values."""
    draw = torch.Generator().manual_seed(3)
    autoencoder = new_autoencoder(
        architecture,
        d_model=D_MODEL,
        dictionary_size=SIZE,
        ranges=RANGES,
        generator=torch.Generator().manual_seed(0),
        activation_scale=SCALE,
        position_adapter=form,
        **OWN[architecture] | more,
    )
    with torch.no_grad():
        for weight in autoencoder.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=draw)
    autoencoder.alpha = ALPHA
    return autoencoder.eval()


def batch(n_rows: int = 31) -> tuple[Tensor, Tensor, list[int]]:
    draw = torch.Generator().manual_seed(2)
    positions = torch.randint(0, LENGTH, (n_rows,), generator=draw).sort().values
    range_of_row = torch.tensor(range_of_position(RANGES))[positions]
    offsets = torch.searchsorted(range_of_row, torch.arange(len(RANGES) + 1))
    return 4 * torch.randn(n_rows, D_MODEL, generator=draw), positions, [int(o) for o in offsets]


@each_form
def test_a_row_is_adapted_as_said(form: str) -> None:
    autoencoder = made(form=form)
    x, positions, offsets = batch()
    output = autoencoder(x, offsets, positions)
    w = {name: value.double().numpy() for name, value in autoencoder.state_dict().items()}
    a = {name.removeprefix("position_adapter."): value for name, value in w.items()}
    found = zip(x.double().numpy(), positions, output.code, output.reconstruction, strict=True)
    for row, place, code, decoded in found:
        position = int(place)
        r = range_of_position(RANGES)[position]
        table = ALPHA * a["table"][position] if "table" in form else 0
        before = (SCALE * row - table - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        if "gate" in form:
            before = before * (1 + ALPHA * a["gate"][r])
        if "bias" in form:
            before = before + ALPHA * a["bias"][r]
        expected = np.maximum(before, 0)
        directions = w["W_dec"]
        if "decoder" in form:
            directions = directions + ALPHA * a["decoder_in"][r] @ a["decoder_out"][r]
        np.testing.assert_allclose(code.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            decoded.detach().numpy(),
            (expected @ directions + w["b_dec"] + table) / SCALE,
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@each_form
def test_without_alpha_nothing_changes_and_nothing_is_learned(architecture: str, form: str) -> None:
    autoencoder, plain = made(architecture, form), made(architecture)
    plain.load_state_dict(autoencoder.state_dict(), strict=False)
    autoencoder.alpha = plain.alpha = 0.0
    x, positions, offsets = batch()
    output = autoencoder(x, offsets, positions)
    assert torch.equal(output.reconstruction, plain(x, offsets, positions).reconstruction)
    torch.autograd.backward(output.losses.total)
    assert all(weight.grad is None for weight in autoencoder.position_adapter.parameters())
    autoencoder.alpha = ALPHA
    torch.autograd.backward(autoencoder(x, offsets, positions).losses.total)
    assert all(weight.grad is not None for weight in autoencoder.position_adapter.parameters())


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@each_form
def test_adapters_begin_without_effect(architecture: str, form: str) -> None:
    def first(form: str) -> Autoencoder:
        own = OWN[architecture]
        generator = torch.Generator().manual_seed(0)
        size = {"d_model": D_MODEL, "dictionary_size": SIZE, "ranges": RANGES, "generator": generator}
        return new_autoencoder(architecture, **size, **own, position_adapter=form).eval()

    adapted, plain = first(form), first("none")
    adapted.alpha = plain.alpha = 1.0
    x, positions, offsets = batch()
    assert torch.equal(
        adapted(x, offsets, positions).reconstruction, plain(x, offsets, positions).reconstruction
    )


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {"batchtopk"}))
@each_form
def test_shared_adapters_cannot_know_the_position(architecture: str, form: str) -> None:
    autoencoder = made(architecture, form, shared_adapters=True)
    x, _, _ = batch()
    rows = x[:1].expand(LENGTH, -1)
    positions = torch.arange(LENGTH)
    code = autoencoder.encode(rows, positions)
    torch.testing.assert_close(code, code[:1].expand(LENGTH, -1))
    decoded = autoencoder.decode(code, positions)
    torch.testing.assert_close(decoded, decoded[:1].expand(LENGTH, -1))
    assert autoencoder.n_parameters() < made(architecture, form).n_parameters()


@each_form
def test_numbers_are_counted_and_called_overhead(form: str) -> None:
    adapted, plain = made(form=form), made()
    sizes = {
        "bias": 4 * SIZE,
        "gate": 4 * SIZE,
        "table": LENGTH * D_MODEL,
        "decoder:2": 4 * 2 * (SIZE + D_MODEL),
        "decoder:3": 4 * 3 * (SIZE + D_MODEL),
    }
    added = sum(sizes[part] for part in form.split("+"))
    assert adapted.n_parameters() - plain.n_parameters() == added
    assert adapted.base_parameters() == plain.n_parameters()


def test_decoding_by_range_wants_positions() -> None:
    autoencoder = made(form="decoder:2")
    code = torch.ones(3, SIZE)
    with pytest.raises(SettingsError, match="needs the position of each row"):
        autoencoder.decode(code)
    with pytest.raises(SettingsError, match="needs the position of each row"):
        made(form="table").decode(code)
    with pytest.raises(SettingsError, match="needs the position of each row"):
        made("masked")(torch.ones(3, D_MODEL), [0, 3, 3, 3, 3])
    made(form="bias").decode(code)
