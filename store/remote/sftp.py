"""A store's folder on a machine that is reached by SSH.

User, port, key and proxy come from ``~/.ssh/config``, keys also from the agent, as for the ssh command; a
host that ``known_hosts`` does not name is refused. A read costs four round trips. What is written goes to
a temporary name, is read back and compared, and renamed: twice the traffic, but SFTP has no checksum that
OpenSSH would check.

paramiko itself and not fsspec's file system on top of it, which trusts every unknown host, knows no
``~/.ssh/config``, and is not safe to use from several threads.
"""

import errno
import getpass
import secrets
import socket
import stat
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

import paramiko

from ..errors import SettingsError, StoreError, StoreRemoteError
from ..files import PARTIAL
from .folder import PIECE_BYTES, changed, inside, opened, same, shown, too_large
from .retries import PassingError, tried, tried_once

_MAX_SESSIONS = 8  # OpenSSH's own limit is 10 a connection
_MAX_PATH_CHARACTERS = 4096
_KNOWN_HOSTS = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
_CONNECT_SECONDS, _ANSWER_SECONDS = 15.0, 60.0
_CREDENTIALS = "~/.ssh/config, the keys in ~/.ssh, the agent"
_T = TypeVar("_T")


class SftpFolder:
    """A folder behind SSH; see ``RemoteFolder``."""

    def __init__(self, url: str) -> None:
        """Connect to nothing yet.

        Args:
            url: ``sftp://[user@]host[:port]/absolute/folder``, or ``…/~/folder`` below the home folder.

        Raises:
            SettingsError: no host or no folder in it, or a password.
        """
        parts = urlsplit(url)
        self.url = shown(url)
        path = unquote(parts.path).rstrip("/")
        if not parts.hostname or not path or parts.query:
            raise SettingsError(f"{self.url} is no folder; write sftp://host/folder or sftp://host/~/folder")
        if parts.password is not None:
            raise SettingsError(f"{self.url}: no password in a URL, please; use a key: {_CREDENTIALS}")
        self._root = path.removeprefix("/~/") if path.startswith("/~/") else path
        self._line = _Line(self.url, parts.hostname, parts.port, unquote(parts.username or ""))
        weakref.finalize(self, self._line.close)

    def __repr__(self) -> str:
        """The class, and the URL as it may be shown."""
        return f"SftpFolder({self.url!r})"

    def read(self, path: str, start: int, stop: int, of: int) -> bytes:
        """Bytes [start, stop) of a file; see ``RemoteFolder``."""

        def once(session: paramiko.SFTPClient) -> bytes:
            n_bytes = self._size(session, path)
            if n_bytes != of:
                raise changed(path, n_bytes, of)
            return self._received(session, path, start, stop)

        return self._tried(path, once)

    def read_small(self, path: str, limit_bytes: int) -> bytes:
        """The whole of a file of unknown size; see ``RemoteFolder``."""

        def once(session: paramiko.SFTPClient) -> bytes:
            n_bytes = self._size(session, path)
            if n_bytes > limit_bytes:
                raise too_large(path, limit_bytes)
            return self._received(session, path, 0, n_bytes) if n_bytes else b""

        return self._tried(path, once)

    def size_bytes(self, path: str) -> int | None:
        """The size of a file, or None where there is none; see ``RemoteFolder``. One round trip."""
        try:
            return self._tried(path, lambda session: self._size(session, path))
        except FileNotFoundError:
            return None

    def walk(self) -> Iterator[str]:
        """Every file below the folder; see ``RemoteFolder``. Linked folders are listed, not entered."""
        waiting = [""]
        while waiting:
            base = waiting.pop()
            if len(base) > _MAX_PATH_CHARACTERS:
                raise StoreRemoteError(f"{self.url}: its folders have no end; do not use it")
            try:
                entries = self._tried(base, partial(self._listed, base))
            except FileNotFoundError:
                continue  # moved away meanwhile, or nothing was ever written
            for entry in entries:
                path = inside(base + entry.filename, self.url)
                if stat.S_ISDIR(entry.st_mode or 0):
                    waiting.append(f"{path}/")
                else:
                    yield path

    def write(self, path: str, source: Path | bytes, *, only_new: bool = False) -> None:
        """Put a file there, whole or not at all; see ``RemoteFolder``.

        A kill leaves ``.name.….partial`` beside it, which may be removed.
        """
        folder, slash, name = inside(path, self.url).rpartition("/")
        temporary = f"{folder}{slash}.{name}.{secrets.token_hex(4)}{PARTIAL}"
        try:
            self._tried(path, lambda session: self._send(session, folder, temporary, source))
            if not same(self, temporary, source):
                raise StoreRemoteError(f"{self.url}/{path}: it did not arrive as it was sent; try again")
            rename = self._rename_new if only_new else self._rename
            tried_once(
                lambda: self._once(path, lambda session: rename(session, temporary, path)),
                lambda: same(self, path, source),
                f"{self.url}/{path}",
            )
        except BaseException:
            with suppress(StoreError, PassingError, OSError):
                self._once(path, lambda session: session.remove(self._at(temporary)))
            raise

    # Pieces of the above, each with a session that is its own.

    def _at(self, path: str) -> str:
        return f"{self._root}/{inside(path, self.url)}"

    def _size(self, session: paramiko.SFTPClient, path: str) -> int:
        found = session.stat(self._at(path))
        # Opening a pipe would never return.
        if not stat.S_ISREG(found.st_mode or 0):
            raise StoreRemoteError(f"{self.url}/{path}: not a regular file; do not use it")
        return found.st_size or 0

    def _received(self, session: paramiko.SFTPClient, path: str, start: int, stop: int) -> bytes:
        with session.open(self._at(path)) as file:
            data = b"".join(file.readv([(start, stop - start)]))
        if len(data) != stop - start:
            raise PassingError("the file was cut while it was read")
        return data

    def _listed(self, base: str, session: paramiko.SFTPClient) -> list[paramiko.SFTPAttributes]:
        return session.listdir_attr(f"{self._root}/{base}".rstrip("/"))

    def _send(self, session: paramiko.SFTPClient, folder: str, temporary: str, source: Path | bytes) -> None:
        self._make(session, f"{self._root}/{folder}".rstrip("/"))
        with opened(source) as file, session.open(self._at(temporary), "w") as there:
            there.set_pipelined()
            for data in iter(lambda: file.read(PIECE_BYTES), b""):
                there.write(data)

    def _make(self, session: paramiko.SFTPClient, folder: str) -> None:
        """Make a folder, and those above it, where they are missing."""
        try:
            session.stat(folder or "/")
        except FileNotFoundError:
            self._make(session, folder.rpartition("/")[0])
            # Another may make it at the same time.
            with suppress(OSError):
                session.mkdir(folder)
            session.stat(folder)

    def _rename(self, session: paramiko.SFTPClient, temporary: str, path: str) -> None:
        session.posix_rename(self._at(temporary), self._at(path))

    def _rename_new(self, session: paramiko.SFTPClient, temporary: str, path: str) -> None:
        """SFTP's own rename, which OpenSSH does as link and unlink, never in place of a file."""
        try:
            session.rename(self._at(temporary), self._at(path))
        except OSError:
            session.stat(self._at(path))
            raise _ThereError from None

    # The line to the server, and its errors in our words.

    def _tried(self, path: str, action: Callable[[paramiko.SFTPClient], _T]) -> _T:
        return tried(lambda: self._once(path, action), f"{self.url}/{path}")

    def _once(self, path: str, action: Callable[[paramiko.SFTPClient], _T]) -> _T:
        place = f"{self.url}/{path}"
        try:
            with self._line.session() as session:
                return action(session)
        except StoreError:
            raise
        except _ThereError:
            raise FileExistsError(f"{place} is there already") from None
        except (paramiko.SSHException, EOFError, TimeoutError):
            raise PassingError("the connection was cut, or the server does not answer") from None
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise FileNotFoundError(f"{place}: no such file") from None
            if error.errno == errno.EACCES:
                raise StoreRemoteError(
                    f"{place}: the server refuses; look at the permissions there"
                ) from None
            if isinstance(error, ConnectionError) or error.errno is not None:
                raise PassingError("the connection was cut") from None
            # SFTP's general failure: no space, a folder in place of a file, a read-only disk.
            raise StoreRemoteError(
                f"{place}: the server fails ({error}); look at space and folders"
            ) from None


class _ThereError(Exception):
    """Something stands where only something new may."""


class _Proxy(paramiko.ProxyCommand):
    """A command that leads to the host; closed more than once, and not left as a zombie."""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class _Line:
    """One connection with several sessions, each used by one thread at a time: paramiko's are not shared."""

    def __init__(self, url: str, host: str, port: int | None, user: str) -> None:
        self.url, self._host, self._port, self._user = url, host, port, user
        self._client: paramiko.SSHClient | None = None
        self._proxy: _Proxy | None = None
        self._idle: list[paramiko.SFTPClient] = []
        self._places = threading.BoundedSemaphore(_MAX_SESSIONS)
        self._lock = threading.Lock()

    @contextmanager
    def session(self) -> Generator[paramiko.SFTPClient]:
        """A session; it is not used again after a cut."""
        with self._places:
            session = self._take()
            try:
                yield session
            except Exception as error:
                cut = isinstance(error, paramiko.SSHException | EOFError | TimeoutError)
                if cut or session.get_channel().closed:
                    self.close()
                    raise PassingError("the connection was cut, or the server does not answer") from None
                self._idle.append(session)
                raise
            except BaseException:
                session.close()  # in the middle of an answer
                raise
            self._idle.append(session)

    def _take(self) -> paramiko.SFTPClient:
        with self._lock:
            transport = self._client.get_transport() if self._client else None
            if self._client is None or transport is None or not transport.is_active():
                self._close()
                self._client = self._connect()
            elif self._idle:
                return self._idle.pop()
            try:
                session = self._client.open_sftp()
            except (paramiko.SSHException, EOFError, OSError):
                self._close()
                raise PassingError("the server opens no session") from None
            session.get_channel().settimeout(_ANSWER_SECONDS)
            return session

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        self._idle.clear()
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._proxy is not None:
            with self._proxy.process:  # its pipes, which nobody reads any more
                self._proxy.close()
            self._proxy = None

    def _connect(self) -> paramiko.SSHClient:
        """A connection, as the ssh command would make it.

        Raises:
            StoreRemoteError: an unknown host, or no credentials.
            PassingError: out of reach.
        """
        known = self._configured()
        if known.get("proxyjump", "none") != "none":
            raise StoreRemoteError(
                f"{self.url}: posae does not know ProxyJump; in ~/.ssh/config write ProxyCommand ssh -W "
                f"%h:%p {known['proxyjump']}"
            )
        host = str(known.get("hostname", self._host))
        port = self._port or int(known.get("port", 22))
        client = paramiko.SSHClient()
        try:
            if "proxycommand" in known:
                self._proxy = _Proxy(known["proxycommand"])
            for name in ("~/.ssh/known_hosts", *_KNOWN_HOSTS, *known.get("userknownhostsfile", "").split()):
                with suppress(OSError):
                    client.load_system_host_keys(str(Path(name).expanduser()))
            client.set_missing_host_key_policy(paramiko.RejectPolicy())
            client.connect(
                host,
                port,
                username=self._user or known.get("user") or getpass.getuser(),
                key_filename=known.get("identityfile"),
                timeout=_CONNECT_SECONDS,
                banner_timeout=_CONNECT_SECONDS,
                auth_timeout=_CONNECT_SECONDS,
                sock=self._proxy,
            )
        except BaseException as error:
            client.close()
            self._close()
            self._explain(error)
        return client

    def _configured(self) -> dict[str, Any]:
        """What ``~/.ssh/config`` says of the host."""
        try:
            return paramiko.SSHConfig.from_path(str(Path("~/.ssh/config").expanduser())).lookup(self._host)
        except OSError:
            return {}
        except Exception as error:
            raise StoreRemoteError(
                f"{self.url}: ~/.ssh/config cannot be read ({type(error).__name__})"
            ) from None

    def _explain(self, error: BaseException) -> NoReturn:
        match error:
            case paramiko.BadHostKeyException():
                raise StoreRemoteError(
                    f"{self.url}: its key is not that in known_hosts; ask who runs it"
                ) from None
            case paramiko.SSHException() if isinstance(error, paramiko.AuthenticationException) or (
                "authentication" in str(error)  # no key at all is no error of its own
            ):
                raise StoreRemoteError(f"{self.url}: it lets us not in; looked in {_CREDENTIALS}") from None
            case paramiko.SSHException() if "not found in known_hosts" in str(error):
                raise StoreRemoteError(
                    f"{self.url}: an unknown host; connect once with ssh, which adds it to known_hosts"
                ) from None
            case socket.gaierror() if error.errno == socket.EAI_NONAME:
                raise StoreRemoteError(f"{self.url}: there is no such host; check the URL") from None
            case paramiko.SSHException() | EOFError() | OSError():
                raise PassingError("the server cannot be reached by SSH") from None
            case _:
                raise error
