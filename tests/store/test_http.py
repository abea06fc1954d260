"""Web servers that are broken, busy or hostile; nginx as it may be set up; and the tries of all servers."""

import itertools
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posae.store.errors import StoreDamagedError, StoreRemoteError
from posae.store.remote import objects, retries
from posae.store.remote.objects import WebFolder
from posae.store.remote.retries import RetryableError, retry

if TYPE_CHECKING:
    from ..servers import Server, StartServer

DATA = bytes(range(256)) * 4
LARGE = random.Random(1).randbytes(3 << 20)
Line = Callable[[socket.socket, str], object]


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited between tries; nothing really is."""
    waited: list[float] = []
    monkeypatch.setattr(retries, "sleep", waited.append)
    return waited


class Raw:
    """A server that answers each connection with the next line of a script, and the last for ever."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/pile.zarr"
        self.requests: list[str] = []
        self.script: list[Line] = []
        self.n_answered = 0
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                request = ""
                while "\r\n\r\n" not in request:
                    data = connection.recv(65536).decode()
                    if not data:
                        break
                    request += data
                if request:
                    self.requests.append(request)
                    # The other side hangs up on what is endless, as it should.
                    with suppress(OSError):
                        self.n_answered += 1
                        self.script[min(self.n_answered, len(self.script)) - 1](connection, request)

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self.thread.join()


@pytest.fixture
def raw() -> Generator[Raw]:
    server = Raw()
    yield server
    server.close()


def answer(status: str, body: bytes = b"", *, length: int | None = None, **headers: str) -> Line:
    """An answer, with a length of its own where it should lie; the connection ends after it."""
    headers = {"Content-Length": str(len(body) if length is None else length), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items() if value)
    data = f"HTTP/1.1 {status}\r\n{head}Connection: close\r\n\r\n".encode() + body
    return lambda connection, _: connection.sendall(data)


def part(start: int, stop: int, of: int = len(DATA)) -> Line:
    """An honest answer to a request for a range."""
    return answer("206 OK", DATA[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{of}")


def endless(head: str) -> Line:
    def send(connection: socket.socket, _: str) -> None:
        connection.sendall(f"HTTP/1.1 {head}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        while True:
            connection.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")

    return send


def honest(data: bytes, *, cut_after: int | None = None, ranges: bool = True) -> Line:
    """What was asked for, or its beginning."""

    def send(connection: socket.socket, request: str) -> None:
        asked = re.search(r"(?i)range: bytes=(\d+)-(\d+)", request) if ranges else None
        start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(data))
        there = {"Content_Range": f"bytes {start}-{stop - 1}/{len(data)}"} if asked else {}
        body, status = data[start:stop], "206 Part" if asked else "200 OK"
        answer(status, body[:cut_after], length=len(body), **there)(connection, request)

    return send


class TestCuts:
    def test_a_cut_body_goes_on_where_it_stopped(self, raw: Raw) -> None:
        cut = honest(LARGE, cut_after=800_000)
        raw.script = [cut, cut, cut, honest(LARGE)]
        assert WebFolder(raw.url).read("c", 9, 2_500_000, len(LARGE)) == LARGE[9:2_500_000]
        asked = [int(request.lower().partition("bytes=")[2].partition("-")[0]) for request in raw.requests]
        assert asked[0] == 9
        assert all(300_000 < late - early <= 800_000 for early, late in itertools.pairwise(asked))

    @pytest.mark.parametrize("ranges", [True, False])
    def test_a_whole_file_goes_on_where_it_stopped(self, raw: Raw, ranges: bool) -> None:
        raw.script = [
            honest(LARGE, cut_after=2_000_000, ranges=ranges),
            *[honest(LARGE, ranges=ranges)] * 2,
        ]
        assert b"".join(WebFolder(raw.url).pieces("c", len(LARGE))) == LARGE

    def test_a_server_without_ranges_begins_anew(self, raw: Raw) -> None:
        raw.script = [
            answer("200 OK", DATA[:100], length=1024),
            answer("200 OK", DATA),
            answer("200 OK", DATA),
        ]
        assert b"".join(WebFolder(raw.url).pieces("c", 1024)) == DATA

    def test_a_cut_small_file_begins_anew(self, raw: Raw) -> None:
        raw.script = [answer("200 OK", DATA[:100], length=1024), answer("200 OK", DATA)]
        assert WebFolder(raw.url).read_small("c", 1024) == DATA

    def test_a_server_that_only_cuts_is_given_up(self, raw: Raw, waits: list[float]) -> None:
        raw.script = [lambda connection, _: connection.close()]
        with pytest.raises(StoreRemoteError, match=rf"^{raw.url}/c: the connection was cut, 7 times"):
            WebFolder(raw.url).read("c", 0, 1, 1)
        assert len(raw.requests) == 7
        assert all(early < late for early, late in itertools.pairwise(waits[::2]))
        assert 10 < sum(waits) < 40

    def test_nobody_there(self, waits: list[float]) -> None:
        with pytest.raises(StoreRemoteError, match=r"cannot be reached, 7 times"):
            WebFolder("http://127.0.0.1:1/pile.zarr").size_bytes("c")
        assert len(waits) == 6

    def test_no_such_host_is_told_at_once(self, waits: list[float]) -> None:
        with pytest.raises(StoreRemoteError, match=r"there is no such host"):
            WebFolder("http://no-such-host.invalid/pile.zarr").size_bytes("c")
        assert not waits

    def test_silence_and_drips_are_not_waited_for(self, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
        def drip(connection: socket.socket, request: str) -> None:
            start = int(request.lower().partition("bytes=")[2].partition("-")[0])
            there = f"bytes {start}-999/1024"
            answer("206 OK", length=1000 - start, Content_Range=there)(connection, request)
            for i in range(start, 1000):
                time.sleep(0.02)
                connection.sendall(DATA[i : i + 1])

        monkeypatch.setattr(objects, "_PART_TIMES", {"timeout": timedelta(seconds=0.1)})

        def be_silent(connection: socket.socket, _: str) -> None:
            time.sleep(0.2)

        for script in (drip, be_silent):
            raw.script = [script]
            with pytest.raises(StoreRemoteError, match="7 times"):
                WebFolder(raw.url).read("c", 0, 1000, 1024)


class TestBusy:
    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    def test_is_tried_again(self, raw: Raw, status: int, waits: list[float]) -> None:
        raw.script = [answer(f"{status} Later"), answer(f"{status} Later"), part(0, 4)]
        assert WebFolder(raw.url).read("c", 0, 4, 1024) == DATA[:4]
        assert len(waits) == 2

    def test_in_the_end_it_is_given_up(self, raw: Raw) -> None:
        raw.script = [answer("503 Later")]
        with pytest.raises(StoreRemoteError, match=r"answers 503 \(Service Unavailable\), 7 times"):
            WebFolder(raw.url).read_small("c", 4)

    @pytest.mark.parametrize("status", [400, 418, 501])
    def test_other_errors_are_told_at_once(self, raw: Raw, status: int, waits: list[float]) -> None:
        raw.script = [answer(f"{status} No")]
        for ask in (
            lambda: WebFolder(raw.url).read("c", 0, 4, 1024),
            lambda: WebFolder(raw.url).read_small("c", 4),
            lambda: WebFolder(raw.url).size_bytes("c"),
        ):
            with pytest.raises(StoreRemoteError, match=f"{raw.url}/c: the server answers {status}"):
                ask()
        assert not waits


OTHER_RANGES = [
    part(1, 5),
    part(0, 3),
    part(0, 5),
    answer("206 OK", DATA[:4]),
    answer("206 OK", DATA[:4], Content_Range="bytes 0-3/*"),
    answer("206 OK", DATA[:4], Content_Range="bytes 0-3/" + "9" * 4000),
    answer("206 OK", DATA[:4], Content_Range="items 0-3/1024"),
]
A_PART = "bytes 0-3/1024"


class TestLies:
    @pytest.mark.parametrize(
        ("script", "problem"),
        [
            *(([script, answer("200 OK", DATA)], "another range") for script in OTHER_RANGES),
            ([answer("416 No", Content_Range="bytes */1024"), answer("200 OK", DATA)], "another range"),
            ([answer("200 OK", DATA)], "sends whole files only; copy the store from it: posae copy"),
            ([answer("206 OK", DATA[:9], Content_Range=A_PART)], "more than was asked for"),
            ([endless("206 OK\r\nContent-Range: bytes 0-3/1024")], "does not say how large"),
            ([endless("200 OK")], "sends whole files only"),
            ([answer("206 OK", DATA[:4], Content_Range=A_PART, Content_Encoding="gzip")], "compresses"),
            ([answer("302 No", Location="ftp://127.0.0.1/c")], "redirects to what is no web server"),
            ([answer("302 No", Location="/c")], "redirects in a circle"),
            ([answer("302 No", Location="http://127.0.0.1:x/c")], "."),
        ],
        ids=range(16),
    )
    def test_about_a_part_are_found_at_once(
        self, raw: Raw, script: list[Line], problem: str, waits: list[float]
    ) -> None:
        raw.script = script
        with pytest.raises(StoreRemoteError, match=problem):
            WebFolder(raw.url).read("c", 0, 4, 1024)
        assert not waits

    @pytest.mark.parametrize(
        ("script", "problem"),
        [
            ([part(0, 4, of=1023)], "1,023 bytes, not 1,024"),
            ([answer("416 No"), answer("200 OK", DATA[:3])], "3 bytes, not 1,024"),
            ([part(0, 3, of=3), answer("200 OK", DATA[:3])], "3 bytes, not 1,024"),
        ],
        ids=["part", "no part", "less"],
    )
    def test_changed_files(self, raw: Raw, script: list[Line], problem: str) -> None:
        raw.script = script
        with pytest.raises(StoreDamagedError, match=f"^c: it changed on the server, where it has {problem}"):
            WebFolder(raw.url).read("c", 0, 4, 1024)

    def test_whole_files_that_changed(self, raw: Raw) -> None:
        raw.script = [answer("200 OK", DATA)]
        with pytest.raises(StoreDamagedError, match="it changed on the server"):
            WebFolder(raw.url).read("c", 0, 1000, 1000)
        with pytest.raises(StoreDamagedError, match="it changed on the server"):
            list(WebFolder(raw.url).pieces("c", 1000))

    def test_small_files_that_are_large(self, raw: Raw) -> None:
        raw.script = [answer("200 OK", DATA)]
        with pytest.raises(StoreDamagedError, match="larger than the 100 bytes"):
            WebFolder(raw.url).read_small("c", 100)

    def test_size_that_is_not_told(self, raw: Raw) -> None:
        raw.script = [endless("200 OK")]
        folder = WebFolder(raw.url)
        asks: list[Callable[[], object]] = [lambda: folder.size_bytes("c"), lambda: folder.read_small("c", 9)]
        for ask in asks:
            with pytest.raises(StoreRemoteError, match="does not say how large the file is"):
                ask()

    @settings(max_examples=50, deadline=None)
    @given(head=st.binary(max_size=200))
    def test_whatever_comes_is_one_error(self, head: bytes) -> None:
        raw = Raw()
        raw.script = [lambda connection, _: connection.sendall(b"HTTP/1.1 206 " + head)]
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(retries, "N_TRIES", 1)
                with pytest.raises((StoreRemoteError, StoreDamagedError)) as error:
                    WebFolder(raw.url).read("c", 0, 4, 1024)
            assert "\n" not in str(error.value)
        finally:
            raw.close()


class TestCredentials:
    def test_those_in_the_url(self, raw: Raw) -> None:
        raw.script = [part(0, 4)]
        folder = WebFolder(raw.url.replace("//", "//me:pass%20word@") + "?key=1")
        folder.read("c d", 0, 4, 1024)
        assert raw.requests[0].startswith("GET /pile.zarr/c%20d?key=1 HTTP/1.1\r\n")
        assert "authorization: basic bwu6cgfzcyb3b3jk" in raw.requests[0].lower()

    def test_those_of_netrc(self, raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word")
        (tmp_path / "netrc").chmod(0o600)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        raw.script = [part(0, 4)]
        WebFolder(raw.url).read("c", 0, 4, 1024)
        assert "authorization: basic bwu6d29yza==" in raw.requests[0].lower()

    def test_a_redirect_takes_them_to_the_same_server_only(self, raw: Raw) -> None:
        other = Raw()
        other.script = [part(0, 4)]
        for place, user in [(f"127.0.0.1:{other.port}", None), (f"127.0.0.1:{raw.port}", "bwu6c2vjcmv0")]:
            raw.n_answered = 0
            raw.script = [answer("302 No", Location=f"http://you:other@{place}/d"), part(0, 4)]
            WebFolder(raw.url.replace("//", "//me:secret@")).read("c", 0, 4, 1024)
            last = (other if user is None else raw).requests[-1].lower()
            assert ("authorization" in last) == (user is not None)
            assert user is None or f"authorization: basic {user}" in last
        other.close()

    def test_errors_and_logs_do_not_show_them(self, raw: Raw, caplog: pytest.LogCaptureFixture) -> None:
        url = raw.url.replace("//", "//me:secret@") + "?token=secret"
        caplog.set_level("INFO")
        scripts: list[Line] = [
            answer("404 No"),
            answer("403 No"),
            answer("503 No"),
            answer("302 No", Location="/pile.zarr/c?token=secret"),
            part(0, 3),
            lambda connection, _: connection.close(),
        ]
        for script in scripts:
            raw.script = [script]
            with pytest.raises((StoreRemoteError, StoreDamagedError, FileNotFoundError)) as error:
                WebFolder(url).read("c", 0, 4, 1024)
            assert "secret" not in f"{error.value}{error.value.__cause__}"
        assert "secret" not in caplog.text


class TestNginx:
    @pytest.fixture
    def web(self, start_server: "StartServer") -> "tuple[Server, str, str]":
        server = start_server("http")
        server.put("c", DATA)
        root, _, name = server.base.rpartition("/")
        return server, root, name

    def test_password(self, web: "tuple[Server, str, str]", monkeypatch: pytest.MonkeyPatch) -> None:
        _, root, name = web
        monkeypatch.setenv("NETRC", "/dev/null")
        url = f"{root}/locked/{name}"
        assert WebFolder(url.replace("//", "//me:secret@", 1)).read("c", 2, 5, 1024) == DATA[2:5]
        for wrong in (url, url.replace("//", "//me:wrong@", 1)):
            with pytest.raises(StoreRemoteError, match=r"401 \(Unauthorized\).*~/\.netrc"):
                WebFolder(wrong).read("c", 2, 5, 1024)

    def test_forbidden(self, web: "tuple[Server, str, str]") -> None:
        with pytest.raises(StoreRemoteError, match=r"403 \(Forbidden\): not there, or not for you"):
            WebFolder(f"{web[1]}/forbidden").read_small("c", 1)

    def test_redirects(self, web: "tuple[Server, str, str]") -> None:
        _, root, name = web
        assert WebFolder(f"{root}/moved/{name}").read("c", 2, 5, 1024) == DATA[2:5]
        with pytest.raises(StoreRemoteError, match="in a circle"):
            WebFolder(f"{root}/circle").read("c", 2, 5, 1024)

    def test_without_ranges_only_whole_files(self, web: "tuple[Server, str, str]") -> None:
        _, root, name = web
        folder = WebFolder(f"{root}/whole/{name}")
        assert folder.read("c", 0, 1024, 1024) == DATA
        assert b"".join(folder.pieces("c", 1024)) == DATA
        assert folder.size_bytes("c") == 1024
        with pytest.raises(StoreRemoteError, match="sends whole files only"):
            folder.read("c", 0, 4, 1024)


class TestRetries:
    def test_what_passes_is_done_again_until_it_is_done(self, waits: list[float]) -> None:
        left = iter([RetryableError("no"), RetryableError("no", 200), 5])

        def action() -> int:
            found = next(left)
            if isinstance(found, RetryableError):
                raise found
            return found

        assert retry(action, "here") == 5
        assert 200 <= waits[1] < 201


class TestForks:
    def test_a_forked_process_says_what_to_do(self, raw: Raw) -> None:
        raw.script = [part(0, 4)]
        folder = WebFolder(raw.url)
        folder.read("c", 0, 4, 1024)
        for other in (folder, WebFolder(raw.url)):
            receiver, sender = os.pipe()
            child = os.fork()
            if not child:
                try:
                    other.read("c", 0, 4, 1024)
                except StoreRemoteError as error:
                    os.write(sender, str(error).encode())
                finally:
                    os._exit(0)
            os.close(sender)
            with os.fdopen(receiver) as said:
                assert "start it by spawn" in said.read()
            os.waitpid(child, 0)

    def test_a_process_that_was_forked_before_reads(self, raw: Raw, tmp_path: Path) -> None:
        raw.script = [part(0, 4)]
        code = (
            "import os\nfrom posae.store.remote.servers import open_remote\n"
            f"folder = open_remote({raw.url!r})\nchild = os.fork()\n"
            "if not child:\n    os._exit(folder.read('c', 0, 4, 1024)[3])\n"
            "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert ended.stdout.strip() == "3", ended.stderr
