"""``verify`` finds every byte that is not as it was written, and names the place."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from posae.store import ActivationStore
from posae.store.errors import StoreDamagedError, StoreError
from posae.store.files import StoreFiles
from posae.store.layout import ArraySpec
from posae.store.manifest import Manifest, layer_spec, token_specs
from posae.store.shards import index_bytes, parse_index
from posae.store.stats import stats_specs
from posae.store.verify import Damage, Verification, verify

from ..conftest import tree

if TYPE_CHECKING:
    from ..conftest import Made, MakeStore


@pytest.fixture
def copied(good_store: "Made", tmp_path: Path) -> Path:
    return shutil.copytree(good_store.root, tmp_path / "a.zarr")


def verified(root: Path) -> Verification:
    return verify(ActivationStore(root))


def arrays(manifest: Manifest, layers: Sequence[int]) -> dict[str, ArraySpec]:
    specs = [*token_specs(manifest).values()]
    for layer in layers:
        specs += [layer_spec(manifest, layer), *stats_specs(manifest, layer).values()]
    return {spec.path: spec for spec in specs}


def place_of(made: "Made", path: str, byte: int) -> tuple[str, int | None, int | None]:
    """What array, shard and chunk a byte of a file lies in; the chunk is None in an index."""
    name, _, key = path.rpartition("/")
    if not key.startswith("c."):
        return path, None, None
    shard = int(key.split(".")[1])
    spec = arrays(made.manifest, [*made.activations])[name]
    data = (made.root / path).read_bytes()
    for chunk, (_, size) in enumerate(parse_index(spec, shard, data[-index_bytes(spec) :], len(data))):
        byte -= int(size)
        if byte < 0:
            return name, shard, chunk
    return name, shard, None


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.unlink()  # maps that are open keep the old file
    file.write_bytes(data)


def everything(store: ActivationStore) -> list[NDArray[Any]]:
    """All that a reader can ask for."""
    found: list[NDArray[Any]] = [store.tokens(), store.documents()]
    for layer in store.layers:
        found += [store.read(layer), *store.stats(layer), store.norms(layer).mean]
    return found


def test_an_undamaged_store_verifies_and_every_byte_was_read(good_store: "Made") -> None:
    found = verified(good_store.root)
    assert (found.damaged, found.foreign) == ([], [])
    files = [f for f in good_store.root.rglob("*") if f.is_file() and f.name != "seal.json"]
    assert found.n_bytes == sum(file.stat().st_size for file in files)


def test_no_flipped_bit_is_silent(make_store: "MakeStore", tmp_path: Path) -> None:
    good_store = make_store(tmp_path / "good.zarr", n_contexts=25, layers=(0,), held_out=9, shard_contexts=16)
    copied = shutil.copytree(good_store.root, tmp_path / "a.zarr")
    files = sorted(tree(copied))
    rng = np.random.default_rng(0)
    opened, stopped, refused = 0, 0, dict[str, str]()
    values = everything(ActivationStore.open(copied))
    for trial in range(200):
        path = files[trial] if trial < len(files) else str(rng.choice(files))
        good = (copied / path).read_bytes()
        bit = int(rng.integers(8 * len(good)))
        flip(copied / path, bit)
        try:
            store = ActivationStore(copied)
        except StoreError as error:
            refused[path] = str(error)
        else:
            opened += 1
            found = [(damage.array, damage.shard, damage.chunk) for damage in verify(store).damaged]
            if path == "seal.json":
                assert found
            else:
                assert found == [place_of(good_store, path, bit // 8)]
        try:
            read = everything(ActivationStore.open(copied))
        except StoreError:
            stopped += 1
        else:
            # What nobody reads, such as digests and padding.
            for value, good_value in zip(read, values, strict=True):
                np.testing.assert_array_equal(value, good_value)
        (copied / path).write_bytes(good)
    assert opened > 100
    assert stopped > 100
    assert refused.keys() <= {"zarr.json", "seal.json"}
    assert all(path in message for path, message in refused.items())
    assert verified(copied).damaged == []


def test_the_padding_of_a_chunk_and_what_nobody_reads_are_checked_too(copied: Path) -> None:
    (copied / "stats/layer_3/zarr.json").write_text("{}")
    (copied / "stats/zarr.json").write_bytes((copied / "stats/zarr.json").read_bytes() + b" ")
    assert {damage.array for damage in verified(copied).damaged} == {
        "stats/layer_3/zarr.json",
        "stats/zarr.json",
    }


def test_reading_a_damaged_chunk_names_it_and_leaves_the_others_readable(
    good_store: "Made", copied: Path
) -> None:
    file = copied / "layer_3/c.1.0.0"
    flip(file, 8 * (file.stat().st_size // 2))
    store = ActivationStore.open(copied)
    store.check_layer(3)
    with pytest.raises(StoreDamagedError, match="layer_3, shard 1, chunk 1: its checksum is wrong") as caught:
        store.read(3)
    assert (caught.value.array, caught.value.shard, caught.value.chunk) == ("layer_3", 1, 1)
    np.testing.assert_array_equal(store.read(3, slice(0, 24)), good_store.activations[3][:24])
    np.testing.assert_array_equal(store.read(3, slice(32, 41)), good_store.activations[3][32:])


@pytest.mark.parametrize("path", ["layer_0/c.2.0.0", "tokens/c.0.0", "stats/layer_0/sums/c.1.0.0"])
def test_a_missing_or_empty_or_cut_or_longer_shard_is_named(copied: Path, path: str) -> None:
    name, _, key = path.rpartition("/")
    shard, file = int(key.split(".")[1]), copied / path
    good = file.read_bytes()
    for bad in (None, b"", good[:10], good[:-1], good[1:], good + b"\0"):
        file.unlink() if bad is None else file.write_bytes(bad)
        assert [damage[:3] for damage in verified(copied).damaged] == [(name, shard, None)]
        store = ActivationStore.open(copied)
        with pytest.raises(StoreDamagedError) as caught:
            store.check_layer(0)
        assert (caught.value.array, caught.value.shard) == (name, shard)


@pytest.mark.parametrize(
    "path", ["layer_0/zarr.json", "stats/zarr.json", "stats/layer_3/counts/zarr.json", "position/c.0"]
)
def test_any_other_missing_file_is_named(copied: Path, path: str) -> None:
    (copied / path).unlink()
    (damage,) = verified(copied).damaged
    assert damage.array in (path, path.partition("/")[0])
    assert "missing" in damage.problem


def test_shards_that_were_swapped_are_found(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=32, codec="raw", shard_contexts=16)
    one, two = (made.root / f"layer_1/c.{shard}.0.0" for shard in (0, 1))
    one_bytes = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(one_bytes)
    ActivationStore.open(made.root).check_layer(1)
    problem = "its bytes are not those that were written"
    assert verified(made.root).damaged == [Damage("layer_1", shard, None, problem) for shard in (0, 1)]
    (made.root / "seal.json").unlink()
    assert verified(made.root).damaged == [Damage("layer_1", shard, None, problem) for shard in (0, 1)]


def test_a_shard_cut_short_under_an_open_reader_is_an_error_and_no_crash(copied: Path) -> None:
    store = ActivationStore.open(copied)
    store.read(3)
    store.tokens()
    for path in ("layer_3/c.0.0.0", "tokens/c.0.0"):
        with (copied / path).open("r+b") as file:
            file.truncate(0)
    with pytest.raises(StoreDamagedError, match="layer_3, shard 0: the file was cut short") as caught:
        store.read(3)
    assert (caught.value.array, caught.value.shard) == ("layer_3", 0)
    with pytest.raises(StoreDamagedError, match="tokens, shard 0"):
        store.tokens([0])
    store.array("layer_3").will_need(range(6))
    assert {damage[:2] for damage in verify(store).damaged} == {("layer_3", 0), ("tokens", 0)}


def test_foreign_files_are_listed_and_never_opened(good_store: "Made", copied: Path) -> None:
    foreign = ["layer_0/c.7.0.0", "layer_0/.c.0.0.0.partial", "notes/a/b.txt", "pickle.pkl"]
    for path in foreign:
        (copied / path).parent.mkdir(parents=True, exist_ok=True)
        (copied / path).write_bytes(b"not ours")
    # Opening a pipe to read waits for a writer, for ever.
    os.mkfifo(copied / "pipe")
    (copied / "README.md").write_text("a card")
    (copied / "layer_9").symlink_to("/etc")
    (copied / "layer_5").mkdir()
    (copied / "layer_5/zarr.json").write_text("not even JSON")
    store = ActivationStore.open(copied)
    assert store.layers == (0, 3)
    found = verify(store)
    assert found.damaged == []
    assert sorted(found.foreign) == sorted([*foreign, "pipe", "layer_9", "layer_5/zarr.json"])
    np.testing.assert_array_equal(store.read(0), good_store.activations[0])


@pytest.mark.parametrize(("name", "depth"), [("d", 1100), ("d" * 250, 30)])
def test_folders_however_deep_are_listed(copied: Path, name: str, depth: int) -> None:
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(copied)
        for _ in range(depth):
            Path(name).mkdir()
            os.chdir(name)
        Path("file").write_text("far down")
        assert len(verified(copied).foreign) == 1
        Path("file").unlink()
        for _ in range(depth):
            os.chdir("..")
            Path(name).rmdir()
    finally:
        os.fchdir(here)
        os.close(here)


def test_an_unfinished_store_verifies_what_is_committed(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(
        tmp_path / "a.zarr", n_contexts=41, layers=(0, 3), shard_contexts=16, seal=False, shards=[0, 1]
    )
    made.write((3,), seal=False)
    (made.root / "layer_0/.c.2.0.0.partial").write_bytes(b"being written")
    store = ActivationStore.open(made.root)
    assert (store.contexts_by_layer, store.n_contexts) == ({0: 32, 3: 41}, 32)
    found = verify(store)
    assert (found.damaged, found.foreign) == ([], ["layer_0/.c.2.0.0.partial"])
    flip(made.root / "layer_0/c.1.0.0", 800)
    flip(made.root / "layer_3/c.2.0.0", 800)
    flip(made.root / "document/c.1.0", 80)
    assert [damage[:3] for damage in verified(made.root).damaged] == [
        ("document", 1, 0),
        ("layer_0", 1, 0),
        ("layer_3", 2, 0),
    ]


DAMAGED = [
    # Where, how, and what verify is to name; ``None`` removes the file.
    ("layer_0/c.1.0.0", -1, ("layer_0", 1, None)),
    ("layer_0/c.2.0.0", -1, ("layer_0", 2, None)),
    ("layer_0/c.2.0.0", 40, ("layer_0", 2, 0)),
    ("layer_3/c.0.0.0", -9, ("layer_3", 0, None)),
    ("layer_3/c.4.0.0", -1, ("layer_3", 4, None)),
    ("layer_3/c.4.0.0", 40, ("layer_3", 4, 0)),
    ("stats/layer_3/sums/c.4.0.0", None, ("stats/layer_3/sums", 4, None)),
    ("stats/layer_3/sums/c.4.0.0", 5, ("stats/layer_3/sums", 4, 0)),
    ("stats/layer_0/sha256/c.1.0", None, ("stats/layer_0/sha256", 1, None)),
    ("stats/layer_0/counts/c.2.0", -1, ("stats/layer_0/counts", 2, None)),
    ("document/c.4.0", -1, ("document", 4, None)),
    ("tokens/c.3.0", None, ("tokens", 3, None)),
    ("stats/layer_3/zarr.json", None, ("stats/layer_3/zarr.json", None, None)),
    ("stats/zarr.json", None, ("stats/zarr.json", None, None)),
]


@pytest.mark.parametrize(("path", "byte", "place"), DAMAGED)
def test_a_shard_under_its_own_name_that_is_not_whole_is_damage_in_an_unfinished_store(
    make_store: "MakeStore", tmp_path: Path, path: str, byte: int | None, place: tuple[str, int | None, int]
) -> None:
    made = make_store(
        tmp_path / "a.zarr", n_contexts=73, layers=(0, 3), shard_contexts=16, seal=False, shards=[0, 1, 2]
    )
    made.write((3,), seal=False, shards=[4])
    (made.root / "stats/layer_0/sums/c.3.0.0").write_bytes(b"of a shard that is being written")
    assert verified(made.root).damaged == []
    file = made.root / path
    good = file.read_bytes()
    file.unlink()
    if byte is not None:
        file.write_bytes(good)
        flip(file, 8 * (byte % len(good)))
    found = verified(made.root).damaged
    assert [damage[:3] for damage in found] == [place]
    if (byte or 0) < 0 and path.startswith("layer_"):
        # A shard without a sound index is not committed, and so is made anew.
        made.write((0, 3))
        assert file.read_bytes() == good
        assert verified(made.root).damaged == []


def test_verifying_while_others_write_finds_no_damage(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=240, shard_contexts=8, seal=False, shards=[])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(made.write, (1,))
        rounds = 0
        while not writing.done():
            found = verified(made.root)
            assert found.damaged == []
            rounds += 1
        writing.result()
    assert rounds > 2
    assert verified(made.root).foreign == []


def test_a_file_that_vanishes_or_fails_while_it_is_verified_is_damage(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = StoreFiles.pieces

    def fail(files: StoreFiles, path: str, start: int = 0) -> Iterator[bytes]:
        if path == "layer_3/c.1.0.0":
            (files.root / path).unlink()
        if path in ("layer_0/c.0.0.0", "stats/layer_0/zarr.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pieces(files, path, start)

    monkeypatch.setattr(StoreFiles, "pieces", fail)
    assert set(verified(copied).damaged) == {
        Damage("layer_3", 1, None, "the file is missing"),
        Damage("layer_0", 0, None, "it cannot be read (Input/output error)"),
        Damage("stats/layer_0/zarr.json", None, None, "it cannot be read (Input/output error)"),
    }


def test_that_no_more_files_may_be_opened_is_no_damage(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(files: StoreFiles, path: str, start: int = 0) -> Iterator[bytes]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(StoreFiles, "pieces", fail)
    with pytest.raises(OSError, match="Too many open files"):
        verified(copied)


def test_what_verify_read_is_told_as_it_goes(good_store: "Made") -> None:
    told: list[int] = []
    assert verify(ActivationStore(good_store.root), told.append).n_bytes == sum(told)
    assert len(told) > 40
