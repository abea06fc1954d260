"""Files: what a writer finds in its way is never followed, and never waited for."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from posae.store.errors import StoreDamagedError, StoreWriteError
from posae.store.files import StoreFiles
from posae.store.manifest import layer_spec
from posae.store.shards import ShardWriter

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
