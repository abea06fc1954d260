"""Lists of active features: the same codes, reconstructions and gradients as the dense products."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posae.pipeline.ranges import equal_ranges
from posae.pipeline.sae.autoencoder import Output
from posae.pipeline.sae.registry import new_autoencoder
from posae.pipeline.sae.sparse import Places, SparseCode, encoded, split
from posae.pipeline.sae.topk import TopK

RANGES = equal_ranges(8, 2)


@st.composite
def codes(draw: st.DrawFn) -> tuple[torch.Tensor, SparseCode]:
    """A dense code, and the list of what is not 0 in it; rows and features without any included."""
    n_rows, n_features = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dense = rng.random((n_rows, n_features)) * (rng.random((n_rows, n_features)) < draw(st.floats(0, 1)))
    places = np.flatnonzero(dense)
    offsets = np.searchsorted(places, np.arange(n_rows + 1) * n_features)
    values = torch.tensor(dense.reshape(-1)[places], dtype=torch.float32)
    found = SparseCode(values, Places(torch.tensor(places % n_features), torch.tensor(offsets), n_features))
    return torch.tensor(dense, dtype=torch.float32), found


@settings(max_examples=60, deadline=None)
@given(codes(), st.integers(1, 7), st.integers(0, 9))
def test_a_list_is_its_dense_code(made: tuple[torch.Tensor, SparseCode], width: int, cut: int) -> None:
    dense, code = made
    assert torch.equal(code.dense(), dense)
    assert torch.equal(code.fired(), (dense != 0).any(0))
    cut = min(cut, len(dense))
    parts = zip(split(code, [cut, len(dense) - cut]), split(dense, [cut, len(dense) - cut]), strict=True)
    for part, rows in parts:
        assert isinstance(part, SparseCode)
        assert isinstance(rows, torch.Tensor)
        assert torch.equal(part.dense(), rows)
    directions = torch.randn(code.places.n_features, width, requires_grad=True)
    code.values.requires_grad_()
    weights = torch.randn(len(dense), width)
    ((code @ directions) * weights).sum().backward()  # pyright: ignore[reportUnknownMemberType]
    assert directions.grad is not None
    assert code.values.grad is not None
    torch.testing.assert_close(code @ directions, dense @ directions)
    torch.testing.assert_close(directions.grad, dense.T @ weights)
    torch.testing.assert_close(
        code.values.grad, (weights @ directions.T).detach()[code.places.rows, code.places.features]
    )


def test_encoding_rectifies_and_has_the_gradient_of_what_was_chosen() -> None:
    x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(5, 9, requires_grad=True)
    bias = torch.randn(9, requires_grad=True)
    chosen = torch.rand(6, 9) < 0.4  # some of them below 0
    code = encoded(x, weight, bias, lambda _: chosen.flatten().nonzero()[:, 0])
    expected = torch.where(chosen, torch.addmm(bias, x, weight).relu(), 0)
    torch.testing.assert_close(code.dense(), expected)
    by = torch.randn(6, 9)
    (code.dense() * by).sum().backward()  # pyright: ignore[reportUnknownMemberType]
    found = [wanted.grad for wanted in (x, weight, bias)]
    for one, other in zip(found, torch.autograd.grad((expected * by).sum(), [x, weight, bias]), strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_of_a_step_waits_for_the_garbage_collector() -> None:
    x, weight = torch.randn(6, 5), torch.randn(5, 9, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        code = encoded(
            x, weight, torch.zeros(9), lambda activations: (activations > 0).flatten().nonzero()[:, 0]
        )
        (code @ torch.randn(9, 5)).sum().backward()  # pyright: ignore[reportUnknownMemberType]
        left = [weakref.ref(code.values), weakref.ref(code.places)]
        del code
        assert [reference() for reference in left] == [None, None]
    finally:
        gc.enable()


def _never(*_: object) -> bool:
    return False


@pytest.mark.parametrize("has_mkl", [True, False])
@pytest.mark.parametrize("adapter", ["none", "table+decoder:2"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_step_is_that_of_the_dense_products(
    architecture: str, adapter: str, has_mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_mkl:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    x, positions = torch.randn(200, 12), torch.arange(200) // 25
    outputs: list[Output] = []
    gradients: list[dict[str, torch.Tensor | None]] = []
    for listed in (True, False):
        words: dict[str, Any] = {"d_model": 12, "dictionary_size": 40, "ranges": RANGES, "target_l0": 4}
        made = new_autoencoder(
            architecture, **words, position_adapter=adapter, generator=torch.Generator().manual_seed(0)
        )
        assert isinstance(made, TopK)
        with torch.no_grad():
            made.b_dec.copy_(torch.linspace(-1, 1, 12))
            for weight in made.position_adapter.parameters():
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 3)
        made.alpha, made.dead = 0.7, torch.arange(0, 40, 3)
        with pytest.MonkeyPatch.context() as patch:
            if not listed:
                patch.setattr(TopK, "_is_listed", _never)
            outputs.append(made(x, [0, 100, 200], positions))
        assert isinstance(outputs[-1].codes.code, SparseCode) is listed
        outputs[-1].losses.total.backward()  # pyright: ignore[reportUnknownMemberType]
        gradients.append({name: weight.grad for name, weight in made.named_parameters()})
    sparse, dense = outputs
    torch.testing.assert_close(sparse.code, dense.code)
    torch.testing.assert_close(sparse.reconstruction, dense.reconstruction)
    torch.testing.assert_close(sparse.losses, dense.losses)
    torch.testing.assert_close(*gradients)
