"""What every kind of folder on a server does, and what each does of its own."""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from posae.store.errors import SettingsError, StoreDamagedError, StoreRemoteError
from posae.store.remote import folder as remote
from posae.store.remote import retries
from posae.store.remote.folder import RemoteFolder, inside, is_url, same, shown
from posae.store.remote.retries import PassingError
from posae.store.remote.servers import open_remote

if TYPE_CHECKING:
    from ..fakes import Hub
    from ..servers import Server, Sshd, StartServer

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


def other(path: str) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(path, b"other")]


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

    def test_walk(self, server: "Server", filled: RemoteFolder) -> None:
        server.put("pile.zarr.backup/zarr.json", b"beside it")
        found = filled.walk()
        if server.kind == "http":
            assert found is None
        else:
            assert found is not None
            assert sorted(found) == sorted(FILES)

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
        walked = empty.walk()
        assert walked is not None
        assert sorted(walked) == sorted(FILES)
        assert all(same(empty, path, data) for path, data in FILES.items())

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
        self,
        writable_server: "Server",
        empty: RemoteFolder,
        tmp_path: Path,
    ) -> None:
        data = os.urandom(1 << 20) * 16 + b"and more"
        (tmp_path / "large").write_bytes(data)
        empty.write("layer_5/c.0.0.0", tmp_path / "large")
        assert writable_server.files() == {"pile.zarr/layer_5/c.0.0.0": data}
        assert same(empty, "layer_5/c.0.0.0", tmp_path / "large")
        assert not same(empty, "layer_5/c.0.0.0", data[:-1] + b"E")
        if writable_server.kind != "hf":
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

    @pytest.mark.parametrize("name", ["a/../../b", "a\\b", "a\u202eb", "a//b"])
    @pytest.mark.parametrize("kind", ["s3", "gs", "hf"])
    def test_names_that_lead_outside_are_refused(
        self, start_server: "StartServer", kind: str, name: str
    ) -> None:
        server = start_server(kind)
        server.put(name, b"")
        found = open_remote(server.url()).walk()
        assert found is not None
        with pytest.raises(StoreRemoteError, match="no file inside the folder"):
            list(found)

    def test_folders_shown_as_files_are_passed_over(self, start_server: "StartServer") -> None:
        for kind in ("s3", "gs"):
            server = start_server(kind)
            server.put("layer_5/", b"")
            server.put("layer_5/c.0.0.0", b"")
            assert list(open_remote(server.url()).walk() or ()) == ["layer_5/c.0.0.0"]


class TestSsh:
    def test_pipes_and_folders_are_no_files(self, start_server: "StartServer", sshd: "Sshd") -> None:
        server = start_server("sftp")
        root = sshd.root / server.base.rpartition("/")[2]
        os.mkfifo(root / "pipe")
        (root / "folder").mkdir()
        folder = open_remote(server.url())
        for path in ("pipe", "folder"):
            with pytest.raises(StoreRemoteError, match="not a regular file"):
                folder.read(path, 0, 1, 1)

    def test_unknown_host_is_refused(
        self, start_server: "StartServer", sshd: "Sshd", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = start_server("sftp")
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh/config").write_text((sshd.home / ".ssh/config").read_text())
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(StoreRemoteError, match="an unknown host; connect once with ssh"):
            open_remote(server.url()).size_bytes("a")

    def test_host_with_another_key_is_refused(
        self, start_server: "StartServer", sshd: "Sshd", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = start_server("sftp")
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh/config").write_text((sshd.home / ".ssh/config").read_text())
        key = " ".join((sshd.root / "key.pub").read_text().split()[:2])
        (tmp_path / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{sshd.port} {key}\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(StoreRemoteError, match="its key is not that in known_hosts"):
            open_remote(server.url()).size_bytes("a")

    def test_no_key_no_entry(
        self, start_server: "StartServer", sshd: "Sshd", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start_server("sftp")
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh/known_hosts").write_text((sshd.home / ".ssh/known_hosts").read_text())
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(StoreRemoteError, match=r"lets us not in; looked in ~/\.ssh/config"):
            open_remote(f"sftp://127.0.0.1:{sshd.port}/anything").size_bytes("a")

    def test_nobody_there_is_tried_again(self, sshd: "Sshd", waits: list[float]) -> None:
        with pytest.raises(StoreRemoteError, match="cannot be reached by SSH, 7 times"):
            open_remote("sftp://127.0.0.1:1/anything").size_bytes("a")
        assert len(waits) == 6

    def test_proxy_jump_is_told(self, start_server: "StartServer", sshd: "Sshd", tmp_path: Path) -> None:
        start_server("sftp")
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh/config").write_text("Host far\n  ProxyJump near\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(tmp_path))
            with pytest.raises(StoreRemoteError, match="write ProxyCommand ssh -W %h:%p near"):
                open_remote("sftp://far/anything").size_bytes("a")

    def test_proxy_command(self, start_server: "StartServer", sshd: "Sshd", tmp_path: Path) -> None:
        server = start_server("sftp")
        server.put("a", b"1")
        shutil.copytree(sshd.home / ".ssh", tmp_path / ".ssh")
        code = (
            "import socket, sys, threading, os\n"
            "s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
            "def up():\n    while data := os.read(0, 65536): s.sendall(data)\n"
            "threading.Thread(target=up, daemon=True).start()\n"
            "while data := s.recv(65536): os.write(1, data)\n"
        )
        (tmp_path / "proxy.py").write_text(code)
        with (tmp_path / ".ssh/config").open("a") as config:
            config.write(f"  ProxyCommand {sys.executable} {tmp_path}/proxy.py %p\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(tmp_path))
            assert open_remote(server.url()).read_small("a", 9) == b"1"

    def test_a_file_that_is_cut_while_it_is_read(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = start_server("sftp")
        server.put("a", b"1" * 100_000)
        folder = cast(Any, open_remote(server.url()))

        def a_moment_ago(*_: Any) -> int:
            return 1_000_000

        monkeypatch.setattr(folder, "_size", a_moment_ago)
        with pytest.raises(StoreRemoteError, match="cut while it was read, 7 times"):
            folder.read("a", 50_000, 1_000_000, 1_000_000)

    def test_what_arrives_changed_is_not_kept(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = start_server("sftp")
        folder = cast(Any, open_remote(server.url()))
        send = folder._send

        def wrong(*words: Any) -> None:
            send(*words[:3], b"other")

        monkeypatch.setattr(folder, "_send", wrong)
        with pytest.raises(StoreRemoteError, match="did not arrive as it was sent"):
            folder.write("a", b"these")
        assert server.files() == {}

    def test_a_cut_line_is_made_anew(self, start_server: "StartServer", waits: list[float]) -> None:
        server = start_server("sftp")
        server.put("a", b"12")
        folder = cast(Any, open_remote(server.url()))
        assert folder.read("a", 0, 1, 2) == b"1"
        folder._line._client.get_transport().sock.close()
        assert folder.read("a", 1, 2, 2) == b"2"

    def test_what_fails_on_the_way_leaves_nothing(
        self, start_server: "StartServer", sshd: "Sshd", tmp_path: Path
    ) -> None:
        server = start_server("sftp")
        server.put("seal.json/in", b"a folder")
        with pytest.raises(StoreRemoteError, match="the server fails"):
            open_remote(server.url()).write("seal.json", b"{}")
        assert server.files() == {"seal.json/in": b"a folder"}


class TestStorage:
    """What Google's storage checks is what its fake checks: this is about what posae makes of it."""

    def test_lost_answer_to_what_was_new(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = start_server("gs")
        folder = cast(Any, open_remote(server.url()))
        answer = folder.answer
        asked: list[str] = []

        @contextmanager
        def lost(method: str, *words: Any) -> Generator[Any]:
            with answer(method, *words) as found:
                asked.append(method)
                if asked == ["PUT"]:
                    raise PassingError("the answer was lost")
                yield found

        monkeypatch.setattr(folder, "answer", lost)
        folder.write("claim", b"mine", only_new=True)
        assert server.files() == {"claim": b"mine"}
        assert asked.count("PUT") == 1

    def test_missing_bucket(self, start_server: "StartServer") -> None:
        start_server("gs")
        with pytest.raises(StoreRemoteError, match="there is no such bucket"):
            open_remote("gs://none/a").write("b", b"")

    def test_credentials_are_renewed_and_sent(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Credentials:
            renewed = 0
            valid = False

            def refresh(self, _: object) -> None:
                self.renewed += 1
                self.valid = True

            def apply(self, headers: Any) -> None:
                headers["Authorization"] = f"Bearer {self.renewed}"

        start_server("gs")
        monkeypatch.delenv("STORAGE_EMULATOR_HOST")

        def default(scopes: list[str]) -> tuple[Credentials, None]:
            return Credentials(), None

        monkeypatch.setattr("google.auth.default", default)
        folder = cast(Any, open_remote("gs://bucket/a"))
        request = folder._client.build_request("GET", "http://host/")
        for _ in range(2):
            next(folder._auth.auth_flow(request))
            assert request.headers["Authorization"] == "Bearer 1"


class TestS3:
    def test_every_body_goes_with_its_md5(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # S3 refuses a body that is not that of its Content-MD5; moto does not look.
        monkeypatch.setattr("posae.store.remote.s3.PIECE_BYTES", 5 << 20)
        folder = cast(Any, open_remote(start_server("s3").url()))
        sent: list[tuple[bytes, str]] = []

        def look(request: Any, **_: Any) -> None:
            if request.method == "PUT":
                sent.append((request.body.read(), request.headers["Content-MD5"].decode()))
                request.body.seek(0)

        folder._client.meta.events.register("before-send.s3", look)
        folder.write("small", b"small")
        folder.write("large", b"1" * (5 << 20) + b"2")
        assert [len(body) for body, _ in sent] == [5, 5 << 20, 1]
        for body, md5 in sent:
            assert base64.b64decode(md5) == hashlib.md5(body).digest()

    def test_a_body_that_arrived_changed_is_sent_again(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch, waits: list[float]
    ) -> None:
        server = start_server("s3")
        folder = cast(Any, open_remote(server.url()))
        put = folder._client.put_object
        errors = pytest.importorskip("botocore.exceptions")
        answers = iter([errors.ClientError({"Error": {"Code": "BadDigest"}}, "PutObject"), None])

        def fail_once(**words: Any) -> Any:
            if error := next(answers):
                raise error
            return put(**words)

        monkeypatch.setattr(folder._client, "put_object", fail_once)
        folder.write("a", b"these")
        assert server.files() == {"a": b"these"}
        assert len(waits) == 1

    def test_missing_bucket(self, start_server: "StartServer") -> None:
        start_server("s3")
        folder = open_remote("s3://no-such-bucket/a")
        for ask in (lambda: folder.read_small("a", 1), lambda: folder.write("a", b"")):
            with pytest.raises(StoreRemoteError, match="there is no such bucket"):
                ask()

    def test_without_credentials_requests_are_not_signed(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        server = start_server("s3")
        server.put("a", b"1")
        client = cast(Any, open_remote(server.url()))._client
        client.put_object_acl(Bucket="bucket", Key=f"{server.base.rpartition('/')[2]}/a", ACL="public-read")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert open_remote(server.url()).read("a", 0, 1, 1) == b"1"

    def test_parts_of_what_failed_are_removed(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("posae.store.remote.s3.PIECE_BYTES", 5 << 20)
        server = start_server("s3")
        folder = cast(Any, open_remote(server.url()))
        folder.write("large", b"1" * (6 << 20))
        with pytest.raises(FileExistsError):
            folder.write("large", b"2" * (6 << 20), only_new=True)
        assert server.files() == {"large": b"1" * (6 << 20)}
        assert not folder._client.list_multipart_uploads(Bucket="bucket").get("Uploads")

    def test_nobody_there_is_tried_again(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch, waits: list[float]
    ) -> None:
        start_server("s3")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        with pytest.raises(StoreRemoteError, match=r"^s3://bucket/a/b: .*cannot be reached.*7 times"):
            open_remote("s3://bucket/a").read("b", 0, 1, 1)
        assert len(waits) == 6


class TestHub:
    def test_what_arrives_changed_is_told(
        self, start_server: "StartServer", monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = start_server("hf")
        folder = cast(Any, open_remote(server.url()))
        folder.write("a", b"first")
        create = folder._api.create_commit

        def wrong(name: str, _: object, **more: Any) -> Any:
            return create(name, other("a"), **more)

        monkeypatch.setattr(folder._api, "create_commit", wrong)
        with pytest.raises(StoreRemoteError, match="did not arrive as it was sent"):
            folder.write("a", b"these")

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
            ("sftp://host", "is no folder"),
            ("sftp:///a", "is no folder"),
            ("sftp://me:secret@host/a", "no password in a URL"),
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

    @pytest.mark.parametrize("scheme", [s for s, extra in remote.SCHEMES.items() if extra])
    def test_missing_package_says_what_to_install(self, scheme: str) -> None:
        # A process of its own, where its package cannot be imported.
        package = {"s3": "boto3", "gs": "google.auth", "sftp": "paramiko"}[scheme]
        code = (
            f"import sys; sys.modules[{package!r}] = None\n"
            f"from posae.store.remote.servers import open_remote\nopen_remote('{scheme}://host/a')"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert ended.stderr.strip().endswith(
            f"{scheme}:// needs the package {package}; run: pip install 'posae[{remote.SCHEMES[scheme]}]'"
        )

    def test_nothing_is_imported_that_is_not_asked_for(self) -> None:
        code = (
            "import sys; from posae.store.remote.servers import open_remote\n"
            "print({'httpx2', 'boto3', 'paramiko', 'google.auth', 'huggingface_hub'} & set(sys.modules))"
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
