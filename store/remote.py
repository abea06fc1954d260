"""A store's folder on a server: what reading, copying and publishing need of it.

One class for web servers (``http.py``) and one for everything that fsspec knows (``object_stores.py``). They
move bytes and nothing else: what a file must hold is the seal's to say, and the caller checks it. Both try
again what may pass (a connection cut, a server that is busy), and show no credentials in anything they say.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

SCHEMES = {
    "http": "http",
    "https": "http",
    "s3": "s3",
    "gs": "gs",
    "sftp": "sftp",
    "hf": "hf",
}
"""What a URL may begin with, and the extra of posae that brings what it needs."""


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


def open_remote(url: str) -> RemoteFolder:
    """PLACEHOLDER until merged."""
    raise NotImplementedError(url)
