"""Whole stores moved: every byte checked, no half store that looks whole, nothing of others overwritten."""

import os
import shutil
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

import pytest

from posae.pipeline.stores import publishing
from posae.pipeline.stores.copying import bytes_to_move, copy_store
from posae.pipeline.stores.publishing import publish
from posae.store import ActivationStore
from posae.store.card import write_card
from posae.store.errors import (
    StoreDamagedError,
    StoreFormatError,
    StoreIncompleteError,
    StoreMismatchError,
    StoreRemoteError,
    StoreWriteError,
)
from posae.store.files import StoreFiles
from posae.store.remote.cache import PartCache
from posae.store.seal import CARD_PATH
from posae.store.verify import verify

from ...conftest import Made, MakeStore, tree
from ...folder_on_disk import FolderOnDisk


class Moved:
    """Counts the bytes that it is told of."""

    total = 0

    def __call__(self, n_bytes: int) -> None:
        self.total += n_bytes


@pytest.fixture
def made(make_store: MakeStore, tmp_path: Path) -> Made:
    made = make_store(tmp_path / "made.zarr", layers=(1, 3), n_contexts=40, shard_contexts=16, held_out=8)
    write_card(ActivationStore.open(made.root))
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSAE_CACHE", str(tmp_path / "cache"))


def remote(folder: FolderOnDisk) -> ActivationStore:
    with patch("posae.store.opening.open_remote", return_value=folder):
        return ActivationStore.open(folder.url, PartCache())


@pytest.mark.parametrize("where", ["local", "server"])
def test_a_copy_is_the_store_byte_for_byte(where: str, made: Made, tmp_path: Path) -> None:
    source = ActivationStore.open(made.root) if where == "local" else remote(FolderOnDisk(made.root))
    moved, again = Moved(), Moved()
    assert copy_store(source, tmp_path / "copy", moved) == len(tree(made.root)) - 1
    assert tree(tmp_path / "copy") == tree(made.root)
    assert moved.total == bytes_to_move(source)
    assert copy_store(source, tmp_path / "copy", again) == 0
    assert again.total == bytes_to_move(source)


@pytest.mark.parametrize("where", ["local", "server"])
def test_what_is_published_is_the_store_byte_for_byte(where: str, made: Made, tmp_path: Path) -> None:
    source = ActivationStore.open(made.root) if where == "local" else remote(FolderOnDisk(made.root))
    target = FolderOnDisk(tmp_path / "target")
    moved = Moved()
    assert publish(source, target, moved) == len(tree(made.root)) - 1
    assert tree(target.root) == tree(made.root)
    assert (target.written[0], target.written[-2:]) == ("zarr.json", ["seal.json", CARD_PATH])
    assert moved.total == bytes_to_move(source)
    assert publish(source, target, Moved()) == 0


def copy_and_die(source: ActivationStore, target: Path, after: int) -> NoReturn:
    """Copy, and be killed once so many files were written."""
    write, written = StoreFiles.write_pieces, list[str]()

    def dying(files: StoreFiles, path: str, pieces: Iterable[bytes]) -> None:
        write(files, path, pieces)
        written.append(path)
        if len(written) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with patch.object(StoreFiles, "write_pieces", dying):
            copy_store(source, target, Moved())
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_a_killed_copy_goes_on_and_moves_nothing_twice(made: Made, tmp_path: Path) -> None:
    whole = tree(made.root)
    folder = FolderOnDisk(made.root)
    source = remote(folder)
    target = tmp_path / "copy"
    kills, ended = 0, -1
    while ended:
        child = os.fork()
        if child == 0:
            copy_and_die(source, target, 5)
        ended = os.waitpid(child, 0)[1]
        assert ended in (0, signal.SIGKILL)
        kills += ended == signal.SIGKILL
        if not (target / "zarr.json").exists():
            with pytest.raises(StoreIncompleteError, match="holds an unfinished copy"):
                ActivationStore(target)
    assert kills > 3
    assert tree(target) == whole
    assert not verify(ActivationStore.open(target)).damaged


@pytest.mark.parametrize("left", ["all", "half", "none"])
def test_a_publisher_that_was_stopped_at_any_step_goes_on_from_what_is_there(
    left: str, made: Made, tmp_path: Path
) -> None:
    """Whatever became of the files meanwhile, what is sealed in the end is the whole store."""
    source = ActivationStore.open(made.root)
    whole = tree(made.root)
    for limit in range(1, len(whole) + 1, 4):
        target = FolderOnDisk(tmp_path / f"target-{limit}")
        target.digests_listed = True
        target.refuse_after = limit
        with suppress(StoreRemoteError):
            publish(source, target, Moved())
        assert (target.root / "seal.json").exists() == (limit >= len(whole) - 1)
        for number, path in enumerate(sorted(tree(target.root))):
            if left == "none" or (left == "half" and number % 2):
                (target.root / path).unlink()
        target.refuse_after, target.written = None, []
        kept = tree(target.root)
        publish(source, target, Moved())
        assert tree(target.root) == whole
        assert not verify(remote(target)).damaged
        assert sorted(target.written) == sorted(whole.keys() - kept.keys()), "nothing is sent twice"


def test_a_seal_whose_files_are_missing_is_repaired(made: Made, tmp_path: Path) -> None:
    source = ActivationStore.open(made.root)
    target = FolderOnDisk(tmp_path / "target")
    publish(source, target, Moved())
    for path in ("zarr.json", "layer_3/c.1.0.0", "layer_3/zarr.json"):
        (target.root / path).unlink()
    moved = Moved()
    assert publish(source, target, moved) == 3
    assert moved.total == bytes_to_move(source)
    assert tree(target.root) == tree(made.root)
    changed = target.root / "layer_1/c.1.0.0"
    changed.write_bytes(changed.read_bytes()[:-1])
    with pytest.raises(StoreMismatchError, match=r"layer_1/c\.1\.0\.0 exists and is not of this store"):
        publish(source, target, Moved())


def test_what_is_gone_before_the_seal_is_no_sealed_store(made: Made, tmp_path: Path) -> None:
    source = ActivationStore.open(made.root)
    target = FolderOnDisk(tmp_path / "target")
    write = target.write

    def lose(path: str, data: Path | bytes, *, only_new: bool = False) -> None:
        write(path, data, only_new=only_new)
        if path == "layer_3/c.1.0.0":
            (target.root / path).unlink()

    with (
        patch.object(target, "write", lose),
        pytest.raises(StoreRemoteError, match=r"layer_3/c\.1\.0\.0 was written and is missing now"),
    ):
        publish(source, target, Moved())
    assert not (target.root / "seal.json").exists()


def test_a_file_whose_answer_was_lost_is_seen_to_have_arrived(made: Made, tmp_path: Path) -> None:
    source = ActivationStore.open(made.root)
    target = FolderOnDisk(tmp_path / "target")
    write = target.write

    def lose(path: str, data: Path | bytes, *, only_new: bool = False) -> None:
        write(path, data, only_new=only_new)
        if path != CARD_PATH:
            raise FileExistsError(path)

    with patch.object(target, "write", lose):
        publish(source, target, Moved())
    assert tree(target.root) == tree(made.root)


@pytest.mark.parametrize("digests", [True, False])
def test_what_others_sent_is_compared_and_used_if_it_is_the_same(
    digests: bool, made: Made, tmp_path: Path
) -> None:
    source = ActivationStore.open(made.root)
    target = FolderOnDisk(tmp_path / "target")
    target.digests_listed = digests
    shutil.copytree(made.root, target.root)
    (target.root / "seal.json").unlink()
    publish(source, target, Moved())
    assert target.written == ["seal.json"]
    read = {path for path, _, _ in target.asked}
    assert read == (set() if digests else tree(made.root).keys() - {"seal.json", CARD_PATH})


def test_a_folder_of_something_else_is_left_alone(made: Made, tmp_path: Path) -> None:
    source = ActivationStore.open(made.root)
    target = FolderOnDisk(tmp_path / "target")
    (target.root / "thesis").mkdir(parents=True)
    (target.root / "thesis/draft.tex").write_text("mine")
    with pytest.raises(StoreFormatError, match=r"is not empty and holds no store but 'thesis/draft\.tex'"):
        publish(source, target, Moved())
    assert tree(target.root) == {"thesis/draft.tex": b"mine"}


@pytest.mark.parametrize("path", ["zarr.json", "layer_3/c.1.0.0", "tokens/c.0.0"])
def test_what_others_publish_to_the_same_place_is_not_overwritten(
    path: str, made: Made, tmp_path: Path
) -> None:
    source = ActivationStore.open(made.root)
    target = FolderOnDisk(tmp_path / "target")
    theirs = target.root / path
    theirs.parent.mkdir(parents=True)
    for other in (b"x", bytes(byte ^ 1 for byte in (made.root / path).read_bytes())):
        theirs.write_bytes(other)
        with pytest.raises(StoreMismatchError, match=f"{path} exists and is not of this store"):
            publish(source, target, Moved())
        assert theirs.read_bytes() == other
        assert not (target.root / "seal.json").exists()


def test_of_two_publishers_one_is_told(made: Made, make_store: MakeStore, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other.zarr", layers=(1, 3), n_contexts=40, shard_contexts=16, seed=1)
    target = FolderOnDisk(tmp_path / "target")
    publish(ActivationStore.open(other.root), target, Moved())
    for source, place in ((made, target), (other, FolderOnDisk(made.root))):
        with pytest.raises(StoreMismatchError, match="holds another store, sealed as"):
            publish(ActivationStore.open(source.root), place, Moved())
    assert tree(target.root).keys() - tree(other.root).keys() == {CARD_PATH}


@pytest.mark.parametrize("to", ["folder", "server"])
def test_a_copy_grows_by_a_layer(to: str, made: Made, tmp_path: Path) -> None:
    source = ActivationStore.open(made.root)
    target = tmp_path / "target"
    folder = FolderOnDisk(target)

    def bring(store: ActivationStore) -> int:
        return copy_store(store, target, Moved()) if to == "folder" else publish(store, folder, Moved())

    bring(source)
    reading = ActivationStore.open(target)
    made.activations[5] = made.activations[3][::-1].copy()
    made.write((5,))
    write_card(ActivationStore.open(made.root))
    n_moved = bring(ActivationStore.open(made.root))
    assert tree(target) == tree(made.root)
    assert n_moved == 1 + sum("layer_5/" in path for path in tree(made.root))
    assert reading.layers == (1, 3)
    assert (reading.read(3) == made.activations[3]).all()
    # An older copy has nothing to say to a newer one.
    assert bring(source) == 0


@pytest.mark.parametrize("damage", ["changed", "short", "long", "missing"])
@pytest.mark.parametrize("to", ["folder", "server"])
def test_a_damaged_source_is_not_passed_on(damage: str, to: str, made: Made, tmp_path: Path) -> None:
    source = ActivationStore.open(made.root)
    path = made.root / "layer_3/c.1.0.0"
    data = path.read_bytes()
    changed = {"changed": data[:50] + b"x" + data[51:], "short": data[:-1], "long": data + b"x"}
    path.write_bytes(changed[damage]) if damage in changed else path.unlink()
    target = tmp_path / "target"
    moved = Moved()
    with pytest.raises(StoreDamagedError, match=r"layer_3/c\.1\.0\.0: .*(sealed|missing)"):
        copy_store(source, target, moved) if to == "folder" else publish(source, FolderOnDisk(target), moved)
    assert not (target / "seal.json").exists()
    assert not (target / "layer_3/c.1.0.0").exists()


def test_bytes_that_were_changed_on_the_way_are_fetched_again(made: Made, tmp_path: Path) -> None:
    folder = FolderOnDisk(made.root)
    source = remote(folder)
    folder.spoilt = dict.fromkeys(tree(made.root), 1)
    moved = Moved()
    copy_store(source, tmp_path / "copy", moved)
    assert tree(tmp_path / "copy") == tree(made.root)
    assert moved.total == bytes_to_move(source)


def test_folders_that_hold_something_else_are_left_alone(
    made: Made, make_store: MakeStore, tmp_path: Path
) -> None:
    source = ActivationStore.open(made.root)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "todo.txt").write_text("mine")
    with pytest.raises(StoreFormatError, match=r"holds todo\.txt, which this copy did not write"):
        copy_store(source, notes, Moved())
    assert tree(notes) == {"todo.txt": b"mine"}
    begun = make_store(tmp_path / "begun.zarr", seal=False)
    other = make_store(tmp_path / "other.zarr", seed=3)
    same = make_store(tmp_path / "same.zarr", layers=(1, 3), n_contexts=40, shard_contexts=16, seal=False)
    half = tmp_path / "half.zarr"
    if (child := os.fork()) == 0:
        copy_and_die(ActivationStore.open(other.root), half, 5)
    os.waitpid(child, 0)
    for place, error, words in (
        (begun.root, StoreFormatError, "which this copy did not write"),
        (same.root, StoreFormatError, "which this copy did not write"),
        (other.root, StoreMismatchError, "another store, sealed as"),
        (half, StoreMismatchError, "an unfinished copy of another store"),
    ):
        before = tree(place)
        with pytest.raises(error, match=words):
            copy_store(source, place, Moved())
        assert tree(place) == before
    with pytest.raises(StoreFormatError, match="an unfinished harvest and cannot be copied"):
        copy_store(ActivationStore.open(begun.root), tmp_path / "new", Moved())


def test_too_little_room_is_told_before_anything_is_moved(made: Made, tmp_path: Path) -> None:
    source = ActivationStore.open(made.root)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with (
        patch("shutil.disk_usage", return_value=usage),
        pytest.raises(StoreWriteError, match=r"the copy needs .* bytes, but .* has 1,000 free"),
    ):
        copy_store(source, tmp_path / "copy", Moved())
    assert not tree(tmp_path / "copy")


def test_what_a_place_cannot_take_is_told_before_anything_is_sent(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ActivationStore.open(made.root)
    target = FolderOnDisk(tmp_path / "target", "hf://datasets/team/made")
    for name, most, words in (
        ("_MOST_IN_A_FOLDER", 3, "a folder there may have 3"),
        ("_MOST_ON_THE_HUB", 20, "a repository may have 20"),
        ("_LARGEST_ON_THE_HUB", 100, "the Hub takes 100"),
    ):
        with monkeypatch.context() as limits:
            limits.setattr(publishing, name, most)
            with pytest.raises(StoreWriteError, match=words):
                publish(source, target, Moved())
    assert not target.written


@pytest.mark.parametrize("to", ["folder", "server"])
def test_a_card_that_somebody_wrote_is_kept_and_passed_on(to: str, made: Made, tmp_path: Path) -> None:
    source = ActivationStore.open(made.root)
    target = tmp_path / "target"
    folder = FolderOnDisk(target)

    def bring() -> str:
        copy_store(source, target, Moved()) if to == "folder" else publish(source, folder, Moved())
        return (target / CARD_PATH).read_text()

    assert bring() == (made.root / CARD_PATH).read_text()
    (made.root / CARD_PATH).write_text("from the source's owner")
    assert bring() == "from the source's owner"
    (target / CARD_PATH).write_text("from the copy's owner")
    assert bring() == "from the copy's owner"
    assert not verify(ActivationStore.open(target)).damaged
