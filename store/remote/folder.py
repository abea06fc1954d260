"""A store's folder on a server: what reading, copying and publishing need of it.

One class for each kind of server (``http.py``, ``s3.py``, ``gs.py``, ``sftp.py``, ``hub.py``), picked by
the URL (``servers.py``). They move bytes and nothing else: what a file must hold is the seal's to say,
and the caller checks it. All try again what may pass (a connection cut, a server that is busy;
``retries.py``), and show no credentials in anything they say.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable
from urllib.parse import urlsplit, urlunsplit

from ..errors import StoreDamagedError, StoreRemoteError

SCHEMES = {"http": None, "https": None, "s3": "s3", "gs": "gs", "sftp": "sftp", "hf": None}
"""What a URL may begin with, and the extra of posae that brings what it needs; None: posae itself."""

PIECE_BYTES = 1 << 24
"""What is held in memory of a file that is written or read back."""


class RemoteFolder(Protocol):
    """A folder on a server; files are named by paths below it, with ``/``. Safe to use from many threads.

    Attributes:
        url: as it may be shown: without password, token or query.
    """

    url: str

    def read(self, path: str, start: int, stop: int, of: int) -> bytes:
        """Bytes [start, stop) of a file; never more, never fewer.

        Args:
            path: the file.
            start: first byte.
            stop: one past the last byte, above ``start``.
            of: how many bytes the whole file must have.

        Raises:
            FileNotFoundError: no such file.
            StoreDamagedError: the file has another size, so it is not what was sealed.
            StoreRemoteError: the server refused, did not answer, or sent something else; tried again in vain.
        """
        ...

    def read_small(self, path: str, limit_bytes: int) -> bytes:
        """The whole of a file of unknown size.

        Raises:
            FileNotFoundError: no such file.
            StoreDamagedError: longer than ``limit_bytes``; no more than that is received.
            StoreRemoteError: as for ``read``.
        """
        ...

    def size_bytes(self, path: str) -> int | None:
        """The size of a file, or None where there is none.

        Raises:
            StoreRemoteError: as for ``read``.
        """
        ...

    def walk(self) -> Iterator[str] | None:
        """Every file below the folder; None where the server does not say (the web).

        Raises:
            StoreRemoteError: as for ``read``, or a path that leads out of the folder.
        """
        ...

    def write(self, path: str, source: Path | bytes, *, only_new: bool = False) -> None:
        """Put a file there, whole or not at all, in place of what may be there; return when it has arrived.

        It has arrived when the service has checked a checksum of ours, or else when it was read back and is
        the same.

        Args:
            path: the file.
            source: a file on this machine, or the bytes.
            only_new: leave what is there, and raise FileExistsError; exact where the service can do it.

        Raises:
            FileExistsError: ``only_new``, and something is there.
            StoreRemoteError: the server refused (the web always does), no credentials, no space.
        """
        ...


@runtime_checkable
class TakesMany(RemoteFolder, Protocol):
    """A folder where each write is an entry of a history: many files at once are better there."""

    def commit(self, files: Mapping[str, Path | bytes], *, only_new: bool = False) -> None:
        """Put several files there, all or none; else as ``write``."""
        ...


def is_url(place: str | Path) -> bool:
    """Whether ``place`` is on a server.

    >>> is_url("s3://bucket/pile.zarr"), is_url("data/pile.zarr"), is_url("C:/pile.zarr")
    (True, False, False)
    """
    scheme, separator, _ = str(place).partition("://")
    return bool(separator) and scheme.lower() in SCHEMES


def shown(url: str) -> str:
    """``url`` without what may be secret: password, query, fragment.

    >>> shown("https://me:secret@host:8443/pile.zarr?token=x")
    'https://me@host:8443/pile.zarr'
    """
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    user = user.partition(":")[0]
    return urlunsplit((parts.scheme, f"{user}{at}{host}" if user else host, parts.path.rstrip("/"), "", ""))


def inside(path: str, folder: str) -> str:
    """``path``, where it names a file inside the folder; what a stranger lists or seals need not.

    Args:
        path: with ``/``.
        folder: for the error, as it may be shown.

    Raises:
        StoreRemoteError: it is absolute, climbs, or has backslashes or control characters.

    >>> inside("layer_5/c.0.0.0", "s3://bucket/pile.zarr")
    'layer_5/c.0.0.0'
    """
    if "\\" in path or not path.isprintable() or not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise StoreRemoteError(f"{folder}: names {path!r}, which is no file inside the folder; do not use it")
    return path


def changed(path: str, n_bytes: int | None, of: int) -> StoreDamagedError:
    """The error for a file that has ``n_bytes`` on the server (None: more) and should have ``of``."""
    has = f"more than {of:,} bytes" if n_bytes is None else f"{n_bytes:,} bytes, not {of:,}"
    return StoreDamagedError(
        f"it changed on the server, where it has {has}",
        array=path,
        remedy="open the store again, or take another copy of it",
    )


def too_large(path: str, limit_bytes: int) -> StoreDamagedError:
    """The error for a small file that is not small."""
    return StoreDamagedError(f"larger than the {limit_bytes:,} bytes allowed here", array=path)


def opened(source: Path | bytes) -> BinaryIO:
    """What is to be written, as a file at its beginning."""
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def same(folder: RemoteFolder, path: str, source: Path | bytes) -> bool:
    """Whether a file there is byte for byte ``source``; reads it back, 16 MiB at a time.

    Raises:
        StoreRemoteError: as for ``RemoteFolder.read``.
    """
    with opened(source) as file:
        n_bytes = file.seek(0, io.SEEK_END)
        if folder.size_bytes(path) != n_bytes:
            return False
        file.seek(0)
        try:
            for start in range(0, n_bytes, PIECE_BYTES):
                stop = min(start + PIECE_BYTES, n_bytes)
                if folder.read(path, start, stop, n_bytes) != file.read(stop - start):
                    return False
        except (FileNotFoundError, StoreDamagedError):
            return False
    return True
