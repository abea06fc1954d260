"""What readers ask of a store's files, wherever they lie: on this machine (``files.py``), or on a server.

A local shard is a map of its file. One on a server (``remote_files.py``) is fetched part by part, and kept.
"""

import mmap
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .files import StoreFiles


class ShardFile(Protocol):
    """A file that chunks are decoded out of; its length is the file's, in bytes."""

    def __len__(self) -> int:
        """Bytes of the file."""
        ...

    def part(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop)."""
        ...

    @property
    def is_cut_short(self) -> bool:
        """Whether the file is shorter now, so that reading a part would kill the process."""
        ...

    @property
    def stays(self) -> bool:
        """Whether a part that was checked stays as it is."""
        ...

    def will_need(self, start: int, stop: int) -> None:
        """Begin to read [start, stop), without waiting, where that costs nothing."""
        ...

    def let_go(self) -> None:
        """Free memory that was read into."""
        ...

    def forget(self, start: int, stop: int) -> bool:
        """Forget a part that is not what was written; whether reading it again may help."""
        ...


class MappedFile:
    """A file as read-only memory."""

    stays = True

    def __init__(self, data: mmap.mmap) -> None:
        """Take the map of a whole file."""
        self._data = data

    def __len__(self) -> int:
        """Bytes of the file when it was mapped."""
        return len(self._data)

    def part(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop), not copied."""
        return memoryview(self._data)[start:stop]

    @property
    def is_cut_short(self) -> bool:
        """Whether the file is now shorter than its map."""
        return self._data.size() < len(self._data)

    def will_need(self, start: int, stop: int) -> None:
        """Ask the operating system to read ahead."""
        first = start - start % mmap.PAGESIZE
        with suppress(OSError, ValueError):
            self._data.madvise(mmap.MADV_WILLNEED, first, stop - first)

    def let_go(self) -> None:
        """Give the pages back that were read."""
        self._data.madvise(mmap.MADV_DONTNEED)

    def forget(self, start: int, stop: int) -> bool:
        """Nothing: what is on the disk is what there is."""
        return False


class ReadableFiles(Protocol):
    """The files of a store, on this machine or on a server."""

    @property
    def root(self) -> Path | str:
        """The folder, or the URL as it may be shown."""
        ...

    def read(self, path: str, limit_bytes: int) -> bytes:
        """The bytes of a small file; see ``StoreFiles.read``."""
        ...

    def pieces(self, path: str) -> Iterator[bytes]:
        """The bytes of a file of any size, a few megabytes at a time, not from a cache.

        Raises:
            FileNotFoundError: no such file.
            StoreDamagedError: not a regular file, or of another size than was sealed.
            StoreRemoteError: the server refused, or does not answer.
        """
        ...

    def map(self, path: str) -> ShardFile:
        """A file to decode chunks out of; see ``StoreFiles.map``."""
        ...

    def size_bytes(self, path: str) -> int | None:
        """The size of a file, or None where there is none."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is something at ``path``."""
        ...

    def is_there(self) -> bool:
        """Whether the folder itself is there."""
        ...

    def walk(self) -> Iterator[str]:
        """Every file below the root."""
        ...

    def link(self, path: str, folder: int, name: str) -> bool:
        """Give a file one more name in a folder of this machine; whether that could be done."""
        ...

    def local(self, path: str) -> AbstractContextManager["StoreFiles"]:
        """Files of this machine, among them the whole of the one at ``path``, for as long as it is needed.

        Raises:
            FileNotFoundError: no such file.
            StoreDamagedError: of another size than was sealed.
        """
        ...
