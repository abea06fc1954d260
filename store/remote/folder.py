"""A store's folder on a server: what reading, copying and publishing need of it.

Two kinds: ``objects.py`` (the web, S3, Google's and Azure's storage) and ``hub.py`` (the Hugging Face hub).
They move bytes and nothing else: what a file must hold is in the seal, and the caller checks it. Both retry
what may pass (``retries.py``), and show no credentials in any message.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit, urlunsplit

from ..errors import SettingsError, StoreRemoteError

SCHEMES = ("http", "https", "hf", "s3", "gs", "az")
"""What a URL may begin with."""


class WholeFilesOnlyError(StoreRemoteError):
    """The server cannot send a part of a file."""


class ListedFile(NamedTuple):
    """A file as a server lists it."""

    n_bytes: int

    digest: str | None
    """One of ``RemoteFolder.digests`` of its bytes, or of no meaning (some services, some files)."""


class RemoteFolder(Protocol):
    """A folder on a server; files are named by paths below it, with ``/``. Safe to use from many threads.

    Attributes:
        url: as it may be shown: without password, token or query.
    """

    url: str

    def read(self, path: str, start: int, stop: int, of: int) -> bytes:
        """Bytes [start, stop) of a file; never more, never fewer. One request.

        Args:
            path: the file.
            start: first byte.
            stop: one past the last byte, above ``start``.
            of: how many bytes the whole file must have.

        Raises:
            FileNotFoundError: no such file.
            StoreDamagedError: the file has another size, so it is not what was sealed.
            WholeFilesOnlyError: a part was requested, but the server sends whole files only.
            StoreRemoteError: the server refused, did not answer, or sent something else; retried in vain.
        """
        ...

    def pieces(self, path: str, of: int) -> Iterator[bytes]:
        """The whole of a file of any size, in pieces. One request, and one more each time it is cut.

        Arguments and errors are those of ``read``, but for WholeFilesOnlyError.
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
        """The size of a file, or None where there is none."""
        ...

    def list_files(self) -> dict[str, ListedFile] | None:
        """Every file below the folder; None where the server does not list (the web).

        Raises:
            StoreRemoteError: as for ``read``, or a path that leads out of the folder.
        """
        ...

    def digests(self, source: Path) -> set[str]:
        """The digests under which the service may list the bytes of a local file; empty if it lists none."""
        ...

    def write(self, path: str, source: Path | bytes, *, only_new: bool = False) -> None:
        """Write a file, whole or not at all, in place of what may be there.

        Args:
            path: the file.
            source: a file on this machine, or the bytes.
            only_new: leave what is there, and raise FileExistsError. Exact for small files; for files of
                more than 64 MiB in object storage, what another process writes meanwhile is replaced.

        Raises:
            FileExistsError: ``only_new``, and something is there (it may be what an earlier try wrote).
            StoreRemoteError: the server refused (the web always does), no credentials, no space.
        """
        ...


@runtime_checkable
class TakesMany(RemoteFolder, Protocol):
    """A folder where each write is a commit in a history: many files at once are better there."""

    def commit(self, files: Mapping[str, Path | bytes], *, only_new: bool = False) -> None:
        """Write several files, all or none; else as ``write``."""
        ...


def is_url(place: str | Path) -> bool:
    """Whether ``place`` is a URL, of whatever scheme.

    >>> is_url("s3://bucket/pile.zarr"), is_url("data/pile.zarr"), is_url("C:/pile.zarr")
    (True, False, False)
    """
    scheme, separator, _ = str(place).partition("://")
    return bool(separator) and scheme.isalnum()


def refuse_half_url(place: str | Path) -> None:
    """Refuse, with SettingsError, a URL that lost a slash, as in a ``Path``: it names no folder."""
    scheme, _, rest = str(place).partition(":/")
    if scheme.lower() in SCHEMES and not rest.startswith("/"):
        raise SettingsError(f"{place} lacks a slash; write {scheme}://{rest}")


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
    """``path``, if it names a file inside the folder; a stranger's listing or seal may not.

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
