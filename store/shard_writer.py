"""Writing the shards of an array: encoding rows, streaming chunks, committing by a rename.

A shard is written to a temporary file under its lock, a chunk at a time, and renamed when its index is
durable: the rename is the commit record. Costs the codec's time, and two fsyncs per shard.
"""

import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from .codecs import checksum
from .errors import StoreDamagedError, StoreWriteError
from .files import StoreFiles, lock, partial_name, sync_folder, writing
from .layout import ArraySpec
from .seal import SealedFile
from .shards import ABSENT, ShardReader


class ShardWriter:
    """One shard being written; its temporary file is the lock, and a new holder starts over."""

    def __init__(self, files: StoreFiles, spec: ArraySpec, shard: int, handle: int) -> None:
        """Start with an empty file; use ``try_lock``."""
        self.spec = spec
        self.shard = shard
        self._files = files
        self._path = spec.shard_path(shard)
        self._target = files.root / self._path
        self._file = os.fdopen(handle, "wb", buffering=0)
        self._index = np.full((spec.chunks_per_shard, 2), ABSENT, "<u8")
        self._digest = hashlib.sha256()
        self._n_chunks = 0
        self._n_bytes = 0
        self._linked = ""

    @classmethod
    def try_lock(
        cls,
        files: StoreFiles,
        spec: ArraySpec,
        shard: int,
        *,
        wait: bool,
        is_committed: Callable[[], bool] | None = None,
    ) -> Self | None:
        """The writer of ``shard``, or None if another process has it or it is committed.

        Args:
            files: the store.
            spec: the array.
            shard: index of the shard.
            wait: wait for the other process instead of returning None at once.
            is_committed: whether nothing is left to do; by default whether the shard exists.

        Raises:
            StoreWriteError: the disk refused.
        """
        path = spec.shard_path(shard)
        partial = partial_name(path)
        is_done = is_committed or (lambda: ShardReader(files, spec).is_committed(shard))
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        while True:
            with writing(files.root / path), files.folder_of(path) as folder, ExitStack() as closing:
                handle = os.open(partial, flags, 0o666, dir_fd=folder)
                closing.callback(os.close, handle)
                try:
                    if not lock(handle, wait=wait):
                        return None
                    # It may have been renamed to its final name, or removed, before we got the lock.
                    if _is_at(folder, partial, handle):
                        if is_done():
                            with suppress(FileNotFoundError):  # who seals the store removes what is left
                                os.unlink(partial, dir_fd=folder)
                            return None
                        os.ftruncate(handle, 0)
                        closing.pop_all()
                        return cls(files, spec, shard, handle)
                except OSError as error:
                    if error.errno != errno.ESTALE:  # another machine removed it
                        raise
            if is_done():
                return None

    def append(self, encoded: bytes) -> None:
        """Write the next encoded chunk.

        Raises:
            StoreWriteError: the disk refused.
        """
        self._index[self._n_chunks] = (self._n_bytes, len(encoded))
        self._n_chunks += 1
        self._write(encoded)

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._n_bytes += len(data)
        view = memoryview(data)
        with writing(self._target):
            while len(view):
                view = view[self._file.write(view) :]

    def finish(self) -> SealedFile:
        """Write the index and make the file durable, without committing it; return its entry in the seal.

        Raises:
            StoreWriteError: the disk refused.
        """
        if self._n_chunks != self.spec.chunks_in(self.shard):
            raise ValueError(f"{self._n_chunks} of {self.spec.chunks_in(self.shard)} chunks written")
        index = self._index.tobytes()
        self._write(index + checksum(index))
        with writing(self._target):
            os.fsync(self._file.fileno())
        return SealedFile(self._n_bytes, self._digest.hexdigest())

    def adopt(self, source: ShardReader, shard: int) -> None:
        """Take a whole shard of a sealed store instead of ``append`` and ``finish``, without decoding it.

        The file is hard-linked if the file system supports it, and only its size and index are checked.
        Otherwise it is copied, and all of its bytes are checked.

        Args:
            source: the same layer of the other store, with the same codec and shards.
            shard: index of the shard there.

        Raises:
            StoreDamagedError: the file is missing or not what was sealed.
            StoreWriteError: the disk refused.
        """
        source.check_index(shard)
        path = source.spec.shard_path(shard)
        # Not the temporary name: that is the lock, and its next holder empties the file.
        linked = partial_name(f"{self._path}.linked")
        with writing(self._target), self._files.folder_of(self._path) as folder:
            with suppress(FileNotFoundError):
                os.unlink(linked, dir_fd=folder)
            if isinstance(source.files, StoreFiles) and source.files.link(path, folder, linked):
                self._linked = linked
                return
        for piece in source.files.pieces(path):
            self._write(piece)
        with writing(self._target):
            os.fsync(self._file.fileno())
        found = SealedFile(self._n_bytes, self._digest.hexdigest())
        if source.sealed is None or source.sealed.get(path) != found:
            raise StoreDamagedError(
                "its bytes are not those that were sealed", array=source.spec.path, shard=shard
            )

    def commit(self) -> None:
        """Rename the finished file: the commit record.

        Raises:
            StoreWriteError: the disk refused.
        """
        name, partial = self._path.rpartition("/")[2], partial_name(self._path)
        self.check_is_held()
        with writing(self._target), self._files.folder_of(self._path) as folder:
            os.rename(self._linked or partial, name, src_dir_fd=folder, dst_dir_fd=folder)
            sync_folder(folder)
            if self._linked:
                self._remove_temporary(folder)
        self._file.close()

    def check_is_held(self) -> None:
        """Stop if the temporary file, which is the lock, was replaced or removed.

        Raises:
            StoreWriteError: another program changed the folder.
        """
        with writing(self._target), self._files.folder_of(self._path) as folder:
            if not _is_at(folder, partial_name(self._path), self._file.fileno()):
                raise StoreWriteError(
                    f"{self._target}: its temporary file was removed by another program as it was written; "
                    "run the same command again"
                )

    def _remove_temporary(self, folder: int) -> None:
        # A linked file may have both names, as renaming one name of a file to another does nothing.
        for name in filter(None, (self._linked, partial_name(self._path))):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)

    def abandon(self) -> None:
        """Remove the file, unless it is committed, and free the lock."""
        if not self._file.closed:
            with suppress(OSError), self._files.folder_of(self._path) as folder:
                self._remove_temporary(folder)
            self._file.close()


def _is_at(folder: int, name: str, handle: int) -> bool:
    """Whether the open file ``handle`` is the one called ``name`` in a folder, by the folder's descriptor."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(name, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return False


def encode_chunks(spec: ArraySpec, rows: NDArray[Any]) -> list[bytes]:
    """Consecutive rows as encoded chunks, the last one padded with fill."""
    chunks: list[bytes] = []
    for start in range(0, len(rows), spec.chunk_rows):
        part = rows[start : start + spec.chunk_rows]
        if len(part) < spec.chunk_rows:
            padded = np.full(spec.chunk_shape, spec.fill, spec.dtype)
            padded[: len(part)] = part
            part = padded
        chunks.append(spec.codec.encode(np.ascontiguousarray(part, spec.dtype)))
    return chunks


class Rows(Protocol):
    """Entries of an array: a numpy array, or an object that makes them on access."""

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        """The entries of a slice without a step."""
        ...


def write_array(
    files: StoreFiles,
    spec: ArraySpec,
    rows: Rows,
    existing: Callable[[int], bytes | None] = lambda _shard: None,
) -> None:
    """Write every shard of a small array, durably.

    Args:
        files: the store.
        spec: the array.
        rows: all entries.
        existing: the file of a shard, if there is one to take unchanged.

    Raises:
        StoreWriteError: the disk refused.
    """
    for shard in range(spec.n_shards):
        if data := existing(shard):
            files.write(spec.shard_path(shard), data)
        else:
            start = shard * spec.shard_rows
            write_shard(files, spec, shard, rows[start : start + spec.shard_rows])


def write_shard(files: StoreFiles, spec: ArraySpec, shard: int, rows: NDArray[Any]) -> None:
    """Write or replace one shard of a small array, durably and without a lock.

    Raises:
        StoreWriteError: the disk refused.
    """
    files.write(spec.shard_path(shard), shard_bytes(spec, rows))


def shard_bytes(spec: ArraySpec, rows: NDArray[Any]) -> bytes:
    """The file of a shard that holds ``rows``."""
    index = np.full((spec.chunks_per_shard, 2), ABSENT, "<u8")
    data = bytearray()
    for number, encoded in enumerate(encode_chunks(spec, rows)):
        index[number] = (len(data), len(encoded))
        data += encoded
    raw = index.tobytes()
    return bytes(data + raw + checksum(raw))
