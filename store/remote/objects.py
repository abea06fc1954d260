"""A store's folder on the web or in object storage (S3, Google, Azure), over obstore.

One request for each read. obstore pools connections, signs, and checks that a part is the part that was asked
for; here no more is received than was asked for, the size of the whole is checked, what may pass is retried,
and errors become one line without secrets.
"""

import base64
import configparser
import hashlib
import netrc
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import obstore
from obstore import exceptions
from obstore.store import HTTPStore, from_url

from ..errors import SettingsError, StoreDamagedError, StoreError, StoreRemoteError
from .folder import ListedFile, WholeFilesOnlyError, inside, shown
from .retries import RetryableError, resume, retry

PIECE_BYTES = 1 << 24
"""How much of a file is sent, or read to compute a digest, at a time."""

_IN_ONE_REQUEST = 1 << 26
"""Larger files are written in pieces; only one request can be refused where there is a file."""

# A part must arrive within the time; the whole of a file may take long, but not be silent.
_PART_TIMES: Any = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=2)}
_FILE_TIMES: Any = {
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=30),
    "timeout": timedelta(days=1),
}
# ``retry`` and ``resume`` try again; of a large file obstore does so for each piece too, a few seconds long.
_NO_RETRIES: Any = {"max_retries": 0}
_RETRIES: Any = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=4), "base": 4},
}

_CREDENTIALS = {
    "s3": "AWS_(ACCESS_KEY_ID|WEB_IDENTITY_TOKEN_FILE|CONTAINER_.*|SKIP_SIGNATURE)",
    "gs": "GOOGLE_(APPLICATION_CREDENTIALS|SERVICE_ACCOUNT.*|BEARER_TOKEN|SKIP_SIGNATURE)",
    "az": "AZURE_.*(KEY|TOKEN|TOKEN_FILE|CLIENT_ID|CLI|CREDENTIAL_TYPE|EMULATOR|SKIP_SIGNATURE)",
}
"""Without any of these variables requests are not signed, as public buckets want them."""

_LOOKED_IN = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login",
    "az": "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, AZURE_USE_AZURE_CLI",
    "web": "the URL (https://user:password@host/) and ~/.netrc (or the file in NETRC)",
}
_AZURE_ACCOUNT = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_USE_EMULATOR")
_GOOGLE_LOGIN = "~/.config/gcloud/application_default_credentials.json"

_NO_BUCKET = "there is no such bucket; make it first, or check the URL"
_FATAL = {
    "RangeNotSupported": "the server sends whole files only; copy the store from it: posae copy",
    "ontentRange": "the server sends another range than was asked for; use another server",
    "ContentLength": "the server does not say how large the file is; use another server",
    "failed to lookup address": "there is no such host; check the URL",
    "invalid peer certificate": "its certificate is not valid",
    "following redirect": "the server redirects in a circle; check the URL",
    "BadScheme": "the server redirects to what is no web server; check the URL",
}
"""What obstore's errors hold, and what it means to the user."""

_MAY_PASS = {
    "TimedOut": "the server does not answer in time",
    "kind: Timeout": "the server does not answer in time",
    "kind: Connect": "the server cannot be reached",
    "HttpError": "the connection was cut",
}

_process: int | None = None
"""The process that obstore's threads run in; a child that is forked from it has none of them."""


class ObjectFolder:
    """Files below one URL, read with care; see ``RemoteFolder``.

    Attributes:
        url: as it may be shown.
    """

    def __init__(self, url: str, connect: Callable[[Any, Any], Any], credentials: str) -> None:
        """Connect to nothing yet.

        Args:
            url: as it may be shown.
            connect: obstore's store, of these client options and this retry configuration.
            credentials: where credentials were looked for, for the error of who has none.

        Raises:
            SettingsError: obstore refuses the URL, or what it finds in the environment.
        """
        self.url, self._credentials = url, credentials
        try:
            self._parts = connect(_PART_TIMES, _NO_RETRIES)
            self._files = connect(_FILE_TIMES, _RETRIES)
        except (exceptions.BaseError, ValueError, OSError) as error:
            problem = (str(error).splitlines() or [""])[0]
            raise SettingsError(f"{url} cannot be opened: {problem}; see docs/sharing.md") from None

    def __repr__(self) -> str:
        """The class, and the URL as it may be shown."""
        return f"{type(self).__name__}({self.url!r})"

    def read(self, path: str, start: int, stop: int, of: int) -> bytes:
        """Bytes [start, stop) of a file; see ``RemoteFolder``."""
        return b"".join(resume(lambda n: self._body(path, start + n, stop, of), self._place(path)))

    def pieces(self, path: str, of: int) -> Iterator[bytes]:
        """The whole of a file; see ``RemoteFolder``."""
        return resume(lambda n: self._body(path, n, of, of, whole=True), self._place(path))

    def _body(self, path: str, start: int, stop: int, of: int, *, whole: bool = False) -> Iterator[bytes]:
        """Bytes [start, stop) of a file of ``of``; ``whole``: all before and after may be received too."""
        store, skip = self._files if whole else self._parts, 0
        try:
            # All of it is asked for without a range: servers that know none can send it.
            part = None if (start, stop) == (0, of) else (start, stop)
            answer = self._get(store, path, part, of)
        except WholeFilesOnlyError:
            if not whole:
                raise
            answer, skip = self._get(store, path, None, of), start
        for piece in self._received(answer, path, stop - start + skip):
            yield piece[skip:]
            skip = max(0, skip - len(piece))

    def read_small(self, path: str, limit_bytes: int) -> bytes:
        """The whole of a file of unknown size; see ``RemoteFolder``."""

        def once() -> bytes:
            answer = self._get(self._parts, path)
            if (n_bytes := answer.meta["size"]) > limit_bytes:
                problem = f"larger than the {limit_bytes:,} bytes allowed here"
                raise StoreDamagedError(problem, array=path)
            return b"".join(self._received(answer, path, n_bytes))

        return retry(once, self._place(path))

    def size_bytes(self, path: str) -> int | None:
        """The size of a file, or None where there is none; see ``RemoteFolder``."""
        try:
            # Not HEAD, which some servers refuse; the body is not received.
            return retry(lambda: self._get(self._parts, path).meta["size"], self._place(path))
        except FileNotFoundError:
            return None

    def _get(self, store: Any, path: str, part: tuple[int, int] | None = None, of: int | None = None) -> Any:
        """An answer, whose body is not received yet; ``of``: the bytes that the whole must have, if known."""
        inside(path, self.url)
        n_bytes = None
        try:
            with self._explained(path):
                answer = obstore.get(store, path, options={"range": part} if part else None)
                n_bytes = answer.meta["size"]
        except _OtherRangeError:
            answer, n_bytes = None, self.size_bytes(path) or 0
        if of not in (None, n_bytes):
            raise StoreDamagedError(
                f"it changed on the server, where it has {n_bytes:,} bytes, not {of:,}",
                array=path,
                remedy="open the store again, or take another copy of it",
            )
        if answer is None:
            raise self._error(path, "the server sends another range than was asked for")
        if cast(Any, answer.attributes).get("Content-Encoding", "identity") != "identity":
            raise self._error(path, "the server compresses what it sends; use one that does not")
        return answer

    def _received(self, answer: Any, path: str, n_bytes: int) -> Generator[bytes]:
        """The body, which must have ``n_bytes``."""
        n_received, least, is_last = 0, 1 + min(n_bytes, 1 << 18), False
        stream: Iterator[Any] = answer.stream(min_chunk_size=least)
        while not is_last:
            with self._explained(path):
                piece = bytes(next(stream, b""))
            n_received, is_last = n_received + len(piece), len(piece) < least
            if n_received > n_bytes:
                raise self._error(path, "the server sends more than was asked for; do not use it")
            yield piece
        if n_received < n_bytes:
            raise RetryableError("the connection was cut")

    @contextmanager
    def _explained(self, path: str | None) -> Generator[None]:
        """The errors of obstore in our words; its own hold URLs."""
        global _process
        if _process not in (None, os.getpid()):
            raise StoreRemoteError(
                f"{self.url}: a process that was forked cannot read from servers if its parent did; start it "
                "by spawn (in a DataLoader: multiprocessing_context='spawn')"
            )
        _process = os.getpid()
        try:
            yield
        except StoreError:
            raise
        except (exceptions.BaseError, OSError, ValueError) as error:
            self._explain(path, error)

    def _explain(self, path: str | None, error: Exception) -> NoReturn:
        text = str(error)
        status = re.search(r"status code: (\d{3}) ?([A-Za-z ]*)", text)
        code = int(status[1]) if status else 0
        answers = f"the server answers {status[1]} ({status[2].strip()})" if status else ""
        is_missing = isinstance(error, FileNotFoundError) or code in (404, 410)
        if re.search("NoSuchBucket|ContainerNotFound", text) or (is_missing and path is None):
            raise self._error(None, _NO_BUCKET) from None
        if code == 416 or "UnexpectedRange" in text:
            raise _OtherRangeError from None
        if code in (408, 425, 429, 500, 502, 503, 504):
            raise RetryableError(answers, self._wait_seconds(path) if code == 429 else None) from None
        if is_missing:
            raise FileNotFoundError(f"{self._place(path)}: no such file") from None
        if isinstance(error, exceptions.AlreadyExistsError | exceptions.PreconditionError):
            raise FileExistsError(f"{self._place(path)} is there already") from None
        if code in (401, 403, 407):
            problem = f"{answers}: not there, or not for you; looked for credentials in {self._credentials}"
            raise self._error(path, problem) from None
        if code:
            raise self._error(path, f"{answers}; check the URL") from None
        for sign, problem in _FATAL.items():
            if sign in text:
                kind = WholeFilesOnlyError if sign == "RangeNotSupported" else StoreRemoteError
                raise kind(f"{self._place(path)}: {problem}") from None
        for sign, problem in _MAY_PASS.items():
            if sign in text:
                raise RetryableError(problem) from None
        raise self._error(path, f"the request failed ({type(error).__name__}); check the URL") from None

    def _wait_seconds(self, path: str | None) -> float | None:
        """How long the server wants to be left alone, if it says so; obstore does not show its headers."""
        return None

    def _place(self, path: str | None) -> str:
        return self.url if path is None else f"{self.url}/{path}"

    def _error(self, path: str | None, problem: str) -> StoreRemoteError:
        return StoreRemoteError(f"{self._place(path)}: {problem}")


class _OtherRangeError(Exception):
    """The server sent another part, or none: the file is shorter, or the server is wrong."""


class WebFolder(ObjectFolder):
    """A folder on the web, which neither lists nor takes files; see ``RemoteFolder``."""

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
        user = _user(parts)
        secret = f"Basic {base64.b64encode(user.encode()).decode()}" if user else None
        host = parts.netloc.rpartition("@")[2]
        base = urlunsplit((parts.scheme.lower(), host, parts.path.rstrip("/"), parts.query, ""))
        super().__init__(shown(url), web(base, secret), _LOOKED_IN["web"])

    def list_files(self) -> None:
        """None: the web lists no folders."""

    def digests(self, source: Path) -> set[str]:
        """None."""
        return set()

    def write(self, path: str, source: Path | bytes, *, only_new: bool = False) -> None:
        """Refuse, with StoreRemoteError."""
        raise self._error(path, "the web can only be read; copy to s3://, gs://, az://, hf:// or a folder")


class BucketFolder(ObjectFolder):
    """A folder in S3, or in Google's or Azure's storage; see ``RemoteFolder``."""

    def __init__(self, url: str) -> None:
        """Look for credentials; connect to nothing yet.

        Args:
            url: ``s3://bucket/folder``, ``gs://bucket/folder`` or ``az://container/folder``.

        Raises:
            SettingsError: no bucket or container in it, or the environment names no account.
        """
        parts = urlsplit(url)
        scheme = parts.scheme.lower()
        if not parts.netloc or "@" in parts.netloc:
            named = "container" if scheme == "az" else "bucket"
            raise SettingsError(f"{shown(url)} names no {named}; write {scheme}://{named}/folder")
        if scheme == "az" and not any(map(os.environ.get, _AZURE_ACCOUNT)):
            raise SettingsError(f"{shown(url)}: set AZURE_STORAGE_ACCOUNT_NAME to the account that has it")
        config: dict[str, Any] = _aws_files() if scheme == "s3" else {}
        is_known = "access_key_id" in config or any(
            value and re.fullmatch(_CREDENTIALS[scheme], name) for name, value in os.environ.items()
        )
        if scheme == "gs" and (service := os.environ.get("STORAGE_EMULATOR_HOST")):
            service = service if "://" in service else f"http://{service}"
            config, is_known = {"base_url": service, "bearer_token": "none"}, True
        self._may_write = is_known or (scheme == "gs" and Path(_GOOGLE_LOGIN).expanduser().exists())
        if not self._may_write:
            config["skip_signature"] = True

        def connect(times: Any, retries: Any) -> Any:
            options: Any = {"allow_http": True, "user_agent": "posae", **times}
            return cast(Any, from_url)(url, config=config, client_options=options, retry_config=retries)

        super().__init__(shown(url), connect, _LOOKED_IN[scheme])

    def list_files(self) -> dict[str, ListedFile]:
        """Every file below the folder; see ``RemoteFolder``. One request for each thousand."""

        def once() -> dict[str, ListedFile]:
            with self._explained(None):
                return {
                    inside(entry["path"], self.url): ListedFile(
                        entry["size"], (entry["e_tag"] or "").strip('"')
                    )
                    for page in cast(Any, obstore).list(self._parts)
                    for entry in page
                }

        return retry(once, self.url)

    def digests(self, source: Path) -> set[str]:
        """MD5, and S3's digest of what was written in pieces; see ``RemoteFolder``."""
        size = _piece_bytes(source.stat().st_size)
        md5, of_pieces, n_pieces = hashlib.md5(), hashlib.md5(), 0
        with source.open("rb") as file:
            while data := file.read(size):
                md5.update(data)
                of_pieces.update(hashlib.md5(data).digest())
                n_pieces += 1
        return {md5.hexdigest(), f"{of_pieces.hexdigest()}-{n_pieces}"}

    def write(self, path: str, source: Path | bytes, *, only_new: bool = False) -> None:
        """Write a file, whole or not at all; see ``RemoteFolder``. One request, or one for each 16 MiB."""
        inside(path, self.url)
        if not self._may_write:
            raise self._error(path, f"writing needs credentials; looked for them in {self._credentials}")
        n_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
        is_small = n_bytes <= _IN_ONE_REQUEST
        if only_new and not is_small and self.size_bytes(path) is not None:
            raise FileExistsError(f"{self._place(path)} is there already")

        def once() -> None:
            with self._explained(path):
                obstore.put(
                    self._files,
                    path,
                    source,
                    mode="create" if only_new and is_small else "overwrite",
                    use_multipart=not is_small,
                    chunk_size=_piece_bytes(n_bytes),
                    max_concurrency=2,
                )

        try:
            retry(once, self._place(path))
        except FileNotFoundError:
            raise self._error(None, _NO_BUCKET) from None


def _piece_bytes(n_bytes: int) -> int:
    """S3 takes at most 10,000 pieces."""
    return max(PIECE_BYTES, -(-n_bytes // 10_000))


def web(base: str, authorization: str | None) -> Callable[[Any, Any], Any]:
    """What connects to a web server.

    Args:
        base: the URL, without user and password.
        authorization: a header, which goes to that host alone.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "posae"}
    if authorization:
        headers["Authorization"] = authorization

    def connect(times: Any, retries: Any) -> Any:
        options: Any = {"allow_http": True, "default_headers": headers, **times}
        return HTTPStore(base, client_options=options, retry_config=retries)

    return connect


def _user(parts: SplitResult) -> str | None:
    """``user:password`` from the URL, or else from netrc."""
    if parts.password is not None:
        return f"{unquote(parts.username or '')}:{unquote(parts.password)}"
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(parts.hostname or "")
    except (OSError, netrc.NetrcParseError):
        known = None
    if known and parts.username in (None, known[0]):
        return f"{known[0]}:{known[2] or ''}"
    return f"{unquote(parts.username)}:" if parts.username else None


def _aws_files() -> dict[str, str]:
    """What ``aws configure`` wrote, as far as the environment does not name it."""
    profile = os.environ.get("AWS_PROFILE", "default")
    places = (
        (os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"), f"profile {profile}"),
        (os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), profile),
    )
    written: dict[str, str] = {}
    for place, section in places:
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(place).expanduser())
        except (configparser.Error, UnicodeDecodeError):
            raise SettingsError(f"{place} is no file of the AWS tools") from None
        for name in (profile, section):
            written |= parser[name] if parser.has_section(name) else {}
    keys = ["aws_access_key_id", "aws_secret_access_key", "aws_session_token"]
    wanted = [] if os.environ.get("AWS_ACCESS_KEY_ID") else keys
    wanted += [] if os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") else ["region"]
    wanted += [] if os.environ.get("AWS_ENDPOINT_URL") else ["endpoint_url"]
    return {
        name.removeprefix("aws_").removesuffix("_url"): written[name] for name in wanted if name in written
    }
