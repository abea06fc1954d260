"""What is merged is what the stores held, and stores that do not belong together are refused by name."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pytest

from posae.pipeline.ranges import equal_ranges
from posae.pipeline.settings import MergeSettings, PlantSettings, build
from posae.pipeline.stores.assembling import copy_part, first_part
from posae.pipeline.stores.merge import Merge, Merged
from posae.pipeline.stores.plant import Planting
from posae.pipeline.train.batches import shuffled_batches
from posae.store.errors import (
    SettingsError,
    StoreError,
    StoreIncompleteError,
    StoreMismatchError,
)
from posae.store.reader import ActivationStore
from posae.store.verify import verify

if TYPE_CHECKING:
    from ...conftest import Made, MakeStore

SIZES: dict[str, Any] = {"context_length": 4, "d_model": 6, "chunk_contexts": 4, "shard_contexts": 8}


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    with patch("os.fsync"):
        yield


@pytest.fixture(scope="module")
def first(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> "Made":
    """Contexts 0 to 32 of the corpus; two shards and a half of training."""
    root = tmp_path_factory.mktemp("merge") / "first.zarr"
    return make_store(root, n_contexts=33, held_out=13, layers=(0, 3), **SIZES)


@pytest.fixture(scope="module")
def second(make_store: "MakeStore", first: "Made") -> "Made":
    """The 20 that follow; a shard and a half of training."""
    return make_store(
        first.root.parent / "second.zarr",
        n_contexts=20,
        held_out=8,
        layers=(0, 3),
        seed=1,
        skip_contexts=33,
        **SIZES,
    )


def merge(out: Path, *stores: "Made | ActivationStore", layers: tuple[int, ...] | None = None) -> Merged:
    opened = [
        store if isinstance(store, ActivationStore) else ActivationStore.open(store.root) for store in stores
    ]
    return Merge(opened, out, MergeSettings(layers=layers)).run()


def test_training_parts_come_first_and_whole_shards_before_all(
    first: "Made", second: "Made", tmp_path: Path
) -> None:
    done = merge(tmp_path / "both.zarr", first, second)
    store = done.store
    assert (store.n_contexts, store.manifest.held_out, done.n_tokens) == (53, (32, 53), 53 * 4)
    order = [
        (first, 0, 16),
        (second, 0, 8),
        (first, 16, 20),
        (second, 8, 12),
        (first, 20, 33),
        (second, 12, 20),
    ]
    for layer in (0, 3):
        wanted = np.concatenate([made.activations[layer][start:stop] for made, start, stop in order])
        np.testing.assert_array_equal(store.read(layer), wanted)
    wanted = np.concatenate([made.documents[start:stop] for made, start, stop in order])
    np.testing.assert_array_equal(store.documents(), wanted)
    links = [(Path(store.root) / f"layer_0/c.{shard}.0.0").stat().st_nlink for shard in range(7)]
    assert [n > 1 for n in links] == [True] * 3 + [False] * 4
    assert verify(store)[:2] == ([], [])
    assert merge(tmp_path / "both.zarr", first, second).n_tokens == 0


def test_a_training_sees_every_ordinary_token_of_both_training_parts_once(
    first: "Made", second: "Made", tmp_path: Path
) -> None:
    store = merge(tmp_path / "both.zarr", first, second).store
    special = store.manifest.special_token_ids
    rows: list[bytes] = []
    options: dict[str, Any] = {"leave_out": special, "batch_size": 16, "window_contexts": 8}
    for batch in shuffled_batches(store, 3, equal_ranges(4, 2), steps=100, **options):
        rows += [row.tobytes() for row in batch.activations]
    wanted = {
        made.activations[3][context, position].tobytes()
        for made in (first, second)
        for context, position in zip(*np.nonzero(made.ordinary), strict=True)
    }
    assert set(rows[: len(wanted)]) == wanted
    assert set(rows) == wanted


def test_a_merge_is_merged_with_what_follows(
    first: "Made", second: "Made", make_store: "MakeStore", tmp_path: Path
) -> None:
    third = make_store(tmp_path / "c.zarr", n_contexts=9, layers=(0, 3), skip_contexts=60, **SIZES)
    both = merge(tmp_path / "both.zarr", second, first).store
    assert (both.manifest.skip_contexts, both.manifest.corpus_contexts) == (0, [range(53)])
    done = merge(tmp_path / "all.zarr", both, third).store
    assert done.manifest.corpus_contexts == [range(53), range(60, 69)]
    assert done.n_contexts == 62
    rows = {row.tobytes() for made in (first, second, third) for row in made.activations[0]}
    assert {row.tobytes() for row in done.read(0)} == rows
    with pytest.raises(StoreMismatchError, match="both hold contexts 33 to 52 of the corpus"):
        merge(tmp_path / "none.zarr", done, second)


def test_parts_of_one_store_make_it_whole_again_unless_they_overlap(first: "Made", tmp_path: Path) -> None:
    source = ActivationStore.open(first.root)
    one = copy_part(source, tmp_path / "one.zarr", contexts=(0, 18)).store
    two = copy_part(source, tmp_path / "two.zarr", contexts=(18, 33)).store
    assert (one.manifest.held_out, two.manifest.held_out) == ((18, 18), (2, 15))
    store = merge(tmp_path / "whole.zarr", one, two).store
    np.testing.assert_array_equal(store.read(3), source.read(3))
    assert store.manifest.held_out == source.manifest.held_out
    three = copy_part(source, tmp_path / "three.zarr", contexts=(16, 33)).store
    with pytest.raises(StoreMismatchError, match="both hold 2 contexts of the corpus, the same tokens"):
        merge(tmp_path / "none.zarr", one, three)


def test_contexts_that_the_corpus_repeats_are_counted(first: "Made", tmp_path: Path) -> None:
    again = replace(
        first,
        root=tmp_path / "again.zarr",
        manifest=first.manifest.model_copy(update={"skip_contexts": 100}),
        documents=first.documents + 1,
    )
    again.write((0, 3))
    done = merge(tmp_path / "both.zarr", first, again)
    assert done.n_repeated == 33
    assert done.store.corpus["duplicate_contexts"] == 33
    assert done.store.corpus["documents"] == first.corpus["documents"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_revision", "other"),
        ("attention", "sdpa"),
        ("device", "cuda"),
        ("batch_contexts", 64),
        ("packing", "truncate"),
        ("dataset_split", "test"),
        ("tokenizer_hash", "1" * 64),
        ("special_token_ids", (0,)),
        ("codec", "fast"),
        ("mantissa_bits", 4),
        ("context_length", 5),
    ],
)
def test_stores_of_other_settings_are_refused_by_name(
    first: "Made", make_store: "MakeStore", tmp_path: Path, key: str, value: Any
) -> None:
    other = make_store(tmp_path / "o.zarr", layers=(0, 3), skip_contexts=33, **{**SIZES, key: value})
    there = getattr(first.manifest, key)
    with pytest.raises(StoreMismatchError) as refused:
        merge(tmp_path / "new.zarr", first, other)
    assert f"{first.root} and {other.root} differ: {key} is {there!r} and {value!r}; " in str(refused.value)
    assert ("posae copy --codec small" in str(refused.value)) == (key == "codec")
    assert not (tmp_path / "new.zarr").exists()


def test_versions_must_agree_where_activations_depend_on_them(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    def make(name: str, skip: int, **versions: str) -> "Made":
        return make_store(tmp_path / name, skip_contexts=skip, versions=versions)

    one = make("a.zarr", 0, torch="2.6", numpy="2.0")
    two = make("b.zarr", 20, torch="2.6", numpy="2.1")
    three = make("c.zarr", 40, torch="2.7", numpy="2.0")
    assert merge(tmp_path / "new.zarr", one, two).store.manifest.versions["torch"] == "2.6"
    with pytest.raises(StoreMismatchError, match=r"versions torch is '2\.6' and '2\.7'"):
        merge(tmp_path / "none.zarr", one, three)


def test_a_layer_keeps_its_own_versions_in_parts_plants_and_merges(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    """Layer 3 was added by a later torch than the rest."""
    like: Any = {**SIZES, "held_out": 8, "layers": (0, 3), "versions": {"torch": "2.6"}}
    two = make_store(tmp_path / "b.zarr", skip_contexts=20, **like)
    one = replace(make_store(tmp_path / "whole.zarr", **like), root=tmp_path / "a.zarr")
    one.write((0,))
    newer = one.manifest.model_copy(update={"versions": {"torch": "9.9"}})
    replace(one, manifest=newer).write((3,), allow_versions=True)
    source = ActivationStore.open(one.root)
    assert (source.layers, source.layer_versions(3)) == ((0, 3), {"torch": "9.9"})
    made = [
        copy_part(source, tmp_path / "part.zarr", contexts=(0, 16)).store,
        Planting(source, tmp_path / "plant.zarr", build(PlantSettings, {"effect": "none"}, "")).run().store,
        copy_part(copy_part(source, tmp_path / "p.zarr", layers=[3]).store, tmp_path / "q.zarr").store,
    ]
    for store in made:
        assert store.manifest.versions["torch"] == "2.6"
        assert {layer: store.layer_versions(layer).get("torch") for layer in store.layers} == {
            layer: "9.9" if layer == 3 else None for layer in store.layers
        }
    with pytest.raises(StoreMismatchError, match=r"layer 3 of .* was computed by other versions of torch"):
        merge(tmp_path / "new.zarr", one, two)
    assert merge(tmp_path / "new.zarr", one, two, layers=(0,)).store.layers == (0,)


def test_layers_are_those_of_all_stores_or_those_asked_for(
    first: "Made", make_store: "MakeStore", tmp_path: Path
) -> None:
    other = make_store(tmp_path / "o.zarr", layers=(3, 5), skip_contexts=33, **SIZES)
    with pytest.raises(StoreMismatchError, match=r"has layers 0, 3 and .* has 3, 5; merge .*: --layers 3$"):
        merge(tmp_path / "new.zarr", first, other)
    with pytest.raises(StoreIncompleteError, match="no layer 0"):
        merge(tmp_path / "new.zarr", first, other, layers=(0,))
    assert merge(tmp_path / "new.zarr", first, other, layers=(3,)).store.layers == (3,)


def test_what_cannot_be_merged_is_refused(
    first: "Made", second: "Made", make_store: "MakeStore", tmp_path: Path
) -> None:
    unsealed = make_store(tmp_path / "u.zarr", seal=False, layers=(0, 3), skip_contexts=33, **SIZES)
    refused: list[tuple[type[StoreError | SettingsError], str, tuple[Any, ...], Path]] = [
        (SettingsError, "at least two stores", (first,), tmp_path / "new.zarr"),
        (StoreIncompleteError, "unfinished harvest", (first, unsealed), tmp_path / "new.zarr"),
        (StoreMismatchError, "both hold contexts 0 to 32", (first, first), tmp_path / "new.zarr"),
        (SettingsError, "one of the source stores", (first, second), second.root),
    ]
    for error, words, stores, out in refused:
        with pytest.raises(error, match=words):
            merge(out, *stores)
    assert not (tmp_path / "new.zarr").exists()


def test_a_part_keeps_layers_contexts_and_codec_as_asked(first: "Made", tmp_path: Path) -> None:
    source = ActivationStore.open(first.root)
    part = copy_part(source, tmp_path / "a.zarr", layers=[3], contexts=(8, 24), codec="raw").store
    assert (part.layers, part.n_contexts, part.manifest.codec) == ((3,), 16, "raw")
    assert (part.manifest.held_out, part.training_contexts(3)) == ((12, 16), 12)
    np.testing.assert_array_equal(part.read(3), first.activations[3][8:24])
    training = copy_part(source, tmp_path / "b.zarr", contexts=(0, 16)).store
    assert (training.manifest.held_out, training.training_contexts(0)) == ((16, 16), 12)
    refused: list[tuple[str, dict[str, Any]]] = [
        ("has 0:33", {"contexts": (8, 34)}),
        ("has 0:33", {"contexts": (8, 8)}),
        ("codec 'gzip' does not exist", {"codec": "gzip"}),
        ("all 4 contexts are held out", {"contexts": (24, 28)}),
    ]
    for words, options in refused:
        with pytest.raises(SettingsError, match=words):
            copy_part(source, tmp_path / "none.zarr", **options)
    with pytest.raises(StoreIncompleteError, match="no layer 7"):
        copy_part(source, tmp_path / "none.zarr", layers=[7])
    assert not (tmp_path / "none.zarr").exists()


@pytest.mark.parametrize(
    ("fraction", "stop"), [(0.001, 8), (0.1, 8), (0.2, 8), (0.4, 16), (0.9, 32), (1, 33)]
)
def test_a_fraction_is_whole_shards_at_least_one(first: "Made", fraction: float, stop: int) -> None:
    assert first_part(first.manifest, fraction) == (0, stop)


@pytest.mark.parametrize("fraction", [0, -1, 1.5, float("nan")])
def test_what_is_no_fraction_is_refused(first: "Made", fraction: float) -> None:
    with pytest.raises(SettingsError, match="above 0 and at most 1"):
        first_part(first.manifest, fraction)
