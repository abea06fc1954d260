"""Reading the shards of one array: the store's hot path.

A shard file is its chunks one after the other, each encoded with a checksum, then an index: offset
and size of every chunk as little-endian uint64, and the index's own checksum (Zarr's
``sharding_indexed``). Reading maps the file and decodes straight out of the map into the caller's
buffer; the index is checked once a shard, the checksum every time a chunk is read (where nothing is
compressed, the first time: then rows come straight from the map). Of the maps at most 2 GiB stay in
memory, so a reader's does not grow with the store.
"""

import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from .codecs import CHECKSUM_BYTES, HEADER_BYTES, ChunkError, checksum
from .errors import StoreDamagedError
from .layout import ArraySpec
from .readable import ReadableFiles, ShardFile
from .seal import SealedFile

ABSENT = 2**64 - 1
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
    if not (absent == ABSENT).all() or (present > limit).any():
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
