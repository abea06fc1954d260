"""A store's folder on the web or in object storage (S3, Google, Azure), over obstore.

One request for each read. obstore pools connections, signs, finds credentials, and checks that a part is the
part that was asked for; here no more is received than was asked for, the size of the whole is checked, what
may pass is retried, and errors become one line without secrets.
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

from ..errors import SettingsError, StoreError, StoreRemoteError
from .folder import (
    PIECE_BYTES,
    ListedFile,
    WholeFilesOnlyError,
    changed,
    inside,
    shown,
    too_large,
)
from .retries import RetryableError, resume, retry

_IN_ONE_REQUEST = 1 << 26
"""Files up to this size are held in memory and written in one request, the only kind that can be refused
where there is a file."""

# A read of a part must end within this time; the whole of a file may take long, but not be silent.
_PART_TIMES = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=2)}
_FILE_TIMES = {
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=30),
    "timeout": timedelta(days=1),
}
# Reads are retried by ``retry``. Of a large file that is written, obstore retries each part.
_NO_RETRIES: Any = {"max_retries": 0}
_RETRIES: Any = {
    "max_retries": 7,
    "retry_timeout": timedelta(minutes=2),
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=15), "base": 4},
}

# Without any of these variables requests are not signed, as public buckets want them.
_CREDENTIALS = {
    "s3": (
        *("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
        *("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE"),
    ),
    "gs": (
        *("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH"),
        *("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BEARER_TOKEN", "GOOGLE_SKIP_SIGNATURE"),
    ),
    "az": (
        *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY"),
        *("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_TOKEN"),
        *("AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE"),
        *("AZURE_USE_AZURE_CLI", "AZURE_CREDENTIAL_TYPE", "AZURE_STORAGE_USE_EMULATOR"),
        "AZURE_SKIP_SIGNATURE",
    ),
}
_LOOKED_IN = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials (AWS_PROFILE)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login",
    "az": "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, AZURE_USE_AZURE_CLI",
    "web": "the URL (https://user:password@host/) and ~/.netrc (or the file in NETRC)",
}
_GOOGLE_LOGIN = "~/.config/gcloud/application_default_credentials.json"

_process: int | None = None
"""The process that obstore's threads run in; a child that is forked from it has none of them."""


class ObjectFolder:
    """A folder on the web, in S3, or in Google's or Azure's storage; see ``RemoteFolder``."""

    def __init__(self, url: str) -> None:
        """Look for credentials; connect to nothing yet.

        Args:
            url: ``https://[user:password@]host/folder[?query]``, ``s3://bucket/folder``,
                ``gs://bucket/folder`` or ``az://container/folder``.

        Raises:
            SettingsError: no host, bucket or container in it, or the environment names no account.
        """
        parts = urlsplit(url)
        scheme = parts.scheme.lower()
        self.url = shown(url)
        self._is_web = scheme in ("http", "https")
        self._credentials = _LOOKED_IN["web" if self._is_web else scheme]
        if not parts.hostname or ("@" in parts.netloc and not self._is_web):
            named = "host" if self._is_web else "container" if scheme == "az" else "bucket"
            raise SettingsError(f"{self.url} names no {named}; write {scheme}://{named}/folder")
        connect = _web(parts) if self._is_web else _bucket(scheme, url)
        try:
            self._parts = connect(_PART_TIMES, _NO_RETRIES)
            self._files = connect(_FILE_TIMES, _RETRIES)
        except (exceptions.BaseError, ValueError, OSError) as error:
            problem = (str(error).splitlines() or [""])[0]
            raise SettingsError(f"{self.url} cannot be opened: {problem}; see docs/sharing.md") from None

    def __repr__(self) -> str:
        """The class, and the URL as it may be shown."""
        return f"{type(self).__name__}({self.url!r})"

    def read(self, path: str, start: int, stop: int, of: int) -> bytes:
        """Bytes [start, stop) of a file; see ``RemoteFolder``."""
        fetched = resume(lambda n: self._body(self._parts, path, start + n, stop, of), f"{self.url}/{path}")
        return b"".join(fetched)

    def pieces(self, path: str, of: int) -> Iterator[bytes]:
        """The whole of a file; see ``RemoteFolder``."""
        return resume(lambda n: self._body(self._files, path, n, of, of), f"{self.url}/{path}")

    def _body(self, store: Any, path: str, start: int, stop: int, of: int) -> Iterator[bytes]:
        """Bytes [start, stop) of a file of ``of``."""
        skip = 0
        try:
            # The whole is asked for without a range: servers that know none can send it.
            part = None if (start, stop) == (0, of) else (start, stop)
            answer = self._get(store, path, part, of)
        except WholeFilesOnlyError:
            if not (store is self._files and stop == of):
                raise
            answer, skip = self._get(store, path, None, of), start
        for piece in self._received(answer, path, stop - start + skip):
            yield piece[skip:]
            skip = max(0, skip - len(piece))

    def read_small(self, path: str, limit_bytes: int) -> bytes:
        """The whole of a file of unknown size; see ``RemoteFolder``."""

        def once() -> bytes:
            answer = self._get(self._parts, path)
            n_bytes = answer.meta["size"]
            if n_bytes > limit_bytes:
                raise too_large(path, limit_bytes)
            return b"".join(self._received(answer, path, n_bytes))

        return retry(once, f"{self.url}/{path}")

    def size_bytes(self, path: str) -> int | None:
        """The size of a file, or None where there is none; see ``RemoteFolder``."""

        def once() -> int:
            if self._is_web:  # not HEAD, which some servers refuse; the body is not received
                return self._get(self._parts, path).meta["size"]
            with self._explained(path):
                return obstore.head(self._parts, inside(path, self.url))["size"]

        try:
            return retry(once, f"{self.url}/{path}")
        except FileNotFoundError:
            return None

    def list_files(self) -> dict[str, ListedFile] | None:
        """Every file below the folder; see ``RemoteFolder``. One request for each thousand."""
        return None if self._is_web else retry(self._listed, self.url)

    def _listed(self) -> dict[str, ListedFile]:
        listed: dict[str, ListedFile] = {}
        with self._explained(None):
            for page in cast(Any, obstore).list(self._parts):
                for entry in page:
                    path = inside(entry["path"], self.url)
                    listed[path] = ListedFile(entry["size"], (entry["e_tag"] or "").strip('"').lower())
        return listed

    def digests(self, source: Path) -> set[str]:
        """MD5, and S3's digest of what was written in parts; see ``RemoteFolder``."""
        md5 = hashlib.md5(usedforsecurity=False)
        of_parts, n_parts = hashlib.md5(usedforsecurity=False), 0
        with source.open("rb") as file:
            while data := file.read(PIECE_BYTES):
                md5.update(data)
                of_parts.update(hashlib.md5(data, usedforsecurity=False).digest())
                n_parts += 1
        return {md5.hexdigest(), f"{of_parts.hexdigest()}-{n_parts}"}

    def write(self, path: str, source: Path | bytes, *, only_new: bool = False) -> None:
        """Write a file, whole or not at all; see ``RemoteFolder``. One request, or one for each 16 MiB."""
        inside(path, self.url)
        if self._is_web:
            raise self._error(
                path, "the web can only be read; copy to s3://, gs://, az://, hf:// or a folder"
            )
        n_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
        is_small = n_bytes <= _IN_ONE_REQUEST
        if only_new and not is_small and self.size_bytes(path) is not None:
            raise FileExistsError(f"{self.url}/{path} is there already")

        def once() -> None:
            with self._explained(path):
                obstore.put(
                    self._files,
                    path,
                    source,
                    mode="create" if only_new and is_small else "overwrite",
                    use_multipart=not is_small,
                    chunk_size=max(PIECE_BYTES, -(-n_bytes // 10_000)),
                    max_concurrency=2,
                )

        retry(once, f"{self.url}/{path}")

    def _get(self, store: Any, path: str, part: tuple[int, int] | None = None, of: int | None = None) -> Any:
        """An answer, whose body is not received yet.

        Args:
            store: with times that fit.
            path: the file.
            part: which bytes; None: all.
            of: how many bytes the whole must have, where that is known.
        """
        inside(path, self.url)
        try:
            with self._explained(path):
                answer = obstore.get(store, path, options={"range": part} if part else None)
        except _OtherRangeError:
            n_bytes = self.size_bytes(path)
            if n_bytes != of:
                raise changed(path, n_bytes or 0, of or 0) from None
            raise self._error(path, "the server sends another range than was asked for") from None
        if answer.attributes.get("Content-Encoding", "identity") != "identity":
            raise self._error(path, "the server compresses what it sends; use one that does not")
        if of not in (None, answer.meta["size"]):
            raise changed(path, answer.meta["size"], of or 0)
        return answer

    def _received(self, answer: Any, path: str, n_bytes: int) -> Generator[bytes]:
        """The body, which must have ``n_bytes``."""
        n_received = 0
        stream: Iterator[Any] = answer.stream(min_chunk_size=min(n_bytes, 1 << 20) or 1)
        while True:
            with self._explained(path):
                piece = bytes(next(stream, b""))
            if not piece:
                break
            n_received += len(piece)
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
                f"{self.url}: a forked process cannot read from servers after its parent did; start it by "
                "spawn (multiprocessing_context='spawn' in a DataLoader)"
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
        if re.search("NoSuchBucket|ContainerNotFound|bucket does not exist", text):
            problem = "there is no such bucket; make it first, or check the URL"
            raise self._error(None, problem) from None
        if code == 416 or "UnexpectedRange" in text:
            raise _OtherRangeError from None
        if code in (408, 425, 429, 500, 502, 503, 504):
            raise RetryableError(answers) from None
        if isinstance(error, FileNotFoundError) or code in (404, 410):
            raise FileNotFoundError(f"{self.url}/{path}: no such file") from None
        if isinstance(error, exceptions.AlreadyExistsError | exceptions.PreconditionError):
            raise FileExistsError(f"{self.url}/{path} is there already") from None
        if code in (401, 403, 407):
            problem = f"{answers}: not there, or not for you; looked for credentials in {self._credentials}"
            raise self._error(path, problem) from None
        if code:
            raise self._error(path, f"{answers}; check the URL") from None
        for sign, problem in _FATAL.items():
            if sign in text:
                kind = WholeFilesOnlyError if sign == "RangeNotSupported" else StoreRemoteError
                raise kind(f"{self.url if path is None else f'{self.url}/{path}'}: {problem}") from None
        for sign, problem in _MAY_PASS.items():
            if sign in text:
                raise RetryableError(problem) from None
        raise self._error(path, f"the request failed ({type(error).__name__}); check the URL") from None

    def _error(self, path: str | None, problem: str) -> StoreRemoteError:
        return StoreRemoteError(f"{self.url if path is None else f'{self.url}/{path}'}: {problem}")


_FATAL = {
    "RangeNotSupported": "the server sends whole files only; copy the store from it (posae copy), or use one "
    "that sends ranges",
    "ontentRange": "the server sends another range than was asked for; use another server",
    "ContentLength": "the server does not say how large the file is; use another server",
    "failed to lookup address": "there is no such host; check the URL",
    "invalid peer certificate": "its certificate is not valid",
    "following redirect": "the server redirects in a circle, or to no URL; check the URL",
}
"""What obstore's errors hold, and what it means to the user."""

_MAY_PASS = {
    "TimedOut": "the server does not answer in time",
    "kind: Timeout": "the server does not answer in time",
    "kind: Connect": "the server cannot be reached",
    "HttpError": "the connection was cut",
}


class _OtherRangeError(Exception):
    """The server sent another part, or none: the file is shorter, or the server is wrong."""


def _web(parts: SplitResult) -> Callable[[Any, Any], Any]:
    url = urlunsplit((parts.scheme.lower(), parts.netloc.rpartition("@")[2], parts.path, parts.query, ""))
    headers = {"Accept-Encoding": "identity", "User-Agent": "posae"}
    if user := _user(parts):
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"

    def connect(times: Any, retries: Any) -> Any:
        options: Any = {"allow_http": True, "default_headers": headers, **times}
        return HTTPStore(url, client_options=options, retry_config=retries)

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


def _bucket(scheme: str, url: str) -> Callable[[Any, Any], Any]:
    config: dict[str, Any] = {}
    if scheme == "s3":
        config |= _aws_files()
    if scheme == "gs" and (service := os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")):
        config |= {"base_url": service if "://" in service else f"http://{service}"}
    is_known = config.get("access_key_id") or any(map(os.environ.get, _CREDENTIALS[scheme]))
    if not is_known and not (scheme == "gs" and Path(_GOOGLE_LOGIN).expanduser().exists()):
        config["skip_signature"] = True

    def connect(times: Any, retries: Any) -> Any:
        options: Any = {"allow_http": True, "user_agent": "posae", **times}
        return cast(Any, from_url)(url, config=config, client_options=options, retry_config=retries)

    return connect


def _aws_files() -> dict[str, str]:
    """What ``aws configure`` wrote, for what the environment does not name."""
    profile = os.environ.get("AWS_PROFILE", "default")
    found: dict[str, str] = {}
    for variable, name, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", f"profile {profile}" if profile != "default" else profile),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", profile),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(os.environ.get(variable, name)).expanduser())
        except (configparser.Error, UnicodeDecodeError):
            raise SettingsError(f"{os.environ.get(variable, name)} is no file of the AWS tools") from None
        if parser.has_section(section):
            found |= parser[section]
    wanted = {"region": ("AWS_REGION", "AWS_DEFAULT_REGION"), "endpoint_url": ("AWS_ENDPOINT_URL",)}
    if not os.environ.get("AWS_ACCESS_KEY_ID"):
        for key in ("access_key_id", "secret_access_key", "session_token"):
            wanted[f"aws_{key}"] = (f"AWS_{key.upper()}",)
    return {
        key.removeprefix("aws_").removesuffix("_url"): found[key]
        for key, variables in wanted.items()
        if key in found and not any(map(os.environ.get, variables))
    }
