"""Reading: what is committed and nothing else, statistics that are numpy's, any number of threads."""

import errno
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pytest
from numpy.typing import NDArray

from posae.store import ActivationStore
from posae.store.errors import (
    SettingsError,
    StoreDamagedError,
    StoreIncompleteError,
    StoreNotFoundError,
)
from posae.store.stats import bin_middles, norm_bin
from posae.store.verify import verify

if TYPE_CHECKING:
    from ..conftest import Made, MakeStore


def floats(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


# --- statistics ---------------------------------------------------------------------------------------


def check_statistics(made: "Made", layer: int, n_contexts: int) -> None:
    store = ActivationStore.open(made.root)
    values = floats(made.activations[layer][:n_contexts])
    ordinary = made.ordinary[:n_contexts]
    kept = np.where(ordinary[..., None], values, 0)
    stats = store.stats(layer)
    scale = np.abs(kept).sum(axis=0)
    assert (np.abs(stats.sums - kept.sum(axis=0)) <= 1e-7 * scale + 1e-30).all()
    np.testing.assert_array_equal(stats.counts, ordinary.sum(axis=0))
    np.testing.assert_allclose(stats.squares, np.square(kept).sum(axis=(0, 1)), rtol=1e-12)
    norms = np.linalg.norm(values, axis=-1)
    found = store.norms(layer)
    np.testing.assert_allclose(found.mean, norms.mean(axis=0), rtol=1e-12)
    middle = bin_middles()[norm_bin(norms)]
    assert found.median == np.sort(middle, axis=None)[(middle.size - 1) // 2]
    assert found.outlier_share == (middle > 10 * found.median).mean()


@pytest.mark.parametrize("held_out", [0, 1, 9, 20, 40])
def test_merged_statistics_are_those_of_the_activations(
    make_store: "MakeStore", tmp_path: Path, held_out: int
) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=41, layers=(0, 3), held_out=held_out, shard_contexts=16)
    assert made.ordinary.sum() < made.ordinary.size
    for layer in (0, 3):
        check_statistics(made, layer, 41)


def test_statistics_of_an_unfinished_store_are_of_what_is_committed(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    made = make_store(
        tmp_path / "a.zarr", n_contexts=41, held_out=9, shard_contexts=16, seal=False, shards=[0, 1]
    )
    check_statistics(made, 1, 32)


@pytest.mark.parametrize("bits", [0x7F7F, 0x0001, 0x0000, 0x8000])
def test_the_greatest_and_least_numbers_do_not_spoil_statistics(
    make_store: "MakeStore", tmp_path: Path, bits: int
) -> None:
    made = make_store(tmp_path / "a.zarr", bits=np.full((20, 6, 16), bits, np.uint16))
    store, value = ActivationStore.open(made.root), floats(np.array([bits], np.uint16))[0]
    n_ordinary = int(made.ordinary.sum())
    np.testing.assert_allclose(store.stats(1).squares, n_ordinary * value**2, rtol=1e-12)
    np.testing.assert_allclose(store.norms(1).mean, 4 * abs(value), rtol=1e-12)


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.0), (1.0, 0.5), (30.0, 0.9989)])
def test_what_position_explains_is_told_and_chance_is_not(
    make_store: "MakeStore", tmp_path: Path, shift: float, expected: float
) -> None:
    rng = np.random.default_rng(3)
    means = shift * rng.standard_normal((16, 8)).astype(np.float32)
    values = rng.standard_normal((400, 16, 8), np.float32) + means
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    made = make_store(
        tmp_path / "a.zarr", n_contexts=400, context_length=16, d_model=8, held_out=40, bits=bits
    )
    stats = ActivationStore.open(made.root).stats(1)
    assert stats.position_r2 == pytest.approx(expected, abs=0.004 if not shift else 0.1)
    kept, place = values[made.ordinary], np.nonzero(made.ordinary)[1]
    within = sum(
        float(np.square(kept[place == p] - kept[place == p].mean(axis=0)).sum()) for p in np.unique(place)
    )
    total = float(np.square(kept - kept.mean(axis=0)).sum())
    n, groups = len(kept), len(np.unique(place))
    assert stats.position_r2 == pytest.approx(1 - within / total * (n - 1) / (n - groups), abs=1e-3)


def test_position_explains_nothing_that_can_be_told_of_too_few_tokens(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=1)
    assert np.isnan(ActivationStore.open(made.root).stats(1).position_r2)


def test_a_few_huge_norms_are_outliers(make_store: "MakeStore", tmp_path: Path) -> None:
    bits = np.full((20, 6, 16), 0x3F80, np.uint16)
    bits[:, 0] = 0x4380
    store = ActivationStore.open(make_store(tmp_path / "a.zarr", bits=bits).root)
    norms = store.norms(1)
    np.testing.assert_array_equal(norms.mean, [1024, 4, 4, 4, 4, 4])
    assert norms.outlier_share == pytest.approx(1 / 6)
    assert 4 <= norms.median < 4 * 2**0.25


# --- what can be asked for ----------------------------------------------------------------------------


def test_only_the_longest_run_of_whole_shards_is_there(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(
        tmp_path / "a.zarr", n_contexts=73, layers=(0, 3), shard_contexts=16, seal=False, shards=[0, 2]
    )
    made.write((3,), seal=False, shards=[1, 4])
    store = ActivationStore.open(made.root)
    assert store.contexts_by_layer == {0: 16, 3: 48}
    assert store.n_contexts == 16
    np.testing.assert_array_equal(store.read(0), made.activations[0][:16])
    np.testing.assert_array_equal(store.read(3, slice(30, 48)), made.activations[3][30:48])
    for ask in (slice(0, 17), [16], [-17], np.ones(17, bool), slice(17, None)):
        with pytest.raises(StoreIncompleteError):
            store.read(0, ask)
    np.testing.assert_array_equal(store.tokens(), made.tokens[:16])
    np.testing.assert_array_equal(store.tokens([-1]), made.tokens[[15]])
    # What is named is there for the layer that is farthest.
    np.testing.assert_array_equal(store.documents([40, 2]), made.documents[[40, 2]])
    np.testing.assert_array_equal(store.tokens(slice(30, 48)), made.tokens[30:48])
    for ask in (slice(0, 49), [48], [-17], np.ones(17, bool), slice(17, None)):
        with pytest.raises(StoreIncompleteError):
            store.tokens(ask)
    made.write((0, 3))
    assert ActivationStore.open(made.root).contexts_by_layer == {0: 73, 3: 73}
    assert store.n_contexts == 16, "a reader sees what was there when it opened"


def test_a_store_of_nothing_yet_opens_and_says_so(make_store: "MakeStore", tmp_path: Path) -> None:
    store = ActivationStore.open(make_store(tmp_path / "a.zarr", seal=False, shards=[]).root)
    assert (store.layers, store.n_contexts, store.identity, store.is_sealed) == ((1,), 0, None, False)
    assert store.tokens().shape == store.documents().shape == (0, 6)
    assert store.read(1).shape == (0, 6, 16)
    with pytest.raises(StoreIncompleteError, match="no finished shard of layer 1"):
        store.check_layer(1)
    assert np.isnan(store.norms(1).mean).all()
    assert "unfinished" in repr(store)


def test_what_is_not_there_is_said_with_what_is(good_store: "Made") -> None:
    store = ActivationStore.open(good_store.root)
    for ask in (lambda: store.read(5), lambda: store.check_layer(5)):
        with pytest.raises(StoreIncompleteError, match=r"no layer 5; it has 0, 3\. Add it: .* --layers 5"):
            ask()
    with pytest.raises(StoreIncompleteError, match="contexts up to 42 are out of range: the store has 41"):
        store.read(0, slice(0, 42))
    with pytest.raises(StoreIncompleteError, match="position 6 is out of range: the store has 6"):
        store.read(0, slice(0, 1), [6])
    with pytest.raises(SettingsError, match="dtype 'float64'"):
        store.read(0, dtype="float64")
    odd_ones: list[Any] = [[0.5], ["1"], [[True]], 0.0, True]
    for odd in odd_ones:
        with pytest.raises((TypeError, StoreIncompleteError)):
            store.read(0, odd)


def test_the_store_says_what_it_is(good_store: "Made") -> None:
    store = ActivationStore.open(str(good_store.root))
    assert store.manifest == good_store.manifest
    assert (store.layers, store.n_contexts, store.context_length, store.d_model) == ((0, 3), 41, 6, 16)
    assert store.identity == hashlib.sha256((good_store.root / "seal.json").read_bytes()).hexdigest()
    assert store.corpus == good_store.corpus
    assert store.raw_bytes(0) == 41 * 6 * 16 * 2
    shards = [(good_store.root / f"layer_0/c.{n}.0.0").stat().st_size for n in range(3)]
    assert store.stored_bytes(0) == sum(shards)
    assert "sealed" in repr(store)


# contexts, held out by the manifest, committed -> where training ends
HELD_OUT = [
    (73, 9, 73, 64),
    (73, 9, 64, 56),
    (73, 9, 16, 8),
    (73, 0, 73, 72),
    (73, 57, 73, 16),
    (73, 57, 16, 8),
    (640, 0, 640, 608),
    (7, 0, 7, 7),
    (8, 0, 8, 8),
    (9, 0, 9, 8),
]


@pytest.mark.parametrize(("n_contexts", "held_out", "committed", "training"), HELD_OUT)
def test_the_held_out_part_is_the_manifests_or_the_last_twentieth(
    make_store: "MakeStore", tmp_path: Path, n_contexts: int, held_out: int, committed: int, training: int
) -> None:
    shards = range(-(-committed // 16))
    made = make_store(
        tmp_path / "a.zarr",
        n_contexts=n_contexts,
        held_out=held_out,
        shard_contexts=16,
        seal=False,
        shards=shards,
    )
    store = ActivationStore.open(made.root)
    assert store.contexts_by_layer == {1: committed}
    assert store.held_out_part(1) == (training, committed)
    assert store.training_contexts(1) == training


def test_digests_name_what_a_run_reads_and_outlive_an_added_layer(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    made = make_store(tmp_path / "a.zarr", layers=(0, 3), seal=False, shards=[])
    made.write((0,), seal=False)
    for path in (made.root / "layer_3", made.root / "stats/layer_3"):
        path.rename(tmp_path / path.relative_to(made.root).as_posix().replace("/", "-"))
    assert ActivationStore.open(made.root).digests(0) == {}
    made.write((0,))
    before = ActivationStore.open(made.root)
    made.write((3,))
    after = ActivationStore.open(made.root)
    assert before.digests(0) == after.digests(0)
    assert before.identity != after.identity
    assert after.digests(0)["tokens"] == after.digests(3)["tokens"]
    assert len({*after.digests(0).values(), *after.digests(3).values()}) == 5
    sealed = json.loads((made.root / "seal.json").read_bytes())["files"]
    lines = [f"{path} {sealed[path]['sha256']}\n" for path in ("layer_0/c.0.0.0", "layer_0/zarr.json")]
    assert after.digests(0)["layer_0"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    other = make_store(tmp_path / "b.zarr", layers=(0,), seed=1)
    different = ActivationStore.open(other.root).digests(0)
    assert not set(different.values()) & set(after.digests(0).values())


# --- threads and maps ---------------------------------------------------------------------------------


def n_maps(root: Path) -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(root / "layer_1/c.") in line for line in lines)


def test_threads_read_side_by_side_with_few_maps_open(
    make_store: "MakeStore", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posae.store.shards._MAPS_KEPT", 3)
    made = make_store(tmp_path / "a.zarr", n_contexts=200, shard_contexts=8)
    store = ActivationStore.open(made.root)

    def read(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        same = True
        for _ in range(40):
            rows = rng.integers(0, 200, 12)
            same &= bool((store.read(1, rows) == made.activations[1][rows]).all())
            same &= bool((store.tokens(rows) == made.tokens[rows]).all())
        return same

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
        assert n_maps(made.root) <= 3
        rows = np.random.default_rng(8).permutation(200)
        store.array("layer_1").will_need(range(25))
        np.testing.assert_array_equal(store.array("layer_1").read_rows(rows, pool), made.activations[1][rows])
    assert n_maps(made.root) <= 3


@pytest.mark.parametrize("error", [errno.ENODEV, errno.EINVAL])
@pytest.mark.parametrize("codec", ["small", "raw"])
def test_a_file_system_without_maps_is_read(
    make_store: "MakeStore", tmp_path: Path, codec: str, error: int
) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=40, shard_contexts=16, codec=codec)
    with patch("mmap.mmap", side_effect=OSError(error, os.strerror(error))):
        store = ActivationStore.open(made.root)
        store.check_layer(1)
        np.testing.assert_array_equal(store.read(1), made.activations[1])
        np.testing.assert_array_equal(store.read(1, [33, 2], [4, 0]), made.activations[1][[33, 2]][:, [4, 0]])
        assert verify(store).damaged == []
        with (made.root / "layer_1/c.1.0.0").open("r+b") as file:
            file.truncate(10)
        with pytest.raises(StoreDamagedError, match=r"layer_1, shard 1, chunk 0: (shorter|6 bytes where)"):
            store.read(1)
        np.testing.assert_array_equal(store.read(1, slice(0, 16)), made.activations[1][:16])
    n_open = len([*Path("/proc/self/fd").iterdir()])
    del store
    gc.collect()
    assert len([*Path("/proc/self/fd").iterdir()]) < n_open


def test_a_replaced_file_is_not_seen_by_an_open_reader(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(tmp_path / "a.zarr")
    store = ActivationStore.open(made.root)
    store.read(1)
    (made.root / "layer_1/c.0.0.0").rename(tmp_path / "elsewhere")
    np.testing.assert_array_equal(store.read(1), made.activations[1])


def test_a_store_removed_under_an_open_reader_is_an_error_where_nothing_is_mapped_yet(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=40, shard_contexts=16)
    store = ActivationStore.open(made.root)
    store.read(1, slice(0, 16))
    shutil.rmtree(made.root)
    np.testing.assert_array_equal(store.read(1, slice(0, 16)), made.activations[1][:16])
    with pytest.raises(StoreDamagedError, match=r"layer_1, shard 1: its file layer_1/c\.1\.0\.0 is missing"):
        store.read(1)
    told = "tokens, shard 0: its file .* is missing, as the folder vanished; put it back and run"
    with pytest.raises(StoreDamagedError, match=told):
        store.tokens()
    assert {damage.problem for damage in verify(store).damaged} >= {"the file is missing"}
    with pytest.raises(StoreNotFoundError, match="there is no store"):
        ActivationStore.open(made.root)


def test_reading_a_store_needs_neither_torch_nor_zarr(good_store: "Made") -> None:
    lines = [
        "import sys",
        "from posae.store import ActivationStore",
        f"ActivationStore.open({str(good_store.root)!r}).read(0)",
        "print([name for name in ('torch', 'zarr', 'rich', 'typer') if name in sys.modules])",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_what_they_say() -> None:
    import posae.store

    found: dict[str, Any] = {name: getattr(posae.store, name) for name in posae.store.__all__}
    assert all(callable(value) for value in found.values())
    with pytest.raises(AttributeError, match="nothing"):
        _ = posae.store.nothing
