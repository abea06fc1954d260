"""Reading and writing the shards of one array: the store's hot path.

A shard file is its chunks one after the other, each encoded with a checksum, then an index: offset
and size of every chunk as little-endian uint64, and the index's own checksum (Zarr's
``sharding_indexed``). Reading maps the file and decodes straight out of the map into the caller's
buffer; the index is checked once a shard, the checksum every time a chunk is read (where nothing is
compressed, the first time: then rows come straight from the map). Of the maps at most 2 GiB stay in
memory, so a reader's does not grow with the store. Writing streams: a chunk at a time.
"""

import hashlib
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from .codecs import CHECKSUM_BYTES, HEADER_BYTES, ChunkError, checksum
from .errors import StoreDamagedError
from .files import StoreFiles, partial_name, sync_folder, take_lock, writing
from .layout import ArraySpec
from .readable import ReadableFiles, ShardFile
from .seal import SealedFile

_ABSENT = 2**64 - 1
# A map keeps its file open; a process may often open no more than 1,024. Of all readers together.
_MAPS_KEPT = min(4096, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
# Pages of a map that were read count as the process's memory until let go. Having them back costs a tenth of
# the decoding, so small stores keep theirs.
_PAGES_KEPT_BYTES = 2**31
_CUT_SHORT = "the file was cut short while it was read"


def index_bytes(spec: ArraySpec) -> int:
    """Size of the index at the end of every shard of ``spec``."""
    return 16 * spec.chunks_per_shard + CHECKSUM_BYTES


def parse_index(spec: ArraySpec, shard: int, data: bytes | memoryview, file_bytes: int) -> NDArray[np.uint64]:
    """Offset and size of the chunks that hold rows; uint64 [chunks, 2].

    Args:
        spec: the array.
        shard: which of its shards.
        data: the last ``index_bytes(spec)`` bytes of the file.
        file_bytes: size of the whole file.

    Raises:
        StoreDamagedError: the checksum does not hold, or the entries are not chunks that follow
            each other and fill the file.
    """

    def damaged(problem: str) -> StoreDamagedError:
        return StoreDamagedError(problem, array=spec.path, shard=shard)

    if len(data) != index_bytes(spec):
        raise damaged("the file is cut short")
    raw = bytes(data)
    if checksum(raw[:-CHECKSUM_BYTES]) != raw[-CHECKSUM_BYTES:]:
        raise damaged("the checksum of its index does not hold (the file is cut short or changed)")
    entries = np.frombuffer(raw[:-CHECKSUM_BYTES], "<u8").reshape(-1, 2)
    present, absent = np.split(entries, [spec.chunks_in(shard)])
    # A chunk that did not compress is its values and a header.
    largest = spec.chunk_bytes + HEADER_BYTES + CHECKSUM_BYTES
    limit = np.uint64(file_bytes)
    if not (absent == _ABSENT).all() or (present > limit).any():
        raise damaged("its index points outside the file")
    if (present[:, 1] <= CHECKSUM_BYTES).any() or (present[:, 1] > largest).any():
        raise damaged("its index names chunks of sizes that no chunk has")
    ends = np.cumsum(present[:, 1])
    if (present[:, 0] != np.concatenate([[0], ends[:-1]])).any() or int(ends[-1]) + len(raw) != file_bytes:
        raise damaged("its index names chunks that do not fill the file")
    return present


class _OpenShard(NamedTuple):
    file: ShardFile
    chunks: NDArray[np.uint64]  # offset and size; [chunks, 2]
    checked: NDArray[np.bool_]  # payload checked, for good; [chunks]
    touched: NDArray[np.bool_]  # read since pages were last let go; [chunks]

    def place(self, within: int) -> tuple[int, int]:
        """First byte of a chunk, and one past its last."""
        start, size = self.chunks[within].tolist()
        return start, start + size


class ShardReader:
    """Chunks of one array, by number; thread-safe."""

    _all: ClassVar[weakref.WeakValueDictionary[int, Self]] = weakref.WeakValueDictionary()

    def __init__(
        self, files: ReadableFiles, spec: ArraySpec, sealed: Mapping[str, SealedFile] | None = None
    ) -> None:
        """Speak of the array; nothing is opened yet.

        Args:
            files: the store.
            spec: the array.
            sealed: what the seal names, where there is one: no other file is opened.
        """
        self.files = files
        self.spec = spec
        self.sealed = sealed
        self._mapped: OrderedDict[int, _OpenShard] = OrderedDict()
        self._touched_bytes = 0
        self._scratch = threading.local()
        self._lock = threading.Lock()
        self._all[id(self)] = self

    @classmethod
    def cut_short(cls) -> list[StoreDamagedError]:
        """What is to be said of mapped files that are shorter than their maps: reading one kills the process.

        Takes no lock, so a handler of that signal may ask.
        """
        readers = [reader for ref in cls._all.valuerefs() if (reader := ref()) is not None]
        return [
            reader._damaged(shard, _CUT_SHORT)
            for reader in readers
            for shard, mapped in list(reader._mapped.items())
            if mapped.file.is_cut_short
        ]

    def is_committed(self, shard: int) -> bool:
        """Whether the file of ``shard`` is there with an index that holds."""
        try:
            file = self.files.map(self.spec.shard_path(shard))
            self._index(shard, file)
        except (FileNotFoundError, StoreDamagedError):
            return False
        return True

    def _index(self, shard: int, file: ShardFile) -> NDArray[np.uint64]:
        size = len(file)
        start = max(0, size - index_bytes(self.spec))
        try:
            return parse_index(self.spec, shard, file.part(start, size), size)
        except StoreDamagedError:
            if not file.forget(start, size):
                raise
        return parse_index(self.spec, shard, file.part(start, size), size)

    def check_index(self, shard: int) -> None:
        """Map ``shard`` and check its index.

        Raises:
            StoreDamagedError: the file is missing or its index does not hold.
        """
        self._shard(shard)

    def _shard(self, shard: int) -> _OpenShard:
        with self._lock:
            mapped = self._mapped.get(shard)
            if mapped is None:
                mapped = self._open(shard)
                self._mapped[shard] = mapped
            else:
                self._mapped.move_to_end(shard)
                return mapped
        self._close_some()
        return mapped

    @classmethod
    def _close_some(cls) -> None:
        """Keep the maps of all readers together within what a process may open."""
        while True:
            readers = [reader for ref in cls._all.valuerefs() if (reader := ref()) is not None]
            if sum(len(reader._mapped) for reader in readers) <= _MAPS_KEPT:
                return
            most = max(readers, key=lambda reader: len(reader._mapped))
            with most._lock:
                if most._mapped:
                    most._mapped.popitem(last=False)

    def _open(self, shard: int) -> _OpenShard:
        path = self.spec.shard_path(shard)
        entry = self.sealed.get(path) if self.sealed is not None else None
        if self.sealed is not None and entry is None:
            raise self._damaged(shard, f"the seal does not name its file {path}")
        try:
            file = self.files.map(path)
        except FileNotFoundError:
            if self.files.is_there():
                raise self._damaged(shard, f"its file {path} is missing") from None
            raise StoreDamagedError(
                f"its file {path} is missing, as the folder vanished",
                array=self.spec.path,
                shard=shard,
                remedy="put it back and run the same command again",
            ) from None
        except StoreDamagedError as error:
            raise self._damaged(shard, error.problem) from None
        if entry is not None and entry.n_bytes != len(file):
            raise self._damaged(shard, f"its file has {len(file):,} bytes, {entry.n_bytes:,} were sealed")
        chunks = self._index(shard, file)
        return _OpenShard(file, chunks, *np.zeros((2, len(chunks)), np.bool_))

    def _damaged(self, shard: int, problem: str) -> StoreDamagedError:
        return StoreDamagedError(problem, array=self.spec.path, shard=shard)

    def _still_whole(self, shard: int) -> _OpenShard:
        mapped = self._shard(shard)
        # Reading a map past the end of a file cut short meanwhile would kill the process.
        if mapped.file.is_cut_short:
            raise self._damaged(shard, _CUT_SHORT)
        return mapped

    @contextmanager
    def _payload(self, chunk: int) -> Generator[memoryview]:
        """The checked payload of a chunk, in the map.

        Raises:
            StoreDamagedError: the file is missing, cut short, or the chunk is not what was written.
        """
        shard, within = divmod(chunk, self.spec.chunks_per_shard)
        mapped = self._still_whole(shard)
        start, stop = mapped.place(within)
        try:
            yield self._checked(mapped, within)
        except ChunkError as error:
            raise StoreDamagedError(str(error), array=self.spec.path, shard=shard, chunk=within) from None
        if not mapped.touched[within]:
            mapped.touched[within] = True
            self._let_go_of_pages(stop - start)

    def _checked(self, shard: _OpenShard, within: int) -> memoryview:
        """The payload of a chunk whose checksum holds."""
        start, stop = shard.place(within)
        data = shard.file.part(start, stop)
        if shard.checked[within]:
            return data[:-CHECKSUM_BYTES]
        try:
            payload = self.spec.codec.payload(data, self.spec.chunk_bytes)
        except ChunkError:
            if not shard.file.forget(start, stop):
                raise
            payload = self.spec.codec.payload(shard.file.part(start, stop), self.spec.chunk_bytes)
        # Uncompressed rows may be read one by one, and a checksum over all each time would cost more.
        shard.checked[within] = self.spec.codec.compressor is None and shard.file.stays
        return payload

    def _let_go_of_pages(self, n_bytes: int) -> None:
        """Count pages that a map brought into memory, and let go of all when they are many."""
        with self._lock:
            self._touched_bytes += n_bytes
            if self._touched_bytes < _PAGES_KEPT_BYTES:
                return
            self._touched_bytes = 0
            for mapped in self._mapped.values():
                mapped.file.let_go()
                mapped.touched[:] = False

    def read_chunk(self, chunk: int, out: NDArray[Any]) -> None:
        """Decode a chunk into ``out``, C-contiguous bits of shape ``spec.chunk_shape``.

        Raises:
            StoreDamagedError: the chunk is missing or not what was written.
        """
        with self._payload(chunk) as payload:
            self.spec.codec.decode(payload, out)

    def encoded(self, chunk: int) -> bytes:
        """A chunk as it lies in its file, its checksum last; checked, not decoded.

        Raises:
            StoreDamagedError: the chunk is missing or not what was written.
        """
        with self._payload(chunk) as payload:
            data = bytes(payload)
        return data + checksum(data)

    def _read_part(self, chunk: int, part: Any) -> NDArray[Any]:
        """Some entries of a chunk, by an index into it; bits. No more of it is kept."""
        shape, dtype = self.spec.chunk_shape, self.spec.dtype
        if self.spec.codec.compressor is None:
            with self._payload(chunk) as payload:
                return np.frombuffer(payload, dtype).reshape(shape)[part]
        if not hasattr(self._scratch, "chunk"):
            self._scratch.chunk = np.empty(shape, dtype)
        scratch: NDArray[Any] = self._scratch.chunk
        self.read_chunk(chunk, scratch)
        return scratch[part]

    def will_need(self, chunks: Iterable[int]) -> None:
        """Ask the operating system to read these chunks ahead, without waiting."""
        for chunk in chunks:
            shard, within = divmod(chunk, self.spec.chunks_per_shard)
            opened = self._shard(shard)
            opened.file.will_need(*opened.place(within))

    def read_rows(
        self,
        rows: NDArray[np.int64],
        pool: Executor | None = None,
        columns: NDArray[np.int64] | None = None,
    ) -> NDArray[Any]:
        """The entries ``rows`` of axis 0, in that order; bits [rows, …].

        Args:
            rows: indices from 0.
            pool: threads to decode in; by default this one.
            columns: indices into axis 1, by default all of it; chunks are decoded whole all the same, but
                one at a time.

        Raises:
            StoreDamagedError: a chunk is missing or not what was written.
        """
        spec = self.spec
        width = spec.shape[1:2] if columns is None else (len(columns),)
        out = np.empty((len(rows), *width, *spec.shape[2:]), spec.dtype)
        chunk_of = rows // spec.chunk_rows
        order = np.argsort(chunk_of, kind="stable")
        starts = np.flatnonzero(np.diff(chunk_of[order], prepend=-1))
        groups: Sequence[NDArray[np.int64]] = np.split(order, starts[1:]) if len(rows) else []

        def read(places: NDArray[np.int64]) -> None:
            within = rows[places] % spec.chunk_rows
            first = int(places[0])
            chunk = int(chunk_of[first])
            whole = (
                columns is None
                and len(places) == spec.chunk_rows
                and bool((within == np.arange(spec.chunk_rows)).all() and (np.diff(places) == 1).all())
            )
            if whole:
                self.read_chunk(chunk, out[first : first + spec.chunk_rows])
            else:
                part = within if columns is None else (within[:, np.newaxis], columns)
                out[places] = self._read_part(chunk, part)

        if pool is None:
            for places in groups:
                read(places)
            return out
        running = [pool.submit(read, places) for places in groups]
        try:
            for future in running:
                future.result()
        finally:
            stop(running)
        return out


def stop(running: Sequence[Future[None]]) -> None:
    """Leave no thread that still reads a map, or writes into a buffer that others will use."""
    for future in running:
        future.cancel()
    wait(running)


class ShardDigest(NamedTuple):
    """What the seal says of a file."""

    n_bytes: int
    sha256: bytes


class ShardWriter:
    """One shard being written, under its lock; whoever holds the lock alone may write it.

    The temporary file is the lock: a kill frees it, and the next holder begins it anew.
    """

    def __init__(self, files: StoreFiles, spec: ArraySpec, shard: int, handle: int) -> None:
        """Begin with an empty file; use ``try_lock``."""
        self.spec = spec
        self.shard = shard
        self._files = files
        self._path = spec.shard_path(shard)
        self._target = files.root / self._path
        self._file = os.fdopen(handle, "wb", buffering=0)
        self._index = np.full((spec.chunks_per_shard, 2), _ABSENT, "<u8")
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
        """The writer of ``shard``, or None where another process has it or it is committed.

        Args:
            files: the store.
            spec: the array.
            shard: which of its shards.
            wait: wait for the other process, rather than return None at once.
            is_committed: whether nothing is left to do; by default, whether the shard is there.

        Raises:
            StoreWriteError: the disk refused.
        """
        path = spec.shard_path(shard)
        partial = partial_name(path)
        reader = ShardReader(files, spec)
        is_done = is_committed or (lambda: reader.is_committed(shard))
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        while True:
            with writing(files.root / path), files.folder_of(path) as folder:
                handle = os.open(partial, flags, 0o666, dir_fd=folder)
            try:
                # The file may have been renamed to its final name, or removed, before we got the lock.
                ours = take_lock(handle, files.root / path, wait=wait) and _is_at(files, path, handle)
            except BaseException as error:
                os.close(handle)
                if isinstance(error, BlockingIOError):
                    return None
                raise
            if not ours:
                os.close(handle)
                if is_done():
                    return None
                continue
            if is_done():
                with suppress(FileNotFoundError), files.folder_of(path) as folder:
                    os.unlink(partial, dir_fd=folder)
                os.close(handle)
                return None
            os.ftruncate(handle, 0)
            return cls(files, spec, shard, handle)

    def append(self, encoded: bytes) -> None:
        """Write the next chunk, as its codec encoded it.

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

    def finish(self) -> ShardDigest:
        """Write the index and make the file durable; it is not committed yet.

        Raises:
            StoreWriteError: the disk refused.
        """
        if self._n_chunks != self.spec.chunks_in(self.shard):
            raise ValueError(f"{self._n_chunks} of {self.spec.chunks_in(self.shard)} chunks written")
        index = self._index.tobytes()
        self._write(index + checksum(index))
        with writing(self._target):
            os.fsync(self._file.fileno())
        return ShardDigest(self._n_bytes, self._digest.digest())

    def adopt(self, source: ShardReader, shard: int) -> None:
        """Be a whole shard of a sealed store, in place of ``append`` and ``finish``; nothing is decoded.

        The file gets one more name where the file system can do that, and only its size and its index are
        looked at. Else it is copied, and all of its bytes checked.

        Args:
            source: the same layer, with the same codec and shards, of the other store.
            shard: which of its shards.

        Raises:
            StoreDamagedError: the file is missing or not what was sealed.
            StoreWriteError: the disk refused.
        """
        source.check_index(shard)
        path = source.spec.shard_path(shard)
        # Not the temporary name: that is the lock, and whoever gets it next empties the file.
        linked = partial_name(f"{self._path}.linked")
        with writing(self._target), self._files.folder_of(self._path) as folder:
            with suppress(FileNotFoundError):
                os.unlink(linked, dir_fd=folder)
            if source.files.link(path, folder, linked):
                self._linked = linked
                return
        for piece in source.files.pieces(path):
            self._write(piece)
        with writing(self._target):
            os.fsync(self._file.fileno())
        found = (self._n_bytes, self._digest.hexdigest())
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
        with writing(self._target), self._files.folder_of(self._path) as folder:
            os.rename(self._linked or partial, name, src_dir_fd=folder, dst_dir_fd=folder)
            sync_folder(folder)
            if self._linked:
                self._remove_temporary(folder)
        self._file.close()

    def _remove_temporary(self, folder: int) -> None:
        # Of a linked file both may be there: renaming one name of a file to another does nothing.
        for name in filter(None, (self._linked, partial_name(self._path))):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)

    def abandon(self) -> None:
        """Remove the file, unless it is committed, and free the lock."""
        if not self._file.closed:
            with suppress(OSError), self._files.folder_of(self._path) as folder:
                self._remove_temporary(folder)
            self._file.close()


def _is_at(files: StoreFiles, path: str, handle: int) -> bool:
    """Whether the open file ``handle`` is the one at the temporary name of ``path``."""
    try:
        with files.folder_of(path) as folder:
            there = os.stat(partial_name(path), dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


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
    """Entries of an array, some at a time: numpy's own, or what makes them as they are asked for."""

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
        rows: all of its entries.
        existing: the file of a shard, where there is one to be taken as it is.

    Raises:
        StoreWriteError: the disk refused.
    """
    for shard in range(spec.n_shards):
        if data := existing(shard):
            files.write(spec.shard_path(shard), data)
        else:
            start = shard * spec.shard_rows
            write_shard(files, spec, shard, rows[start : start + spec.shard_rows])


def most_bytes(spec: ArraySpec) -> int:
    """The most that a shard's file can be long."""
    return spec.chunks_per_shard * (spec.chunk_bytes + HEADER_BYTES + CHECKSUM_BYTES) + index_bytes(spec)


def write_shard(files: StoreFiles, spec: ArraySpec, shard: int, rows: NDArray[Any]) -> None:
    """Write one shard of a small array, in place of what may be there; durable, no lock.

    Raises:
        StoreWriteError: the disk refused.
    """
    files.write(spec.shard_path(shard), shard_bytes(spec, rows))


def shard_bytes(spec: ArraySpec, rows: NDArray[Any]) -> bytes:
    """The file of a shard that holds ``rows``."""
    index = np.full((spec.chunks_per_shard, 2), _ABSENT, "<u8")
    data = bytearray()
    for number, encoded in enumerate(encode_chunks(spec, rows)):
        index[number] = (len(data), len(encoded))
        data += encoded
    raw = index.tobytes()
    return bytes(data + raw + checksum(raw))
