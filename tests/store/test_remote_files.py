"""A store read from a server: the same values as from a folder, few requests, and a cache that is bounded."""

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posae.store import ActivationStore
from posae.store.errors import (
    SettingsError,
    StoreDamagedError,
    StoreIncompleteError,
    StoreNotFoundError,
    StoreRemoteError,
)
from posae.store.remote.cache import PartCache, parse_size
from posae.store.verify import verify

from ..conftest import Made, MakeStore
from ..folder_on_disk import FolderOnDisk

STORE = "0123456789abcdef" * 2
WIDE: dict[str, Any] = {"d_model": 512, "context_length": 32, "n_contexts": 136, "shard_contexts": 128}
"""Shards above 2 MiB, of which only parts are fetched."""


def opened(folder: FolderOnDisk, cache: PartCache, check: bool = True) -> ActivationStore:
    with patch("posae.store.opening.open_remote", return_value=folder):
        return ActivationStore.open(folder.url, cache) if check else ActivationStore(folder.url, cache)


@pytest.fixture
def cache(tmp_path: Path) -> PartCache:
    return PartCache(tmp_path / "cache")


@pytest.fixture
def wide(make_store: MakeStore, tmp_path: Path) -> Made:
    return make_store(tmp_path / "wide.zarr", layers=(1, 3), held_out=8, **WIDE)


def test_all_that_a_store_tells_is_the_same(wide: Made, cache: PartCache) -> None:
    local, remote = ActivationStore.open(wide.root), opened(FolderOnDisk(wide.root), cache)
    assert remote.is_remote
    assert not local.is_remote
    assert (remote.root, remote.address) == ("s3://bucket/made.zarr", "s3://bucket/made.zarr")
    assert remote.identity == local.identity
    assert (remote.layers, remote.n_contexts) == (local.layers, local.n_contexts)
    for store in (local, remote):
        assert (store.read(3) == wide.activations[3]).all()
        assert (store.read(1, [99, 0, 50], slice(2, 4)) == wide.activations[1][[99, 0, 50], 2:4]).all()
        assert (store.tokens() == wide.tokens).all()
        assert (store.documents() == wide.documents).all()
        assert store.corpus == wide.corpus
        store.check_layer(1)
    assert (remote.stats(1).sums == local.stats(1).sums).all()
    assert (remote.norms(3).mean == local.norms(3).mean).all()
    assert remote.stored_bytes(1) == local.stored_bytes(1)
    assert remote.digests(1) == local.digests(1)
    assert verify(remote) == verify(local)


def test_only_what_is_wanted_is_fetched_and_only_once(wide: Made, cache: PartCache) -> None:
    folder = FolderOnDisk(wide.root)
    store = opened(folder, cache)
    folder.asked.clear()
    store.read(3, slice(8, 16))
    size = (wide.root / "layer_3/c.0.0.0").stat().st_size
    assert [path for path, _, _ in folder.asked] == ["layer_3/c.0.0.0"] * 2  # the index, and one chunk
    assert sum(stop - start for _, start, stop in folder.asked) < size / 4
    folder.asked.clear()
    again = opened(folder, cache)
    again.read(3, slice(8, 16))
    assert not folder.asked


def test_a_part_that_was_spoilt_on_its_way_or_in_the_cache_is_fetched_again(
    wide: Made, cache: PartCache
) -> None:
    folder = FolderOnDisk(wide.root)
    folder.spoilt = {"layer_1/zarr.json": 1, "tokens/c.0.0": 1}
    store = opened(folder, cache)
    assert (store.tokens() == wide.tokens).all()
    store.read(1)
    for entry in cache.folder.rglob("*"):
        if entry.is_file() and "layer_1/c.0" in str(entry):
            data = bytearray(entry.read_bytes())
            data[len(data) // 2] ^= 1
            entry.write_bytes(data)
    assert (store.read(1) == wide.activations[1]).all()
    folder.spoilt = {"layer_3/c.1.0.0": 1000}
    with pytest.raises(StoreDamagedError, match="layer_3, shard 1"):
        store.read(3)


def test_a_file_that_changes_on_the_server_is_an_error(wide: Made, cache: PartCache) -> None:
    folder = FolderOnDisk(wide.root)
    store = opened(folder, cache)
    path = wide.root / "layer_1/c.1.0.0"
    path.write_bytes(path.read_bytes()[:-1])
    (wide.root / "layer_3/c.1.0.0").unlink()
    with pytest.raises(StoreDamagedError, match="another size"):
        store.read(1)
    with pytest.raises(StoreDamagedError, match="missing on the server"):
        store.read(3)
    found = verify(opened(folder, cache, check=False))
    assert {(damage.array, damage.shard) for damage in found.damaged} == {("layer_1", 1), ("layer_3", 1)}


def test_what_is_no_sealed_store_is_refused(make_store: MakeStore, tmp_path: Path, cache: PartCache) -> None:
    unfinished = make_store(tmp_path / "unfinished.zarr", seal=False)
    with pytest.raises(StoreIncompleteError, match="unfinished"):
        opened(FolderOnDisk(unfinished.root), cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreNotFoundError, match="no store at s3://bucket"):
        opened(FolderOnDisk(tmp_path / "empty"), cache)


def test_a_server_that_does_not_answer_is_no_damage(wide: Made, cache: PartCache) -> None:
    folder = FolderOnDisk(wide.root)
    store = opened(folder, cache, check=False)

    def read(path: str, start: int, stop: int, of: int) -> bytes:
        raise StoreRemoteError("s3://bucket/made.zarr does not answer")

    with patch.object(folder, "read", read), pytest.raises(StoreRemoteError, match="does not answer"):
        verify(store)


def test_checking_a_layer_asks_the_server_for_nothing(wide: Made, cache: PartCache) -> None:
    folder = FolderOnDisk(wide.root)
    store = opened(folder, cache)
    folder.asked.clear()
    store.check_layer(3)
    assert not folder.asked
    # The index is checked when its shard is first read.
    path = wide.root / "layer_3/c.0.0.0"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreDamagedError, match="layer_3, shard 0: the checksum of its index does not hold"):
        store.read(3)


def test_a_seal_that_leaves_out_a_shard_is_refused_before_a_training(wide: Made, cache: PartCache) -> None:
    seal = json.loads((wide.root / "seal.json").read_text())
    del seal["files"]["layer_3/c.1.0.0"]
    (wide.root / "seal.json").write_text(json.dumps(seal, sort_keys=True, separators=(",", ":")))
    with pytest.raises(StoreDamagedError, match="layer_3, shard 1: the seal does not name its file"):
        opened(FolderOnDisk(wide.root), cache).check_layer(3)


def test_shards_are_opened_side_by_side_and_each_once(
    make_store: MakeStore, tmp_path: Path, cache: PartCache
) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=128, d_model=512, context_length=32, shard_contexts=8)
    folder = FolderOnDisk(made.root)
    store = opened(folder, cache)
    folder.asked.clear()
    together = threading.Barrier(16, timeout=20)  # where one waits for another, this breaks
    read = folder.read

    def wait_for_all(path: str, start: int, stop: int, of: int) -> bytes:
        together.wait()
        return read(path, start, stop, of)

    with patch.object(folder, "read", wait_for_all), ThreadPoolExecutor(2) as pool:
        found = [reading.result() for reading in [pool.submit(store.read, 1) for _ in range(2)]]
    assert all((values == made.activations[1]).all() for values in found)
    assert sorted(path for path, _, _ in folder.asked) == sorted(f"layer_1/c.{n}.0.0" for n in range(16))


def test_neighbours_come_with_one_request_and_what_lies_between_is_kept(wide: Made, cache: PartCache) -> None:
    folder = FolderOnDisk(wide.root)
    store = opened(folder, cache)
    store.array("layer_3").check_index(0)
    folder.asked.clear()
    rows = np.concatenate([np.arange(8 * chunk, 8 * chunk + 8) for chunk in (2, 3, 5, 12)])
    assert (store.read(3, rows) == wide.activations[3][rows]).all()
    size = (wide.root / "layer_3/c.0.0.0").stat().st_size / 16
    assert sorted(round((stop - start) / size) for _, start, stop in folder.asked) == [1, 4]
    folder.asked.clear()
    assert (store.read(3, slice(32, 40)) == wide.activations[3][32:40]).all()
    assert not folder.asked
    assert (store.read(3) == wide.activations[3]).all()


def test_verifying_leaves_nothing_on_this_machine(wide: Made, cache: PartCache) -> None:
    folder = FolderOnDisk(wide.root)
    store = opened(folder, cache)
    kept = [*cache.folder.rglob("layer_*/c.*")]
    folder.asked.clear()
    with patch("tempfile.mkdtemp", side_effect=AssertionError):
        found = verify(store)
    assert not found.damaged
    assert [*cache.folder.rglob("layer_*/c.*")] == kept
    # Each byte once, of the long shards the index before, and metadata as it is parsed.
    asked = sum(stop - start for _, start, stop in folder.asked)
    assert found.n_bytes <= asked < 1.02 * found.n_bytes


@given(
    sizes=st.lists(st.integers(0, 400_000), min_size=1, max_size=30),
    limit=st.integers(1_000_000, 3_000_000),
)
def test_the_cache_stays_below_its_limit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    two = [PartCache(folder, limit), PartCache(folder, limit)]
    for number, size in enumerate(sizes):
        data = number.to_bytes(1, "little") * size
        name = f"{STORE}/layer_1/c.0.0-{number}"
        two[number % 2].put(name, data)
        kept = two[0].get(name)
        assert kept == data
        total = sum(file.stat().st_size for file in folder.rglob("c.0.0-*") if file.is_file())
        # Each of the two may have written its sixteenth since it looked.
        assert total <= limit * (1 + 1 / 16)
    assert two[0].get(f"{STORE}/never/c.0.0-1") is None


def test_what_was_used_last_is_kept(tmp_path: Path) -> None:
    cache = PartCache(tmp_path, 1_000_000)
    old, used, new = (f"{STORE}/tokens/c.0.0.0-{number}" for number in (1, 2, 3))
    cache.put(old, bytes(300_000))
    cache.put(used, bytes(300_000))
    for name, seconds in ((old, 1), (used, 2)):
        os.utime(cache.folder / name, (seconds, seconds))
    assert cache.get(old) is not None  # and so is used again
    cache.put(new, bytes(400_000))
    assert [cache.get(name) is not None for name in (old, used, new)] == [True, False, True]


def test_a_cache_removes_nothing_but_its_own(tmp_path: Path) -> None:
    """The user's files stay, whatever the limit, and also where their names are as ours."""
    mine = tmp_path / "mine"
    mine.mkdir()
    scratch = tmp_path / "scratch"
    own = scratch / "parts-v2"
    PartCache(scratch).put(f"{STORE}/tokens/c.0-10", bytes(10))
    other = "f" * 32
    files = ["thesis", "deep/er/c.0-100", f"{STORE}/tokens/c.0-100", f"parts-v2/{STORE}/tokens/notes.txt"]
    files += ["parts-v2/c.0-100", "parts-v2/thesis/c.0-100", "parts-v2/README", f"parts-v2/{STORE}/0-100"]
    for path in files:
        (scratch / path).parent.mkdir(parents=True, exist_ok=True)
        (scratch / path).write_bytes(bytes(900_000))
        os.utime(scratch / path, (1, 1))
    for path in ("c.0-100", "sub/c.0-100"):
        (mine / path).parent.mkdir(exist_ok=True)
        (mine / path).write_bytes(bytes(900_000))
        os.utime(mine / path, (1, 1))
    (own / STORE / "tokens/c.0-200").symlink_to(mine / "c.0-100")
    (own / STORE / "linked").symlink_to(mine)
    (own / other).symlink_to(mine)
    before = {path: path.stat().st_mtime for path in [*(scratch / p for p in files), *mine.rglob("c.0-*")]}
    cache = PartCache(scratch, 1_000_000)
    for number in range(20):
        cache.put(f"{STORE}/layer_1/c.0-{number + 1}", bytes(300_000))
    for name in (f"{STORE}/tokens/c.0-200", f"{STORE}/linked/c.0-100", f"{other}/sub/c.0-100"):
        cache.put(name, b"a part")
        assert cache.get(name) in (None, b"a part")
    assert {path: path.stat().st_mtime for path in before} == before
    assert all(path.stat().st_size == 900_000 for path in before)
    assert (own / STORE / "linked").is_symlink()
    kept = [path for path in (own / STORE / "layer_1").iterdir()]
    assert 1 <= len(kept) <= 3
    assert (own / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


def test_a_part_that_was_cut_short_is_written_anew(tmp_path: Path) -> None:
    cache, name = PartCache(tmp_path / "cache"), f"{STORE}/tokens/c.0-10"
    cache.put(name, b"0123")  # as a killed process leaves it
    (tmp_path / "other name").hardlink_to(cache.folder / name)
    cache.put(name, b"0123456789")
    assert cache.get(name) == b"0123456789"
    assert (tmp_path / "other name").read_bytes() == b"0123"
    cache.put(name, memoryview(b"9876543210"))
    assert cache.get(name) == b"9876543210"


def test_what_does_not_fit_on_the_disk_is_not_kept(tmp_path: Path) -> None:
    cache, name = PartCache(tmp_path), f"{STORE}/tokens/c.0-10"
    with patch("os.write", side_effect=OSError(errno.ENOSPC, "full")):
        cache.put(name, b"0123456789")
    assert not (cache.folder / name).exists()
    with patch("os.write", return_value=4):
        cache.put(name, b"0123456789")
    assert not (cache.folder / name).exists()
    cache.put(name, b"0123456789")
    assert cache.get(name) == b"0123456789"


@pytest.mark.parametrize("kind", ["unmarked", "link"])
def test_a_folder_that_only_has_the_name_of_a_cache_is_left_alone(kind: str, tmp_path: Path) -> None:
    scratch, mine = tmp_path / "scratch", tmp_path / "mine"
    mine.mkdir()
    scratch.mkdir()
    if kind == "link":
        (scratch / "parts-v2").symlink_to(mine)
    else:
        mine = scratch / "parts-v2"
    (mine / STORE).mkdir(parents=True)
    (mine / STORE / "c.0-100").write_bytes(bytes(900_000))
    cache = PartCache(scratch, 1_000_000)
    cache.put(f"{STORE}/c.0-200", bytes(400_000))
    assert [path.name for path in mine.rglob("*")] == [STORE, "c.0-100"]


def test_a_cache_that_cannot_be_written_only_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = PartCache(tmp_path / "file" / "cache")
    name = f"{STORE}/tokens/c.0-1"
    cache.put(name, b"1")
    assert cache.get(name) is None


@pytest.mark.parametrize("text", ["", "much", "5XB", "-1GB", "1kb", "1e9"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="cache size"):
        parse_size(text)


def test_sizes() -> None:
    assert np.array([parse_size(text) for text in ("1MB", "50 GB", "2000000", "0.5tb")]).tolist() == [
        10**6,
        50 * 10**9,
        2 * 10**6,
        5 * 10**11,
    ]
