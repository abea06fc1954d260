"""Web servers that are broken, busy or hostile; nginx as it may be set up; and the tries of all servers."""

import itertools
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posae.store.errors import StoreDamagedError, StoreRemoteError
from posae.store.remote import http, retries
from posae.store.remote.http import HttpFolder
from posae.store.remote.retries import PassingError, retry_after_seconds, tried, tried_once

if TYPE_CHECKING:
    from ..servers import Server, StartServer

DATA = bytes(range(256)) * 4
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
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        for i in itertools.count():
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
                        self.script[min(i, len(self.script) - 1)](connection, request)

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


class TestCuts:
    def test_a_cut_body_goes_on_where_it_stopped(self, raw: Raw) -> None:
        raw.script = [
            answer("206 OK", DATA[:100], length=1000, Content_Range="bytes 0-999/1024"),
            answer("206 OK", DATA[100:400], length=900, Content_Range="bytes 100-999/1024"),
            part(400, 1000),
        ]
        assert HttpFolder(raw.url).read("c", 0, 1000, 1024) == DATA[:1000]
        asked = [line for request in raw.requests for line in request.splitlines() if "range" in line.lower()]
        assert [line.partition("=")[2] for line in asked] == ["0-999", "100-999", "400-999"]

    def test_a_server_without_ranges_begins_anew(self, raw: Raw) -> None:
        raw.script = [answer("200 OK", DATA[:100], length=1024), answer("200 OK", DATA)]
        assert HttpFolder(raw.url).read("c", 0, 1024, 1024) == DATA

    def test_a_cut_small_file_begins_anew(self, raw: Raw) -> None:
        raw.script = [answer("200 OK", DATA[:100], length=1024), answer("200 OK", DATA)]
        assert HttpFolder(raw.url).read_small("c", 1024) == DATA

    def test_a_server_that_only_cuts_is_given_up(self, raw: Raw, waits: list[float]) -> None:
        raw.script = [lambda connection, _: connection.close()]
        with pytest.raises(StoreRemoteError, match=rf"^{raw.url}/c: the connection was cut, 7 times"):
            HttpFolder(raw.url).read("c", 0, 1, 1)
        assert len(raw.requests) == 7
        assert all(early < late for early, late in itertools.pairwise(waits[::2]))
        assert sum(waits) < 40

    def test_nobody_there(self, waits: list[float]) -> None:
        with pytest.raises(StoreRemoteError, match=r"cannot be reached, 7 times"):
            HttpFolder("http://127.0.0.1:1/pile.zarr").size_bytes("c")
        assert len(waits) == 6

    def test_no_such_host_is_told_at_once(self, waits: list[float]) -> None:
        with pytest.raises(StoreRemoteError, match=r"there is no such host"):
            HttpFolder("http://no-such-host.invalid/pile.zarr").size_bytes("c")
        assert not waits

    def test_silence_is_not_waited_for(self, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http, "_TIMEOUT", 0.1)
        raw.script = [lambda connection, _: connection.recv(1), part(0, 1)]
        assert HttpFolder(raw.url).read("c", 0, 1, 1024) == DATA[:1]

    def test_drips_are_not_waited_for(self, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
        def drip(connection: socket.socket, request: str) -> None:
            start = int(request.lower().partition("bytes=")[2].partition("-")[0])
            there = f"bytes {start}-999/1024"
            answer("206 OK", length=1000 - start, Content_Range=there)(connection, request)
            for i in range(start, 1000):
                time.sleep(0.02)
                connection.sendall(DATA[i : i + 1])

        monkeypatch.setattr(http, "_BODY_SECONDS", 0.1)
        raw.script = [drip]
        with pytest.raises(StoreRemoteError, match="sends too slowly, 7 times"):
            HttpFolder(raw.url).read("c", 0, 1000, 1024)


class TestBusy:
    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    def test_is_tried_again(self, raw: Raw, status: int, waits: list[float]) -> None:
        raw.script = [answer(f"{status} Later"), answer(f"{status} Later"), part(0, 4)]
        assert HttpFolder(raw.url).read("c", 0, 4, 1024) == DATA[:4]
        assert len(waits) == 2

    def test_the_server_says_for_how_long(self, raw: Raw, waits: list[float]) -> None:
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
        raw.script = [
            answer("429 Later", Retry_After="7"),
            answer("503 Later", Retry_After=date),
            answer("503 Later", Retry_After="86400"),
            answer("503 Later", Retry_After="soon"),
            part(0, 4),
        ]
        assert HttpFolder(raw.url).read("c", 0, 4, 1024) == DATA[:4]
        assert 7 <= waits[0] < 8
        assert 28 < waits[1] < 31
        assert 60 <= waits[2] < 61
        assert waits[3] <= 4

    def test_in_the_end_it_is_given_up(self, raw: Raw) -> None:
        raw.script = [answer("503 Later")]
        with pytest.raises(StoreRemoteError, match=r"answers 503 \(Service Unavailable\), 7 times"):
            HttpFolder(raw.url).read_small("c", 4)

    @pytest.mark.parametrize("status", [400, 418, 501, 999])
    def test_other_errors_are_told_at_once(self, raw: Raw, status: int, waits: list[float]) -> None:
        raw.script = [answer(f"{status} No")]
        for ask in (
            lambda: HttpFolder(raw.url).read("c", 0, 4, 1024),
            lambda: HttpFolder(raw.url).read_small("c", 4),
            lambda: HttpFolder(raw.url).size_bytes("c"),
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
    answer("416 No", Content_Range="bytes */1024"),
]
A_PART = "bytes 0-3/1024"


class TestLies:
    @pytest.mark.parametrize(
        ("script", "problem"),
        [
            *((script, "another range") for script in OTHER_RANGES),
            (answer("200 OK", DATA), "sends whole files only"),
            (answer("206 OK", DATA[:9], Content_Range=A_PART), "more than was asked for"),
            (endless("206 OK\r\nContent-Range: bytes 0-3/1024"), "more than was asked for"),
            (endless("200 OK"), "sends whole files only"),
            (
                answer("206 OK", DATA[:4], Content_Range=A_PART, Content_Encoding="gzip"),
                "compresses",
            ),
            (answer("302 No", Location="http://127.0.0.2/c"), "redirects to http://127.0.0.2; if you trust"),
            (answer("302 No", Location="ftp://127.0.0.1/c"), "redirects to ftp://127.0.0.1; if you trust"),
            (answer("302 No", Location="//127.0.0.1:1/c"), "redirects to http://127.0.0.1; if you trust"),
            (answer("302 No", Location="/c"), "redirects in a circle"),
            (answer("302 No", Location="http://127.0.0.1:x/c"), "no URL that can be asked for"),
        ],
        ids=range(18),
    )
    def test_about_a_part_are_found_at_once(
        self, raw: Raw, script: Line, problem: str, waits: list[float]
    ) -> None:
        raw.script = [script]
        with pytest.raises(StoreRemoteError, match=problem):
            HttpFolder(raw.url).read("c", 0, 4, 1024)
        assert not waits

    @pytest.mark.parametrize(
        ("script", "problem"),
        [
            (part(0, 4, of=1023), "1,023 bytes, not 1,024"),
            (answer("416 No", Content_Range="bytes */3"), "3 bytes, not 1,024"),
        ],
        ids=["part", "no part"],
    )
    def test_changed_files(self, raw: Raw, script: Line, problem: str) -> None:
        raw.script = [script]
        with pytest.raises(StoreDamagedError, match=f"^c: it changed on the server, where it has {problem}"):
            HttpFolder(raw.url).read("c", 0, 4, 1024)

    @pytest.mark.parametrize("script", [answer("200 OK", DATA), endless("200 OK")], ids=["told", "endless"])
    def test_whole_files_that_changed(self, raw: Raw, script: Line) -> None:
        raw.script = [script]
        with pytest.raises(StoreDamagedError, match="it changed on the server"):
            HttpFolder(raw.url).read("c", 0, 1000, 1000)

    @pytest.mark.parametrize("script", [answer("200 OK", DATA), endless("200 OK")], ids=["told", "endless"])
    def test_small_files_without_end(self, raw: Raw, script: Line) -> None:
        raw.script = [script]
        with pytest.raises(StoreDamagedError, match="larger than the 100 bytes"):
            HttpFolder(raw.url).read_small("c", 100)

    def test_size_that_is_not_told(self, raw: Raw) -> None:
        raw.script = [endless("200 OK")]
        with pytest.raises(StoreRemoteError, match="does not say how large it is"):
            HttpFolder(raw.url).size_bytes("c")

    @settings(max_examples=50, deadline=None)
    @given(head=st.binary(max_size=200))
    def test_whatever_comes_is_one_error(self, head: bytes) -> None:
        raw = Raw()
        raw.script = [lambda connection, _: connection.sendall(b"HTTP/1.1 206 " + head)]
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(retries, "N_TRIES", 1)
                with pytest.raises((StoreRemoteError, StoreDamagedError)) as error:
                    HttpFolder(raw.url).read("c", 0, 4, 1024)
            assert "\n" not in str(error.value)
        finally:
            raw.close()


class TestCredentials:
    def test_those_in_the_url(self, raw: Raw) -> None:
        raw.script = [part(0, 4)]
        folder = HttpFolder(raw.url.replace("//", "//me:pass%20word@") + "?key=1")
        folder.read("c d", 0, 4, 1024)
        assert raw.requests[0].startswith("GET /pile.zarr/c%20d?key=1 HTTP/1.1\r\n")
        assert "authorization: basic bwu6cgfzcyb3b3jk" in raw.requests[0].lower()

    def test_those_of_netrc(self, raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word")
        (tmp_path / "netrc").chmod(0o600)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        raw.script = [part(0, 4)]
        HttpFolder(raw.url).read("c", 0, 4, 1024)
        assert "authorization: basic bwu6d29yza==" in raw.requests[0].lower()

    def test_a_redirect_takes_no_user_from_its_target(self, raw: Raw) -> None:
        raw.script = [
            answer("302 No", Location=f"http://you:other@127.0.0.1:{raw.port}/d"),
            part(0, 4),
        ]
        HttpFolder(raw.url.replace("//", "//me:secret@")).read("c", 0, 4, 1024)
        ours = [line for line in raw.requests[0].splitlines() if "authorization" in line.lower()]
        assert [line for line in raw.requests[1].splitlines() if "authorization" in line.lower()] == ours

    def test_errors_and_logs_do_not_show_them(self, raw: Raw, caplog: pytest.LogCaptureFixture) -> None:
        url = raw.url.replace("//", "//me:secret@") + "?token=secret"
        caplog.set_level("INFO")
        scripts: list[Line] = [
            answer("404 No"),
            answer("403 No"),
            answer("503 No"),
            answer("302 No", Location="http://me:secret@127.0.0.2/?token=secret"),
            part(0, 3),
            lambda connection, _: connection.close(),
        ]
        for script in scripts:
            raw.script = [script]
            with pytest.raises((StoreRemoteError, FileNotFoundError)) as error:
                HttpFolder(url).read("c", 0, 4, 1024)
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
        assert HttpFolder(url.replace("//", "//me:secret@", 1)).read("c", 2, 5, 1024) == DATA[2:5]
        for wrong in (url, url.replace("//", "//me:wrong@", 1)):
            with pytest.raises(StoreRemoteError, match=r"401 \(Unauthorized\).*~/\.netrc"):
                HttpFolder(wrong).read("c", 2, 5, 1024)

    def test_forbidden(self, web: "tuple[Server, str, str]") -> None:
        with pytest.raises(StoreRemoteError, match=r"403 \(Forbidden\): not there, or not for you"):
            HttpFolder(f"{web[1]}/forbidden").read_small("c", 1)

    def test_redirects(self, web: "tuple[Server, str, str]") -> None:
        _, root, name = web
        assert HttpFolder(f"{root}/moved/{name}").read("c", 2, 5, 1024) == DATA[2:5]
        with pytest.raises(StoreRemoteError, match="in a circle"):
            HttpFolder(f"{root}/circle").read("c", 2, 5, 1024)
        with pytest.raises(
            StoreRemoteError, match=r"redirects to http://127\.0\.0\.2; if you trust"
        ) as error:
            HttpFolder(f"{root}/elsewhere").read("c", 2, 5, 1024)
        assert "secret" not in str(error.value)

    def test_without_ranges_only_whole_files(self, web: "tuple[Server, str, str]") -> None:
        _, root, name = web
        folder = HttpFolder(f"{root}/whole/{name}")
        assert folder.read("c", 0, 1024, 1024) == DATA
        assert folder.size_bytes("c") == 1024
        with pytest.raises(StoreRemoteError, match="sends whole files only"):
            folder.read("c", 0, 4, 1024)


class TestTries:
    def test_what_passes_is_done_again_until_it_is_done(self, waits: list[float]) -> None:
        left = iter([PassingError("no"), PassingError("no"), 5])

        def action() -> int:
            found = next(left)
            if isinstance(found, PassingError):
                raise found
            return found

        assert tried(action, "here") == 5
        assert len(waits) == 2

    def test_what_was_done_is_not_done_twice(self) -> None:
        done: list[int] = []

        def action() -> None:
            done.append(1)
            raise PassingError("the answer was lost")

        tried_once(action, lambda: bool(done), "here")
        assert done == [1]

    @given(st.text())
    def test_no_date_is_no_time(self, value: str) -> None:
        found = retry_after_seconds(value)
        assert found is None or found >= 0

    def test_a_date_without_a_zone_is_in_gmt(self) -> None:
        date = format_datetime(datetime.now(UTC).replace(tzinfo=None) + timedelta(seconds=50))
        assert 45 < (retry_after_seconds(date) or 0) < 51
