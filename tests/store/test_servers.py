"""What every kind of folder on a server does, and what each does of its own."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from posae.store.errors import SettingsError, StoreDamagedError, StoreRemoteError
from posae.store.remote import retries
from posae.store.remote.folder import RemoteFolder, inside, is_url, shown
from posae.store.remote.servers import open_remote

if TYPE_CHECKING:
    from ..fakes import Hub
    from ..servers import Server, StartServer

# An odd name that is allowed: every service must quote it.
FILES = {
    "zarr.json": b"{}",
    "layer_5/c.0.0.0": bytes(range(256)) * 40,
    "stats/layer 5+%41#?.json": b"odd",
    "stats/deep/a/b": b"b",
    "empty": b"",
}


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited between tries; nothing really is."""
    waited: list[float] = []
    monkeypatch.setattr(retries, "sleep", waited.append)
    return waited


@pytest.fixture
def filled(server: "Server") -> RemoteFolder:
    return open_remote(server.fill(FILES, "pile.zarr"))


@pytest.fixture
def empty(writable_server: "Server") -> RemoteFolder:
    return open_remote(writable_server.url("pile.zarr"))


class TestReading:
    def test_ranges(self, filled: RemoteFolder) -> None:
        data = FILES["layer_5/c.0.0.0"]
        for start, stop in [(0, 1), (0, 10_240), (255, 257), (10_239, 10_240), (5, 9_000)]:
            assert filled.read("layer_5/c.0.0.0", start, stop, len(data)) == data[start:stop]
        assert filled.read("stats/layer 5+%41#?.json", 1, 3, 3) == b"dd"

    @pytest.mark.parametrize("of", [10_239, 10_241, 3])
    def test_file_of_another_size_is_damaged(self, filled: RemoteFolder, of: int) -> None:
        with pytest.raises(StoreDamagedError, match=r"layer_5/c\.0\.0\.0: it changed on the server"):
            filled.read("layer_5/c.0.0.0", 1, min(of, 3), of)

    def test_file_that_ends_before_the_range_is_damaged(self, filled: RemoteFolder) -> None:
        with pytest.raises(StoreDamagedError, match="it changed on the server"):
            filled.read("zarr.json", 10, 20, 20)

    def test_file_that_changed_between_two_reads_is_damaged(
        self, server: "Server", filled: RemoteFolder
    ) -> None:
        assert filled.read("zarr.json", 0, 1, 2) == b"{"
        server.put("pile.zarr/zarr.json", b"{} ")
        with pytest.raises(StoreDamagedError, match=r"3 bytes, not 2"):
            filled.read("zarr.json", 0, 1, 2)

    def test_small_files(self, filled: RemoteFolder) -> None:
        assert filled.read_small("zarr.json", 2) == b"{}"
        assert filled.read_small("layer_5/c.0.0.0", 1 << 20) == FILES["layer_5/c.0.0.0"]
        assert filled.read_small("empty", 0) == b""
        for path, limit in [("zarr.json", 1), ("layer_5/c.0.0.0", 10_239)]:
            with pytest.raises(StoreDamagedError, match=f"larger than the {limit:,} bytes"):
                filled.read_small(path, limit)

    def test_sizes(self, filled: RemoteFolder) -> None:
        assert {path: filled.size_bytes(path) for path in FILES} == {p: len(d) for p, d in FILES.items()}
        assert filled.size_bytes("seal.json") is None
        assert filled.size_bytes("no/such/folder") is None

    def test_missing_file(self, filled: RemoteFolder) -> None:
        with pytest.raises(FileNotFoundError, match=r"pile\.zarr/seal\.json: no such file"):
            filled.read("seal.json", 0, 1, 1)
        with pytest.raises(FileNotFoundError, match=r"pile\.zarr/seal\.json: no such file"):
            filled.read_small("seal.json", 10)

    def test_no_path_leads_outside(self, filled: RemoteFolder) -> None:
        for path in ("../zarr.json", "/etc/passwd", "a//b", "a/./b", "a\\b", "a\nb", ""):
            with pytest.raises(StoreRemoteError, match="no file inside the folder"):
                filled.read(path, 0, 1, 1)
            with pytest.raises(StoreRemoteError, match="no file inside the folder"):
                filled.read_small(path, 1)
            with pytest.raises(StoreRemoteError, match="no file inside the folder"):
                filled.size_bytes(path)

    def test_listing(self, server: "Server", filled: RemoteFolder, tmp_path: Path) -> None:
        server.put("pile.zarr.backup/zarr.json", b"beside it")
        listed = filled.list_files()
        if server.kind == "http":
            assert listed is None
            return
        assert listed is not None
        assert {path: file.n_bytes for path, file in listed.items()} == {p: len(d) for p, d in FILES.items()}
        if server.kind != "az":
            for path, data in FILES.items():
                (tmp_path / "file").write_bytes(data)
                assert listed[path].digest in filled.digests(tmp_path / "file")

    def test_whole_files(self, filled: RemoteFolder) -> None:
        for path, data in FILES.items():
            assert b"".join(filled.pieces(path, len(data))) == data
        with pytest.raises(StoreDamagedError, match="10,240 bytes, not 10,239"):
            list(filled.pieces("layer_5/c.0.0.0", 10_239))
        with pytest.raises(FileNotFoundError):
            list(filled.pieces("seal.json", 10))

    def test_many_threads_at_once(self, filled: RemoteFolder) -> None:
        data = FILES["layer_5/c.0.0.0"]

        def read(i: int) -> bool:
            start = i * 37 % 10_000
            return filled.read("layer_5/c.0.0.0", start, start + 200, len(data)) == data[start : start + 200]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(read, range(100)))


class TestWriting:
    def test_what_is_written_is_there(
        self, writable_server: "Server", empty: RemoteFolder, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_bytes(FILES["layer_5/c.0.0.0"])
        for path, data in FILES.items():
            empty.write(path, tmp_path / "file" if path == "layer_5/c.0.0.0" else data)
        assert writable_server.files() == {f"pile.zarr/{path}": data for path, data in FILES.items()}
        assert (empty.list_files() or {}).keys() == FILES.keys()

    def test_it_takes_the_place_of_what_was_there(
        self, writable_server: "Server", empty: RemoteFolder
    ) -> None:
        for data in (b"one", b"another", b"another"):
            empty.write("seal.json", data)
            assert writable_server.files() == {"pile.zarr/seal.json": data}

    def test_only_new_leaves_what_is_there(self, writable_server: "Server", empty: RemoteFolder) -> None:
        empty.write("seal.json", b"first", only_new=True)
        for data in (b"second", b"first"):
            with pytest.raises(FileExistsError, match=r"seal\.json is there already"):
                empty.write("seal.json", data, only_new=True)
        assert writable_server.files() == {"pile.zarr/seal.json": b"first"}

    def test_of_many_that_write_what_is_new_one_does(
        self, writable_server: "Server", empty: RemoteFolder
    ) -> None:
        empty.write("zarr.json", b"{}")
        folders = [open_remote(empty.url) for _ in range(6)]
        begin = threading.Barrier(len(folders))

        def write(i: int) -> bool:
            begin.wait()
            try:
                folders[i].write("claim", b"%d" % i * 100, only_new=True)
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(len(folders)) as pool:
            won = [i for i, done in enumerate(pool.map(write, range(len(folders)))) if done]
        assert len(won) == 1
        assert writable_server.files()["pile.zarr/claim"] == b"%d" % won[0] * 100

    def test_files_larger_than_a_piece(
        self, writable_server: "Server", empty: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("posae.store.remote.objects._IN_ONE_REQUEST", 1 << 20)
        data = os.urandom(1 << 20) * 16 + b"and more"
        (tmp_path / "large").write_bytes(data)
        empty.write("layer_5/c.0.0.0", tmp_path / "large", only_new=True)
        assert writable_server.files() == {"pile.zarr/layer_5/c.0.0.0": data}
        assert b"".join(empty.pieces("layer_5/c.0.0.0", len(data))) == data
        listed = (empty.list_files() or {})["layer_5/c.0.0.0"]
        if writable_server.kind in ("s3", "hf"):
            assert listed.digest in empty.digests(tmp_path / "large")
        with pytest.raises(FileExistsError):
            empty.write("layer_5/c.0.0.0", tmp_path / "large", only_new=True)

    def test_no_path_leads_outside(self, writable_server: "Server", empty: RemoteFolder) -> None:
        with pytest.raises(StoreRemoteError, match="no file inside the folder"):
            empty.write("../beside", b"")
        assert writable_server.files() == {}


def test_the_web_takes_nothing(start_server: "StartServer") -> None:
    server = start_server("http")
    with pytest.raises(StoreRemoteError, match="the web can only be read"):
        open_remote(server.url()).write("zarr.json", b"{}")
    assert server.files() == {}


class TestListings:
    """A stranger's listing may name what leads out of the folder."""

    @pytest.mark.parametrize("name", ["a\\b", "a\u202eb"])
    @pytest.mark.parametrize("kind", ["s3", "gs", "hf"])
    def test_names_that_lead_outside_are_refused(
        self, start_server: "StartServer", kind: str, name: str
    ) -> None:
        server = start_server(kind)
        server.put(name, b"")
        with pytest.raises(StoreRemoteError, match="no file inside the folder"):
            open_remote(server.url()).list_files()

    @pytest.mark.parametrize("name", ["a/../../b", "a//b"])
    @pytest.mark.parametrize("kind", ["s3", "gs"])
    def test_names_that_are_no_paths_are_refused(
        self, start_server: "StartServer", kind: str, name: str
    ) -> None:
        server = start_server(kind)
        server.put(name, b"")
        with pytest.raises(StoreRemoteError):
            open_remote(server.url()).list_files()


class TestHub:
    def test_dataset_is_made_private(self, start_server: "StartServer", fake_hub: "tuple[str, Hub]") -> None:
        server = start_server("hf")
        open_remote(server.url()).write("zarr.json", b"{}")
        assert fake_hub[1].private[server.base.removeprefix("hf://datasets/")] is True

    def test_several_files_are_one_commit(
        self, start_server: "StartServer", fake_hub: "tuple[str, Hub]"
    ) -> None:
        server = start_server("hf")
        cast(Any, open_remote(server.url())).commit(FILES)
        assert server.files() == FILES
        assert len(fake_hub[1].datasets[server.base.removeprefix("hf://datasets/")]) == 2

    def test_revision(self, start_server: "StartServer", fake_hub: "tuple[str, Hub]") -> None:
        server = start_server("hf")
        server.put("a/b", b"old")
        oid = fake_hub[1].datasets[server.base.removeprefix("hf://datasets/")][-1][0]
        server.put("a/b", b"newer")
        assert open_remote(f"{server.base}@{oid}/a").read_small("b", 10) == b"old"
        assert open_remote(f"{server.base}@main/a").read_small("b", 10) == b"newer"
        with pytest.raises(FileNotFoundError):
            open_remote(f"{server.base}@none/a").read_small("b", 10)
        with pytest.raises(StoreRemoteError, match="there is no revision none"):
            open_remote(f"{server.base}@none/a").write("b", b"")

    def test_private_dataset_without_token(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch, fake_hub: "tuple[str, Hub]"
    ) -> None:
        server = start_server("hf")
        open_remote(server.url()).write("zarr.json", b"{}")
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        folder = open_remote(server.url())
        for ask in (lambda: folder.read_small("zarr.json", 2), lambda: folder.write("a", b"")):
            with pytest.raises(StoreRemoteError, match=r"401.*HF_TOKEN, hf auth login"):
                ask()

    def test_offline(self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch) -> None:
        server = start_server("hf")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(StoreRemoteError, match="HF_HUB_OFFLINE forbids the hub"):
            open_remote(server.url())


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "problem"),
        [
            ("ftp://host/a", "no URL of http://"),
            ("data/pile.zarr", "no URL of http://"),
            ("https:///a", "names no host"),
            ("s3:///a", "names no bucket"),
            ("s3://key:secret@bucket/a", "names no bucket"),
            ("gs://token:secret@bucket/a", "names no bucket"),
            ("az://key:secret@bucket/a", "names no container"),
            ("sftp://me:secret@host/a", "does not use SSH; .* rsync -a, or mount it with sshfs"),
            ("hf://team/name", "is no dataset"),
            ("hf://datasets/name", "is no dataset"),
            ("hf://datasets/team/name@/a", "is no dataset"),
        ],
    )
    def test_wrong_ones_are_refused_without_their_secrets(self, url: str, problem: str) -> None:
        with pytest.raises(SettingsError, match=problem) as error:
            open_remote(url)
        assert "secret" not in str(error.value)

    def test_no_secret_is_shown(self) -> None:
        folder = open_remote("https://me:secret@host:8443/pile.zarr?token=secret#secret")
        assert folder.url == "https://me@host:8443/pile.zarr"
        assert "secret" not in repr(folder)

    def test_nothing_is_imported_that_is_not_asked_for(self) -> None:
        code = (
            "import sys; from posae.store.remote.servers import open_remote\n"
            "print({'httpx2', 'obstore', 'huggingface_hub'} & set(sys.modules))"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ended.stdout.strip() == "set()"


def test_urls_are_told_from_paths() -> None:
    assert is_url("HTTPS://host/a")
    assert not is_url(Path("s3:/bucket"))
    assert shown("s3://bucket/a/") == "s3://bucket/a"


@pytest.mark.parametrize("path", ["c.0.0.0", "layer_5/zarr.json", "..a/b..", "ä/ü"])
def test_paths_inside(path: str) -> None:
    assert inside(path, "") == path
