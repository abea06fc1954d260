"""Files: what a writer finds in its way is never followed, and never waited for."""

import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest

from posae.store import ActivationStore
from posae.store.errors import SettingsError, StoreDamagedError, StoreWriteError
from posae.store.files import StoreFiles, exclusive
from posae.store.manifest import layer_spec
from posae.store.shard_writer import ShardWriter

if TYPE_CHECKING:
    from ..conftest import Made


def stand_in_the_way(place: Path, kind: str, victim: Path) -> None:
    if kind == "link":
        place.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.touch()


@pytest.mark.parametrize("kind", ["link", "pipe", "file"])
def test_writing_goes_through_nothing_that_stands_at_the_temporary_name(tmp_path: Path, kind: str) -> None:
    root, victim = tmp_path / "store", tmp_path / "victim"
    root.mkdir()
    victim.write_text("precious")
    place = root / ".seal.json.partial"
    stand_in_the_way(place, kind, victim)
    StoreFiles(root).write("seal.json", b"{}")
    assert victim.read_text() == "precious"
    assert [path.name for path in root.iterdir()] == ["seal.json"]
    assert (root / "seal.json").read_bytes() == b"{}"


@pytest.mark.parametrize("link", ["stats", "stats/layer_0", "stats/layer_0/sums"])
def test_nothing_is_written_or_removed_through_a_linked_folder(tmp_path: Path, link: str) -> None:
    root, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    within = Path("stats/layer_0/sums").relative_to(link)
    (elsewhere / within).mkdir(parents=True)
    (elsewhere / within / "c.0.0.0").write_text("precious")
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    files = StoreFiles(root)
    for change in (
        lambda: files.write("stats/layer_0/sums/c.0.0.0", b"{}"),
        lambda: files.write("stats/layer_0/sums/c.1.0.0", b"{}"),
        lambda: files.remove("stats/layer_0/sums", lambda _: True),
    ):
        with pytest.raises(StoreWriteError, match="a file stands where a folder should be, or a link"):
            change()
    assert sorted(elsewhere.rglob("*")) == before
    assert (elsewhere / within / "c.0.0.0").read_text() == "precious"


def test_removing_takes_what_is_unwanted_in_one_folder(tmp_path: Path) -> None:
    for name in ("c.0", "c.1", ".c.1.partial"):
        StoreFiles(tmp_path).write(f"a/{name}", b"")
    (tmp_path / "a/c.2").symlink_to(tmp_path / "a/c.0")
    StoreFiles(tmp_path).remove("a", lambda name: name != "c.0")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["c.0"]
    StoreFiles(tmp_path).remove("no/such", lambda _: True)


def test_a_link_at_a_files_own_name_is_replaced_and_the_root_may_be_a_link(tmp_path: Path) -> None:
    root, victim, alias = tmp_path / "store", tmp_path / "victim", tmp_path / "alias"
    root.mkdir()
    alias.symlink_to(root)
    victim.write_text("precious")
    (root / "seal.json").symlink_to(victim)
    StoreFiles(alias).write("seal.json", b"{}")
    assert victim.read_text() == "precious"
    assert not (root / "seal.json").is_symlink()
    assert (root / "seal.json").read_bytes() == b"{}"


def test_writing_makes_the_folders_that_are_missing_and_syncs_the_last_two(tmp_path: Path) -> None:
    synced: list[str] = []

    def fsync(handle: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))

    files = StoreFiles(tmp_path / "new/store")
    files.make_root()
    with patch("os.fsync", fsync):
        files.write("stats/layer_0/sums/c.0", b"1")
    folder = files.root / "stats/layer_0/sums"
    assert synced == [str(folder / ".c.0.partial"), str(folder), str(folder.parent)]
    assert (folder / "c.0").read_bytes() == b"1"


def test_a_root_that_was_moved_away_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(StoreWriteError, match="the folder vanished"):
        StoreFiles(tmp_path / "moved").write("stats/layer_0/sums/c.0", b"1")
    assert not (tmp_path / "moved").exists()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_shard_is_written_through_no_link_or_pipe(good_store: "Made", tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "layer_0").mkdir()
    place = tmp_path / "layer_0/.c.0.0.0.partial"
    stand_in_the_way(place, kind, victim)
    spec = layer_spec(good_store.manifest, 0)
    with pytest.raises(StoreWriteError):
        ShardWriter.try_lock(StoreFiles(tmp_path), spec, 0, wait=False)
    assert victim.read_text() == "precious"


def test_walking_lists_every_file_and_enters_no_link(tmp_path: Path) -> None:
    for path in ("b/c/1", "a/2", "z", "b.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "b/link").symlink_to(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    assert list(StoreFiles(tmp_path).walk()) == ["b.txt", "z", "a/2", "b/link", "b/c/1"]
    assert list(StoreFiles(tmp_path / "nowhere").walk()) == []


def test_a_file_may_be_as_large_as_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert StoreFiles(tmp_path).read("a", 5) == b"12345"
    with pytest.raises(StoreDamagedError, match="larger than the 4 bytes"):
        StoreFiles(tmp_path).read("a", 4)
    with pytest.raises(FileNotFoundError):
        StoreFiles(tmp_path).read("b", 5)
    assert StoreFiles(tmp_path).size_bytes("b") is None


def test_a_store_whose_files_are_links_as_hf_download_leaves_them_says_what_to_do(
    good_store: "Made", tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    for number, file in enumerate(path for path in good_store.root.rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(good_store.root)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(number))
        link.symlink_to(blobs / str(number))
    with pytest.raises(
        StoreDamagedError,
        match=rf"in {snapshot} it is a link, .*: hf download --local-dir FOLDER, or posae copy",
    ):
        ActivationStore.open(snapshot)


def test_waiting_for_a_lock_is_logged_once_and_a_short_wait_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seconds, n_lines in ((0.2, 0), (1.5, 1)):
        caplog.clear()
        is_locked = threading.Event()

        def hold(seconds: float = seconds, is_locked: threading.Event = is_locked) -> None:
            with exclusive(tmp_path):
                is_locked.set()
                time.sleep(seconds)

        holder = threading.Thread(target=hold)
        holder.start()
        assert is_locked.wait(20)
        with exclusive(tmp_path) as is_held:
            assert is_held
        holder.join()
        said = [record.getMessage() for record in caplog.records]
        assert said == [f"waiting for another process that writes {tmp_path}"] * n_lines


@pytest.mark.parametrize("place", ["s3:/bucket/pile.zarr", Path("s3://bucket/pile.zarr")])
def test_a_url_that_lost_a_slash_is_not_taken_for_a_folder(place: str | Path) -> None:
    with pytest.raises(
        SettingsError, match=r"^s3:/bucket/pile\.zarr lacks a slash; write s3://bucket/pile\.zarr$"
    ):
        ActivationStore.open(place)
