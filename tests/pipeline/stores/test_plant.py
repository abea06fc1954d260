"""What is planted is what was asked for, and lies in a store as a harvest would have written it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from posae.pipeline.ranges import parse_ranges
from posae.pipeline.settings import PlantSettings, build
from posae.pipeline.stores.plant import Additive, Planting, Rotation
from posae.store.card import write_card
from posae.store.errors import (
    SettingsError,
    StoreFormatError,
    StoreIncompleteError,
    StoreMismatchError,
)
from posae.store.reader import ActivationStore
from posae.store.seal import CARD_PATH
from posae.store.stats import LayerStats
from posae.store.verify import verify
from posae.store.writer import ShardOfLayers, StoreWriter

from ...conftest import tree

if TYPE_CHECKING:
    from ...conftest import Made, MakeStore

LENGTH, D_MODEL, LAYERS = 16, 24, (0, 3)
ROUNDING = 2**-8
"""The greatest relative error of a value rounded to bfloat16."""


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    with patch("os.fsync"):
        yield


@pytest.fixture(scope="module")
def made(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> "Made":
    """Three shards, the last chunks held out, and means far from 0; not to be changed."""
    rng = np.random.default_rng(5)
    values = rng.standard_normal((73, LENGTH, D_MODEL)) + rng.standard_normal(D_MODEL)
    bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    root = tmp_path_factory.mktemp("plant") / "source.zarr"
    return make_store(
        root,
        n_contexts=73,
        context_length=LENGTH,
        d_model=D_MODEL,
        layers=LAYERS,
        held_out=9,
        bits=bits,
        shard_contexts=32,
    )


def planting(made: "Made", out: Path, **given: Any) -> Planting:
    return Planting(ActivationStore.open(made.root), out, build(PlantSettings, given, ""))


def values(store: ActivationStore, layer: int = 0) -> NDArray[np.float64]:
    return store.read(layer, dtype="float32").astype(np.float64)


def fitted(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
    """The matrix that turns the rows of ``x`` into those of ``y``."""
    return cast(Any, np.linalg.pinv(x)) @ y


@pytest.mark.parametrize("effect", ["additive", "rotation", "none"])
def test_a_planted_store_is_what_a_harvest_of_its_activations_would_be(
    made: "Made", tmp_path: Path, effect: str
) -> None:
    work = planting(made, tmp_path / "planted.zarr", effect=effect, rank=None if effect == "none" else 6)
    found = work.run()
    store = found.store
    assert (found.layers, found.n_tokens, store.layers) == (LAYERS, 73 * LENGTH, LAYERS)
    assert verify(store)[:2] == ([], [])
    assert (store.tokens() == made.tokens).all()
    assert (store.documents() == made.documents).all()
    assert store.corpus == made.corpus
    activations = {layer: store.read(layer) for layer in LAYERS}
    again = replace(made, root=tmp_path / "again.zarr", manifest=work.manifest, activations=activations)
    again.write(LAYERS)
    write_card(ActivationStore.open(again.root))
    assert tree(Path(again.root)) == tree(Path(store.root))


def test_none_leaves_every_bit(made: "Made", tmp_path: Path) -> None:
    planting(made, tmp_path / "none.zarr", effect="none").run()
    source, copy = tree(made.root), tree(tmp_path / "none.zarr")
    assert copy.keys() - source.keys() == {CARD_PATH}
    assert {name for name in source if source[name] != copy[name]} == {"zarr.json", "seal.json"}


@pytest.mark.parametrize("strength", [0.05, 0.5])
def test_vectors_have_the_share_of_variance_that_was_asked_for(
    made: "Made", tmp_path: Path, strength: float
) -> None:
    source = ActivationStore.open(made.root)
    store = planting(made, tmp_path / "planted.zarr", strength=strength).run().store
    for layer in LAYERS:
        added = np.where(made.ordinary[..., None], values(store, layer) - values(source, layer), 0)
        n_tokens = made.ordinary.sum(axis=0)
        sums = added.sum(axis=0)
        means = np.divide(sums, n_tokens[:, None], out=np.zeros_like(sums), where=n_tokens[:, None] > 0)
        between = (n_tokens * np.square(means - sums.sum(axis=0) / n_tokens.sum()).sum(axis=1)).sum()
        assert between / store.stats(layer).variation == pytest.approx(strength, rel=0.01)
        assert store.position_r2(layer) > source.position_r2(layer) + 0.5 * strength
        singular = np.linalg.svd(means, compute_uv=False)
        assert singular[8] < 0.02 * singular[0]
        assert singular[5] > 0.02 * singular[0]
    assert not np.allclose(values(store, 0)[40] - values(source, 0)[40], 0, atol=0.05)


def test_a_rotation_keeps_distances_from_the_mean_and_the_variance_of_each_range(
    made: "Made", tmp_path: Path
) -> None:
    source = ActivationStore.open(made.root)
    store = planting(made, tmp_path / "planted.zarr", effect="rotation", rank=6, ranges="0:4,4:10,10:16")
    planted = values(store.run().store)
    stats = source.stats(0)
    mean = stats.sums.sum(axis=0) / stats.n_tokens
    before, after = values(source) - mean, planted - mean
    norms = np.linalg.norm(before, axis=2)
    np.testing.assert_allclose(np.linalg.norm(after, axis=2), norms, rtol=2 * ROUNDING)
    for start, stop in [(0, 4), (4, 10), (10, 16)]:
        squares = np.square(before[:, start:stop]).mean()
        assert np.square(after[:, start:stop]).mean() == pytest.approx(squares, rel=2e-3)
    assert (before[:, :4] == after[:, :4]).all(), "the first range is left as it was"
    changed: list[NDArray[np.float64]] = []
    for start, stop in [(4, 10), (10, 16)]:
        mask = made.ordinary[:, start:stop]
        change = (after - before)[:, start:stop][mask]
        _, singular, rows = np.linalg.svd(change, full_matrices=False)
        assert singular[6] < 0.05 * singular[0], "what changed lies in more than six dimensions"
        assert singular[3] > 0.1 * singular[0]
        changed.append(rows[:4])
    # The subspace is the same for all ranges, what is done in it is not.
    assert np.linalg.matrix_rank(np.concatenate(changed), tol=0.1) <= 6
    x, y = before[:, 10:16][made.ordinary[:, 10:16]], after[:, 10:16][made.ordinary[:, 10:16]]
    found = fitted(x, y)
    np.testing.assert_allclose(found @ found.T, np.eye(D_MODEL), atol=0.02)


def test_special_tokens_stay_as_they_were(made: "Made", tmp_path: Path) -> None:
    source = ActivationStore.open(made.root)
    special = np.isin(made.tokens, made.manifest.special_token_ids)
    assert special[:, 5:].any()
    for effect in ("additive", "rotation"):
        store = planting(made, tmp_path / f"{effect}.zarr", effect=effect, rank=8).run().store
        same = (store.read(0) == source.read(0)).all(axis=2)
        assert same[special].all()
        assert not same[:, 4:][~special[:, 4:]].any()


def test_the_manifest_says_what_was_planted_and_so_does_the_models_name(made: "Made", tmp_path: Path) -> None:
    source = ActivationStore.open(made.root)
    words = {"effect": "rotation", "strength": 0.5, "rank": 6, "seed": 3, "ranges": "2"}
    once = planting(made, tmp_path / "once.zarr", **words).run().store
    assert once.manifest.model == "made-up + planted rotation 0.5"
    assert once.manifest.planted == {
        "effect": "rotation",
        "model": "made-up",
        "store": source.identity,
        "strength": "0.5",
        "rank": "6",
        "seed": "3",
        "ranges": "0:8,8:16",
    }
    twice = Planting(once, tmp_path / "twice.zarr", build(PlantSettings, {"layer": 3}, "")).run().store
    assert twice.layers == (3,)
    assert twice.manifest.model == "made-up + planted rotation 0.5 + planted additive 0.12"
    assert twice.manifest.language_model == once.manifest.language_model == "made-up"
    assert source.manifest.language_model == "made-up"


def test_an_interrupted_planting_goes_on_to_the_same_bytes(
    made: "Made", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.zarr", tmp_path / "cut.zarr"
    planting(made, whole).run()
    commits = 0

    def interrupted(shard: ShardOfLayers) -> None:
        nonlocal commits
        commits += 1
        if commits == 2:
            raise KeyboardInterrupt
        commit(shard)

    commit = ShardOfLayers.commit
    with monkeypatch.context() as context:
        context.setattr(ShardOfLayers, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            planting(made, cut).run()
    assert ActivationStore.open(cut).n_contexts == 32
    assert planting(made, cut).run().n_tokens == (73 - 32) * LENGTH
    assert tree(cut) == tree(whole)
    assert planting(made, cut).run().n_tokens == 0
    assert tree(cut) == tree(whole)


def test_layers_may_be_planted_one_after_the_other(made: "Made", tmp_path: Path) -> None:
    both, later = tmp_path / "both.zarr", tmp_path / "later.zarr"
    planting(made, both).run()
    for layer in (3, 0):
        assert planting(made, later, layer=layer).run().layers == (layer,)
    assert tree(later) == tree(both)


def test_other_words_are_refused_by_name(made: "Made", tmp_path: Path) -> None:
    out = tmp_path / "planted.zarr"
    planting(made, out).run()
    before = tree(out)
    with pytest.raises(StoreMismatchError, match=r"planted strength was '0.12' and is now '0.2'"):
        planting(made, out, strength=0.2).run()
    with pytest.raises(StoreMismatchError, match="planted effect was 'additive' and is now 'none'"):
        planting(made, out, effect="none").run()
    with pytest.raises(StoreMismatchError, match="planted effect was 'additive' and is now None"):
        StoreWriter.begin(out, made.manifest)
    with pytest.raises(StoreMismatchError, match="planted effect was None and is now 'additive'"):
        StoreWriter.begin(made.root, planting(made, out).manifest)
    assert tree(out) == before


def test_what_cannot_be_planted_is_refused(made: "Made", make_store: "MakeStore", tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    with pytest.raises(SettingsError, match="is the store to plant from"):
        planting(made, made.root)
    with pytest.raises(StoreIncompleteError, match="has no layer 7"):
        planting(made, out, layer=7)
    with pytest.raises(SettingsError, match="give --rank 24 or less"):
        planting(made, out, effect="rotation", rank=25)
    with pytest.raises(SettingsError, match="give --rank 16 or less"):
        planting(made, out, rank=17)
    with pytest.raises(SettingsError, match="do not fit 16 positions"):
        planting(made, out, ranges="17")
    unfinished = make_store(tmp_path / "unfinished.zarr", seal=False)
    with pytest.raises(StoreIncompleteError, match="unfinished harvest"):
        planting(unfinished, out)
    special = make_store(tmp_path / "special.zarr", special_token_ids=tuple(range(1000)))
    with pytest.raises(StoreIncompleteError, match="no variance over the ordinary tokens"):
        planting(special, out, rank=2).run()
    large = make_store(tmp_path / "large.zarr", bits=np.full((20, 6, 16), 0x7F7F, np.uint16))
    with pytest.raises(StoreIncompleteError, match="no variance over the ordinary tokens"):
        planting(large, out, rank=2).run()
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StoreFormatError, match="is not a store"):
        planting(made, out).run()
    assert [file.name for file in out.iterdir()] == ["notes.txt"]


def test_an_activation_that_would_leave_bfloat16_is_refused(make_store: "MakeStore", tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0x3F00, 0x4000, (20, 6, 16)).astype(np.uint16)
    bits[19] = 0x7F7F  # held out: no statistic is infinite
    made = make_store(tmp_path / "large.zarr", bits=bits, held_out=4)
    with pytest.raises(SettingsError, match="too large to be changed"):
        planting(made, tmp_path / "out.zarr", effect="rotation", rank=16).run()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"effect": "scale"}, "effect must be"),
        ({"strength": 1.5}, "strength must be"),
        ({"strength": -0.1}, "strength must be"),
        ({"strength": 0.0}, "take effect none"),
        ({"strength": 1.0}, "nothing but the position"),
        ({"effect": "none", "strength": 0.1}, "effect none has no strength"),
        ({"effect": "rotation", "rank": 1}, "at least 2"),
        ({"rank": 0}, "rank must be"),
        ({"efect": "none"}, "did you mean 'effect'"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        build(PlantSettings, given, "[plant]")


@settings(deadline=None, max_examples=40)
@given(
    strength=st.floats(0.01, 0.95),
    rank=st.integers(1, 6),
    own=st.floats(-3, 3),
    seed=st.integers(0, 2**32),
)
def test_the_share_is_exact_whatever_means_are_there_already(
    strength: float, rank: int, own: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 40, 10)
    counts[0] = 0
    rows = np.repeat(np.arange(10), counts)
    x = rng.standard_normal((len(rows), 7)) + own * rng.standard_normal((10, 7))[rows]
    sums = np.stack([x[rows == position].sum(axis=0) for position in range(10)])
    stats = LayerStats(sums, counts, np.square(x).sum(axis=0))
    vectors = Additive.drawn(stats, strength=strength, rank=rank, generator=rng).vectors
    added = vectors[rows].astype(np.float64)
    share = added.var(axis=0).sum() / (x + added).var(axis=0).sum()
    assert share == pytest.approx(strength, rel=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    strength=st.floats(0.01, 1), rank=st.integers(2, 7), n_ranges=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_rotations_are_rotations_and_grow_with_the_strength(
    strength: float, rank: int, n_ranges: int, seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((50, 10, 7)).astype(np.float32)
    stats = LayerStats(x.sum(axis=0), np.full(10, 50), np.square(x).sum(axis=(0, 1)))
    ranges = parse_ranges(str(n_ranges), 10)

    def turned(strength: float) -> NDArray[np.float32]:
        generator = np.random.default_rng(seed)
        effect = Rotation.drawn(stats, strength=strength, rank=rank, ranges=ranges, generator=generator)
        return effect(x) - effect.mean

    before, after = x - x.mean(axis=(0, 1)), turned(strength)
    np.testing.assert_allclose(after[:, : ranges[0].stop], before[:, : ranges[0].stop], atol=1e-5)
    for start, stop in ranges[1:]:
        a, b = before[:, start:stop].reshape(-1, 7), after[:, start:stop].reshape(-1, 7)
        matrix = fitted(a, b)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(7), atol=1e-3)
        assert np.linalg.det(matrix) == pytest.approx(1, abs=1e-3)
        less = turned(strength / 2)[:, start:stop].reshape(-1, 7)
        assert np.square(less - a).sum() < np.square(b - a).sum()
