"""Rounding: to nearest and half to even, never to infinity, and its price as it is on the label."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from posae.store import ActivationStore
from posae.store.rounding import round_mantissas
from posae.store.stats import byte_plane_bound
from posae.store.verify import verify

if TYPE_CHECKING:
    from ..conftest import MakeStore

EVERY = np.arange(2**16, dtype=np.uint16)
IS_FINITE = EVERY & 0x7F80 != 0x7F80
each_width = pytest.mark.parametrize("mantissa_bits", range(1, 8))


def values(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@each_width
def test_every_value_is_rounded_to_the_nearest_and_half_to_even(mantissa_bits: int) -> None:
    rounded = round_mantissas(EVERY, mantissa_bits)
    step = 1 << 7 - mantissa_bits
    assert (rounded[IS_FINITE] % step == 0).all()
    below = EVERY[IS_FINITE].astype(int) // step * step
    rest = EVERY[IS_FINITE] - below
    up = (rest > step / 2) | ((rest == step / 2) & (below // step % 2 == 1))
    expected = below + np.where(up, step, 0)
    usual = np.abs(values(EVERY[IS_FINITE])) < 2.0**127
    assert (rounded[IS_FINITE] == expected)[usual].all()


@each_width
def test_finite_stays_finite_and_what_is_not_stays_as_it_is(mantissa_bits: int) -> None:
    rounded = round_mantissas(EVERY, mantissa_bits)
    assert np.isfinite(values(rounded[IS_FINITE])).all()
    assert (rounded[~IS_FINITE] == EVERY[~IS_FINITE]).all()
    assert (round_mantissas(rounded, mantissa_bits) == rounded).all(), "twice is not once"
    assert (rounded & 0x8000 == EVERY & 0x8000).all(), "a sign was lost"


def test_seven_bits_lose_nothing_and_nothing_is_rounded_in_place() -> None:
    bits = EVERY.copy()
    assert (round_mantissas(bits, 7) == EVERY).all()
    round_mantissas(bits, 3)
    assert (bits == EVERY).all()
    assert round_mantissas(bits[:0], 3).size == 0


@pytest.mark.parametrize("codec", ["small", "fast"])
def test_a_rounded_store_holds_what_was_rounded_and_says_the_error(
    make_store: "MakeStore", tmp_path: Path, codec: str
) -> None:
    made = make_store(
        tmp_path / "a.zarr",
        n_contexts=41,
        held_out=9,
        shard_contexts=16,
        codec=codec,
        mantissa_bits=4,
    )
    store = ActivationStore.open(made.root)
    exact = made.activations[1]
    assert (store.read(1) == round_mantissas(exact, 4)).all()
    error = values(exact) - values(store.read(1))
    relative = np.linalg.norm(error, axis=-1) / np.linalg.norm(values(exact), axis=-1)
    found = store.rounding_error(1)
    assert found is not None
    assert found.relative == pytest.approx(relative.mean(), rel=1e-6)
    ordinary = values(store.read(1))[made.ordinary]
    variance = np.square(ordinary - ordinary.mean(axis=0)).sum()
    assert found.fvu == pytest.approx(np.square(error[made.ordinary]).sum() / variance, rel=1e-5)
    assert verify(store).damaged == []
    assert store.manifest.mantissa_bits == 4


def test_a_store_is_lossless_unless_asked(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(tmp_path / "a.zarr")
    store = ActivationStore.open(made.root)
    assert store.rounding_error(1) is None
    assert not (made.root / "stats/layer_1/rounding").exists()
    assert "mantissa_bits" not in store.metadata("zarr.json")["attributes"]["posae"]


def test_the_bound_is_that_of_the_bytes_counted(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=41, shard_contexts=16)
    first = made.activations[1][::8]
    counts = np.stack(
        [np.bincount((plane).reshape(-1), minlength=256) for plane in (first >> 8, first & 255)]
    )
    assert ActivationStore.open(made.root).compression_bound(1) == byte_plane_bound(counts)


def test_the_bound_of_known_bytes() -> None:
    uniform, single = np.full(256, 3), np.eye(256, dtype=int)[7]
    assert byte_plane_bound(np.stack([uniform, uniform])) == 1
    assert byte_plane_bound(np.stack([single, uniform])) == 2
    assert byte_plane_bound(np.stack([single, single])) == np.inf
    assert np.isnan(byte_plane_bound(np.stack([single, 0 * single])))
