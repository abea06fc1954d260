"""The interface of a store's files for readers, local (``files.py``) or on a server (``remote/files.py``).

A local shard is mapped, or read if its file system has no maps. One on a server is fetched in parts and
cached.
"""

import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

WHOLE_BYTES = 2**21
"""A file on a server up to this size is always fetched whole."""


class ShardFile(Protocol):
    """A file of consecutive parts; its length is the file's, in bytes."""

    def __len__(self) -> int:
        """Bytes of the file."""
        ...

    def parts(
        self, edges: Sequence[int], wanted: Sequence[int], *, anew: bool = False
    ) -> Sequence[memoryview]:
        """Some of several parts in a row, read together.

        Args:
            edges: part i is bytes ``edges[i]`` to ``edges[i + 1]``; sorted.
            wanted: numbers of the parts to return; the others may be cached.
            anew: bypass the cache, as its bytes were wrong.

        Raises:
            StoreDamagedError: the file is missing, or has another size than was sealed.
            StoreRemoteError: the server refused, or does not answer.
        """
        ...


class MappedFile:
    """A file as read-only memory."""

    def __init__(self, data: mmap.mmap) -> None:
        """Use the map of a whole file."""
        self._data = data

    def __len__(self) -> int:
        """Bytes of the file when it was mapped."""
        return len(self._data)

    def parts(
        self, edges: Sequence[int], wanted: Sequence[int], *, anew: bool = False
    ) -> Sequence[memoryview]:
        """The parts, not copied."""
        data = memoryview(self._data)
        return [data[edges[part] : edges[part + 1]] for part in wanted]

    @property
    def is_cut_short(self) -> bool:
        """Whether the file is now shorter than its map, so that reading could kill the process."""
        return self._data.size() < len(self._data)

    def will_need(self, start: int, stop: int) -> None:
        """Ask the operating system to read bytes [start, stop) ahead."""
        first = start - start % mmap.PAGESIZE
        with suppress(OSError, ValueError):
            self._data.madvise(mmap.MADV_WILLNEED, first, stop - first)

    def let_go(self) -> None:
        """Release the pages that were read."""
        self._data.madvise(mmap.MADV_DONTNEED)


class UnmappedFile:
    """A file of a file system without maps, e.g. of some in user space."""

    def __init__(self, file: int) -> None:
        """Duplicate the descriptor, and close it at the end."""
        self._file, self._n_bytes = file, os.fstat(file).st_size
        weakref.finalize(self, os.close, file)

    def __len__(self) -> int:
        """Bytes of the file when it was opened."""
        return self._n_bytes

    def parts(
        self, edges: Sequence[int], wanted: Sequence[int], *, anew: bool = False
    ) -> Sequence[memoryview]:
        """The parts, read; shorter if the file is."""
        return [self._part(edges[part], edges[part + 1]) for part in wanted]

    def _part(self, start: int, stop: int) -> memoryview:
        data = bytearray()
        while len(data) < stop - start:
            piece = os.pread(self._file, stop - start - len(data), start + len(data))
            if not piece:
                break
            data += piece
        return memoryview(data)


class ReadableFiles(Protocol):
    """The files of a store, local or on a server."""

    @property
    def root(self) -> Path | str:
        """The folder, or the URL without credentials."""
        ...

    @property
    def has_latency(self) -> bool:
        """Whether reads have a high latency, as from a server, and should be few, large and concurrent."""
        ...

    def read(self, path: str, limit_bytes: int) -> bytes:
        """The bytes of a small file; see ``StoreFiles.read``."""
        ...

    def pieces(self, path: str, start: int = 0) -> Iterator[bytes]:
        """The bytes of a file of any size from ``start``, a few megabytes at a time, not from a cache.

        Raises:
            FileNotFoundError: no such file.
            StoreDamagedError: not a regular file, or of another size than was sealed.
            StoreRemoteError: the server refused, or does not answer.
        """
        ...

    def map(self, path: str) -> ShardFile:
        """A file to decode chunks from.

        Raises:
            FileNotFoundError: no such file, or the seal does not name it.
            StoreDamagedError: not a regular file, or empty.
        """
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
