"""A store's folder on a web server, read only; and the careful reading that other services over HTTP share.

Nothing that the server says is believed: a body is received up to the length that was asked for and no
further, a part must name the range and the size that were asked for, redirects stay on the server. One
pooled client serves all threads. A read costs one request; a body that was cut goes on where it stopped.

httpx and not fsspec's own HTTP, which reads a body of any length into memory.
"""

import logging
import netrc
import os
import re
import socket
import ssl
import time
import weakref
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

import httpx2

from ..errors import SettingsError, StoreRemoteError
from .folder import changed, inside, shown, too_large
from .retries import BUSY, PassingError, retry_after_seconds, tried

logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every URL, with a query that may be secret

_MAX_REDIRECTS = 5
_TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
_LIMITS = httpx2.Limits(max_connections=64, max_keepalive_connections=64)
# However slowly it drips, a body ends: this long, and a second more for each so many bytes.
_BODY_SECONDS, _BODY_BYTES_PER_SECOND = 60.0, 20_000
_RANGE = re.compile(r"bytes (?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19})")
_PORTS = {"http": 80, "https": 443}


class HttpReader:
    """Files below one URL, read with care.

    Attributes:
        url: as it may be shown.
    """

    def __init__(
        self,
        base: str,
        url: str,
        *,
        credentials: str,
        query: str = "",
        auth: httpx2.Auth | None = None,
        may_leave: bool = False,
    ) -> None:
        """Connect to nothing yet.

        Args:
            base: what stands before each path, without user and password.
            url: as it may be shown.
            credentials: where credentials are looked for, for the error of who has none.
            query: what stands behind each path.
            auth: goes to the host of ``base`` alone.
            may_leave: follow redirects to other hosts, without credentials, and never from https to http.
        """
        self.url = url
        self._base, self._query, self._credentials = base.rstrip("/"), query, credentials
        self._auth, self._may_leave = auth, may_leave
        self._client = httpx2.Client(
            headers={"Accept-Encoding": "identity", "User-Agent": "posae"}, timeout=_TIMEOUT, limits=_LIMITS
        )
        weakref.finalize(self, self._client.close)

    def __repr__(self) -> str:
        """The class, and the URL as it may be shown."""
        return f"{type(self).__name__}({self.url!r})"

    def read(self, path: str, start: int, stop: int, of: int) -> bytes:
        """Bytes [start, stop) of a file; see ``RemoteFolder``. One request."""
        found = bytearray()

        def once() -> bytes:
            at = start + len(found)
            with self.answer("GET", path, {"Range": f"bytes={at}-{stop - 1}"}) as answer:
                match answer.status_code:
                    case 206:
                        self._check_range(path, answer, (at, stop - 1), of)
                    case 200 if (start, stop) == (0, of):
                        n_bytes = _length(answer)
                        if n_bytes not in (None, of):
                            raise changed(path, n_bytes, of)
                        found.clear()
                    case 200:
                        raise self._error(
                            path, "the server sends whole files only; use one that sends ranges"
                        )
                    case 416:
                        self._check_range(path, answer, None, of)
                    case _:
                        self.refuse(path, answer)
                if not received(answer, found, stop - start):
                    if answer.status_code == 200:
                        raise changed(path, None, of)
                    raise self._error(path, "the server sends more than was asked for; do not use it")
            if len(found) < stop - start:
                raise PassingError("the connection was cut")
            return bytes(found)

        return tried(once, f"{self.url}/{path}")

    def read_small(self, path: str, limit_bytes: int) -> bytes:
        """The whole of a file of unknown size; see ``RemoteFolder``. One request."""

        def once() -> bytes:
            found = bytearray()
            with self.answer("GET", path, {}) as answer:
                if answer.status_code != 200:
                    self.refuse(path, answer)
                n_bytes = _length(answer)
                if (n_bytes or 0) > limit_bytes or not received(answer, found, limit_bytes):
                    raise too_large(path, limit_bytes)
            if n_bytes is not None and len(found) != n_bytes:
                raise PassingError("the connection was cut")
            return bytes(found)

        return tried(once, f"{self.url}/{path}")

    def size_bytes(self, path: str) -> int | None:
        """The size of a file, or None where there is none; see ``RemoteFolder``. One request."""

        def once() -> int:
            # Not HEAD, which some servers refuse: the first byte tells the size as every later read does.
            with self.answer("GET", path, {"Range": "bytes=0-0"}) as answer:
                if answer.status_code == 200:
                    n_bytes = _length(answer)
                elif answer.status_code in (206, 416):
                    found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
                    n_bytes = int(found[3]) if found else None
                else:
                    self.refuse(path, answer)
            if n_bytes is None:
                raise self._error(path, "the server does not say how large it is; use another server")
            return n_bytes

        try:
            return tried(once, f"{self.url}/{path}")
        except FileNotFoundError:
            return None

    @contextmanager
    def answer(
        self, method: str, path: str, headers: Mapping[str, str], content: IO[bytes] | bytes | None = None
    ) -> Generator[httpx2.Response]:
        """One request for a file; the body of the answer is not read yet.

        Raises:
            PassingError: cut or late, also while the body is read within the ``with``.
            StoreRemoteError: a redirect elsewhere, no such host, a wrong certificate, a path outside.
        """
        place = f"{self._base}/{quote(inside(path, self.url))}"
        with self.request(
            method, f"{place}?{self._query}" if self._query else place, headers, content
        ) as got:
            if got.headers.get("Content-Encoding", "identity") != "identity":
                raise self._error(path, "the server compresses what it sends; use one that does not")
            yield got

    @contextmanager
    def request(
        self, method: str, url: str, headers: Mapping[str, str], content: IO[bytes] | bytes | None = None
    ) -> Generator[httpx2.Response]:
        """As ``answer``, for any URL of the service."""
        try:
            response = self._follow(method, httpx2.URL(url), headers, content)
            try:
                yield response
            finally:
                response.close()
        except httpx2.TransportError as error:
            self._explain(error)
        except httpx2.InvalidURL:
            raise StoreRemoteError(f"{self.url}: no URL that can be asked for; check it") from None

    def _follow(
        self, method: str, url: httpx2.URL, headers: Mapping[str, str], content: IO[bytes] | bytes | None
    ) -> httpx2.Response:
        """The first answer that is no redirect; to another host only where that is allowed, and as nobody."""
        auth = self._auth
        for _ in range(_MAX_REDIRECTS + 1):
            request = self._client.build_request(method, url, headers=headers, content=content)
            response = self._client.send(request, stream=True, auth=auth)
            location = response.headers.get("Location")
            if response.status_code not in (301, 302, 303, 307, 308) or location is None:
                return response
            response.close()
            # A user and password in the target would be sent as ours.
            target = url.join(location).copy_with(username=None, password=None)
            if not _same_server(url, target):
                if not self._may_leave or (url.scheme, target.scheme) == ("https", "http"):
                    raise StoreRemoteError(
                        f"{self.url}: the server redirects to {target.scheme}://{target.host}; if you trust "
                        "that host, give its URL"
                    )
                auth = None
            url = target
        raise StoreRemoteError(f"{self.url}: the server redirects in a circle; check the URL")

    def _check_range(self, path: str, answer: httpx2.Response, part: tuple[int, int] | None, of: int) -> None:
        """That the answer is bytes ``part`` of a file of ``of``; None: that it is an error because it is not.

        Raises:
            StoreDamagedError: the file has another size.
            StoreRemoteError: another range.
        """
        found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if found and int(found[3]) != of:
            raise changed(path, int(found[3]), of)
        if not found or part is None or found[1] is None or (int(found[1]), int(found[2])) != part:
            raise self._error(path, "the server sends another range than was asked for; use another server")

    def refuse(self, path: str, answer: httpx2.Response) -> NoReturn:
        """The error for a status that is none of those that were asked for.

        Raises:
            FileNotFoundError: no such file.
            PassingError: busy.
            StoreRemoteError: all else.
        """
        status = answer.status_code
        if status in (404, 410):
            raise FileNotFoundError(f"{self.url}/{path}: no such file")
        words = f"the server answers {status} ({httpx2.codes.get_reason_phrase(status) or 'no known status'})"
        if status in BUSY:
            raise PassingError(words, retry_after_seconds(answer.headers.get("Retry-After")))
        if status in (401, 403, 407):
            raise self._error(
                path, f"{words}: not there, or not for you; looked for credentials in {self._credentials}"
            )
        raise self._error(path, f"{words}; check the URL")

    def _error(self, path: str, problem: str) -> StoreRemoteError:
        return StoreRemoteError(f"{self.url}/{path}: {problem}")

    def _explain(self, error: httpx2.TransportError) -> NoReturn:
        """The error in our words; its own may hold a URL."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise StoreRemoteError(
                    f"{self.url}: its certificate is not valid ({cause.verify_message})"
                ) from None
            if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
                raise StoreRemoteError(f"{self.url}: there is no such host; check the URL") from None
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, httpx2.TimeoutException):
            raise PassingError("the server does not answer in time") from None
        if isinstance(error, httpx2.ConnectError):
            raise PassingError("the server cannot be reached") from None
        if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
            raise StoreRemoteError(f"{self.url}: no request that can be made; check the URL") from None
        raise PassingError("the connection was cut") from None


class HttpFolder(HttpReader):
    """A folder on the web; see ``RemoteFolder``. The web neither lists nor takes files."""

    def __init__(self, url: str) -> None:
        """Connect to nothing yet.

        Args:
            url: ``https://[user:password@]host[:port]/folder[?query]``; the query goes with every request.

        Raises:
            SettingsError: no host in it.
        """
        parts = urlsplit(url)
        if not parts.hostname:
            raise SettingsError(f"{shown(url)} names no host; write https://host/folder")
        host = parts.netloc.rpartition("@")[2]
        super().__init__(
            urlunsplit((parts.scheme.lower(), host, parts.path.rstrip("/"), "", "")),
            shown(url),
            credentials="the URL (https://user:password@host/) and ~/.netrc (or the file in NETRC)",
            query=parts.query,
            auth=_basic_auth(parts),
        )

    def walk(self) -> Iterator[str] | None:
        """None: the web lists no folders."""
        return None

    def write(self, path: str, source: Path | bytes, *, only_new: bool = False) -> None:
        """Refuse.

        Raises:
            StoreRemoteError: always.
        """
        raise self._error(path, "the web can only be read; copy to s3://, gs://, sftp://, hf:// or a folder")


def _basic_auth(parts: SplitResult) -> httpx2.Auth | None:
    if parts.password is not None:
        return httpx2.BasicAuth(unquote(parts.username or ""), unquote(parts.password))
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(parts.hostname or "")
    except (OSError, netrc.NetrcParseError):
        known = None
    if known and parts.username in (None, known[0]):
        return httpx2.BasicAuth(known[0], known[2] or "")
    return httpx2.BasicAuth(unquote(parts.username), "") if parts.username else None


def _same_server(one: httpx2.URL, other: httpx2.URL) -> bool:
    """Same host and port, or from http to https, each at its own port."""
    ports = [url.port or _PORTS.get(url.scheme) for url in (one, other)]
    same_scheme = one.scheme == other.scheme and ports[0] == ports[1]
    return one.host == other.host and (
        same_scheme or ((one.scheme, other.scheme) == ("http", "https") and ports == [80, 443])
    )


def _length(answer: httpx2.Response) -> int | None:
    value = answer.headers.get("Content-Length", "")
    return int(value[:19]) if value.isascii() and value.isdigit() else None


def received(answer: httpx2.Response, found: bytearray, limit_bytes: int) -> bool:
    """Put the body behind ``found``; False, and the rest not received, where it grows over the limit.

    Raises:
        PassingError: it drips too slowly.
    """
    until = time.monotonic() + _BODY_SECONDS + (limit_bytes - len(found)) / _BODY_BYTES_PER_SECOND
    for piece in answer.iter_raw():
        if len(found) + len(piece) > limit_bytes:
            return False
        found += piece
        if time.monotonic() > until:
            raise PassingError("the server sends too slowly")
    return True
