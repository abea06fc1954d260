"""What every kind of folder on a server does, and what each does of its own."""

import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import pytest
from servers import files_of, moto_client

from posae.pipeline.stores.publishing import publish
from posae.store import ActivationStore
from posae.store.card import write_card
from posae.store.errors import (
    SettingsError,
    StoreDamagedError,
    StoreFormatError,
    StoreMismatchError,
    StoreRemoteError,
)
from posae.store.remote import retries
from posae.store.remote.cache import PartCache
from posae.store.remote.folder import RemoteFolder, inside, is_url, shown
from posae.store.remote.servers import open_remote
from posae.store.verify import verify

if TYPE_CHECKING:
    from ..conftest import MakeStore
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


def moved(_: int) -> None:
    """Nobody counts."""


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


class TestPublishing:
    """Stores published to each kind of server, by what the server lists alone."""

    @pytest.fixture
    def made(self, make_store: "MakeStore", tmp_path: Path) -> ActivationStore:
        made = make_store(tmp_path / "made.zarr", layers=(1,), n_contexts=24)
        write_card(ActivationStore.open(made.root))
        return ActivationStore.open(made.root)

    @pytest.mark.parametrize("left", ["all", "half", "none"])
    def test_interrupted_and_begun_again(
        self, writable_server: "Server", empty: RemoteFolder, made: ActivationStore, left: str, tmp_path: Path
    ) -> None:
        whole = files_of(Path(made.files.root))
        method = "commit" if writable_server.kind == "hf" else "write"
        write = getattr(empty, method)
        for limit in (1, len(whole) // 2):
            counter = itertools.count()

            def stop(*words: Any, limit: int = limit, counter: Any = counter, **more: Any) -> None:
                if next(counter) == limit:
                    raise StoreRemoteError("stopped")
                write(*words, **more)

            with patch.object(empty, method, stop), suppress(StoreRemoteError):
                publish(made, empty, moved)
            for number, path in enumerate(sorted(writable_server.files())):
                if left == "none" or (left == "half" and number % 2):
                    writable_server.remove(path)
            publish(made, empty, moved)
            assert writable_server.files() == {f"pile.zarr/{path}": data for path, data in whole.items()}
            found = ActivationStore.open(empty.url, PartCache(tmp_path / f"cache-{limit}"))
            assert not verify(found).damaged
            assert publish(made, empty, moved) == 0
            writable_server.remove("pile.zarr/layer_1/zarr.json")
            assert publish(made, empty, moved) == 1, "a seal whose file is missing is repaired"
            for path in list(writable_server.files()):
                writable_server.remove(path)

    def test_what_is_there_is_compared_with_what_was_sealed(
        self, writable_server: "Server", empty: RemoteFolder, made: ActivationStore
    ) -> None:
        whole = files_of(Path(made.files.root))
        for path, data in whole.items():
            if path != "seal.json":
                writable_server.put(f"pile.zarr/{path}", data)
        assert publish(made, empty, moved) == 1
        writable_server.remove("pile.zarr/seal.json")
        shard = "pile.zarr/layer_1/c.0.0.0"
        other = bytes(byte ^ 1 for byte in whole["layer_1/c.0.0.0"])
        writable_server.put(shard, other)
        with pytest.raises(StoreMismatchError, match=r"layer_1/c\.0\.0\.0 exists and is not of this store"):
            publish(made, empty, moved)
        assert writable_server.files()[shard] == other
        assert "pile.zarr/seal.json" not in writable_server.files()

    def test_a_folder_of_something_else_is_left_alone(
        self, writable_server: "Server", empty: RemoteFolder, made: ActivationStore
    ) -> None:
        writable_server.put("pile.zarr/thesis.tex", b"mine")
        with pytest.raises(StoreFormatError, match="is not empty and holds no store"):
            publish(made, empty, moved)
        assert writable_server.files() == {"pile.zarr/thesis.tex": b"mine"}


@pytest.mark.parametrize("kind", ["s3", "gs", "az"])
class TestBuckets:
    def test_missing_bucket(self, start_server: "StartServer", kind: str) -> None:
        start_server(kind)
        folder = open_remote(f"{kind}://no-such-bucket/a")
        asks: list[Callable[[], object]] = [
            lambda: folder.read_small("a", 1),
            lambda: folder.write("a", b""),
            folder.list_files,
        ]
        for ask in asks:
            with pytest.raises(StoreRemoteError, match="there is no such bucket"):
                ask()

    def test_without_credentials_what_is_public_is_read_and_nothing_is_written(
        self, start_server: "StartServer", kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        server = start_server(kind)
        server.put("a", b"1")
        for name in list(os.environ):
            if re.match("AWS_.*(KEY|PROFILE)|STORAGE_EMULATOR|AZURE_STORAGE_USE", name):
                monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
        if kind == "az":
            monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1")
            url = os.environ["AZURITE_BLOB_STORAGE_URL"]
            monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{url}/devstoreaccount1")
            assert open_remote(server.url()).read("a", 0, 1, 1) == b"1"
        with pytest.raises(StoreRemoteError, match="writing needs credentials; looked for them in"):
            open_remote(server.url()).write("b", b"2")
        assert server.files() == {"a": b"1"}


class TestS3:
    def test_credentials_of_the_aws_tools(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        server = start_server("s3")
        config = f"[profile team]\nregion = us-east-1\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n"
        keys = "[team]\naws_access_key_id = made\naws_secret_access_key = up\n"
        (tmp_path / "config").write_text(config)
        (tmp_path / "keys").write_text(keys)
        for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
            monkeypatch.delenv(f"AWS_{name}")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
        monkeypatch.setenv("AWS_PROFILE", "team")
        open_remote(server.url()).write("a", b"1")
        assert server.files() == {"a": b"1"}
        (tmp_path / "keys").write_text("not of that form")
        with pytest.raises(SettingsError, match="is no file of the AWS tools"):
            open_remote(server.url())

    def test_what_is_public_is_read_without_credentials(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moto: str
    ) -> None:
        server = start_server("s3")
        server.put("a", b"1")
        client = moto_client(pytest.importorskip("boto3"), moto)
        client.put_object_acl(Bucket="bucket", Key=f"{server.base.rpartition('/')[2]}/a", ACL="public-read")
        client.close()
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert open_remote(server.url()).read("a", 0, 1, 1) == b"1"

    def test_nobody_there_is_tried_again(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch, waits: list[float]
    ) -> None:
        start_server("s3")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        with pytest.raises(StoreRemoteError, match=r"^s3://bucket/a/b: .*cannot be reached.*7 times"):
            open_remote("s3://bucket/a").read("b", 0, 1, 1)
        assert len(waits) == 6


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

    def test_how_long_the_hub_wants_to_be_left_alone_is_waited_for(
        self, start_server: "StartServer", fake_hub: "tuple[str, Hub]", waits: list[float]
    ) -> None:
        server = start_server("hf")
        server.put("a", b"1")
        folder = open_remote(server.url())
        asks: list[Callable[[], object]] = [
            lambda: folder.read("a", 0, 1, 1),
            lambda: folder.write("b", b"2"),
        ]
        for ask in asks:
            for headers, seconds in [
                ({"ratelimit": '"resolvers";r=0;t=240'}, 241),
                ({"Retry-After": "70"}, 70),
            ]:
                waits.clear()
                fake_hub[1].busy = [headers] * 2
                ask()
                assert waits, headers
                assert seconds <= waits[0] < seconds + 1
        assert server.files() == {"a": b"1", "b": b"2"}

    def test_offline(self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch) -> None:
        server = start_server("hf")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(StoreRemoteError, match="HF_HUB_OFFLINE forbids the hub"):
            open_remote(server.url())


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "problem"),
        [
            ("ftp://host/a", "^ftp://host/a: posae cannot open this kind of URL; use one of http://"),
            ("data/pile.zarr", "cannot open this kind of URL; use one of http://"),
            ("https:///a", "names no host"),
            ("s3:///a", "names no bucket"),
            ("s3://key:secret@bucket/a", "names no bucket"),
            ("gs://token:secret@bucket/a", "names no bucket"),
            ("az://key:secret@bucket/a", "names no container"),
            ("az://container/a", "set AZURE_STORAGE_ACCOUNT_NAME"),
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
