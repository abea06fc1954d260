"""Reading the shards of one array: the store's hot path.

A shard file consists of its chunks, each encoded with a checksum, and an index: offset and size of every
chunk as little-endian uint64, and the index's own checksum (Zarr's ``sharding_indexed``). Reading maps the
file and decodes from the map into the caller's buffer. The index is checked once per shard, the checksum of a
chunk at every read (of uncompressed chunks only at the first, as rows are then read from the map). At most 2
GiB of maps stay in memory, whatever the size of the store. From a server, neighbouring chunks come with one
request.
"""

import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from .codecs import CHECKSUM_BYTES, HEADER_BYTES, ChunkError, checksum
from .errors import StoreDamagedError
from .layout import ArraySpec
from .readable import WHOLE_BYTES, MappedFile, ReadableFiles, ShardFile
from .seal import SealedFile
from .threads import Renewed, SharedWork, stop

ABSENT = 2**64 - 1
# A map keeps its file open, and a process may often open only 1,024. For all readers together.
_MAPS_KEPT = min(4096, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
# Read pages of a map count as the process's memory until released. Reading them again costs a tenth of
# decoding, so small stores keep theirs.
_PAGES_KEPT_BYTES = 2**31
# From a server: half a megabyte, which may be needed later, takes as long as a request.
_RUN_BYTES = 2**22
_GAP_BYTES = 2**19
_CUT_SHORT = "the file was cut short while it was read"


Decode = Callable[[NDArray[Any]], None]
"""Decodes a chunk into an array of its shape, C-contiguous; bits."""


def index_bytes(spec: ArraySpec) -> int:
    """Size of the index at the end of every shard of ``spec``."""
    return 16 * spec.chunks_per_shard + CHECKSUM_BYTES


def parse_index(spec: ArraySpec, shard: int, data: bytes | memoryview, file_bytes: int) -> NDArray[np.uint64]:
    """Offset and size of the chunks that hold rows; uint64 [chunks, 2].

    Args:
        spec: the array.
        shard: index of the shard.
        data: the last ``index_bytes(spec)`` bytes of the file.
        file_bytes: size of the whole file.

    Raises:
        StoreDamagedError: the checksum is wrong, or the entries are not consecutive chunks that fill
            the file.
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
    if (present[:, 0] != ends - present[:, 1]).any() or int(ends[-1]) + len(raw) != file_bytes:
        raise damaged("its index names chunks that do not fill the file")
    return present


class _OpenShard(NamedTuple):
    file: ShardFile
    edges: NDArray[np.int64]  # where each chunk begins, and the last one ends; [chunks + 1]
    checked: NDArray[np.bool_]  # payload checked, for good; [chunks]
    touched: NDArray[np.bool_]  # read since pages were last released; [chunks]


class ShardReader(Renewed):
    """Chunks of one array, by number; thread-safe."""

    _all: ClassVar[weakref.WeakValueDictionary[int, Self]] = weakref.WeakValueDictionary()

    def __init__(
        self, files: ReadableFiles, spec: ArraySpec, sealed: Mapping[str, SealedFile] | None = None
    ) -> None:
        """Name the array; nothing is opened yet.

        Args:
            files: the store.
            spec: the array.
            sealed: entries of the seal, if there is one: no other file is opened.
        """
        self.files = files
        self.spec = spec
        self.sealed = sealed
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()
        self._opening = SharedWork[_OpenShard]()
        self._touched_bytes = 0
        self._scratch = threading.local()
        super().__init__()
        self._all[id(self)] = self

    def renew(self) -> None:
        """Make the lock."""
        self._lock = threading.Lock()

    @classmethod
    def cut_short(cls) -> list[StoreDamagedError]:
        """Messages about files that are shorter than their maps; lock-free, for a signal handler."""
        readers = [reader for ref in cls._all.valuerefs() if (reader := ref()) is not None]
        return [
            reader._damaged(shard, _CUT_SHORT)
            for reader in readers
            for shard, opened in list(reader._opened.items())
            if _is_cut_short(opened.file)
        ]

    def is_committed(self, shard: int) -> bool:
        """Whether the file of ``shard`` exists with a valid index."""
        try:
            self._index(shard, self.files.map(self.spec.shard_path(shard)))
        except (FileNotFoundError, StoreDamagedError):
            return False
        return True

    def _index(self, shard: int, file: ShardFile) -> NDArray[np.uint64]:
        size = len(file)
        place = [max(0, size - index_bytes(self.spec)), size]
        try:
            return parse_index(self.spec, shard, file.parts(place, [0])[0], size)
        except StoreDamagedError:  # on its way here, or in a cache
            return parse_index(self.spec, shard, file.parts(place, [0], anew=True)[0], size)

    def check_index(self, shard: int) -> None:
        """Open ``shard`` and check its index.

        Raises:
            StoreDamagedError: the file is missing or its index is invalid.
        """
        self._shard(shard)

    def check_sealed(self, shard: int, n_bytes: int | None = None) -> None:
        """Check that the seal, if there is one, names the file of ``shard`` with its size.

        Raises:
            StoreDamagedError: it does not.
        """
        path = self.spec.shard_path(shard)
        entry = self.sealed.get(path) if self.sealed is not None else None
        if self.sealed is not None and entry is None:
            raise self._damaged(shard, f"the seal does not name its file {path}")
        if entry is not None and n_bytes is not None and entry.n_bytes != n_bytes:
            raise self._damaged(shard, f"its file has {n_bytes:,} bytes, {entry.n_bytes:,} were sealed")

    def _shard(self, shard: int) -> _OpenShard:
        with self._lock:
            opened = self._opened.get(shard)
            if opened is not None:
                self._opened.move_to_end(shard)
                return opened
        opened = self._opening.do(shard, lambda: self._open(shard))
        self._close_some()
        return opened

    @classmethod
    def _close_some(cls) -> None:
        """Keep the open files of all readers within the limit of the process."""
        while True:
            readers = [reader for ref in cls._all.valuerefs() if (reader := ref()) is not None]
            if sum(len(reader._opened) for reader in readers) <= _MAPS_KEPT:
                return
            most = max(readers, key=lambda reader: len(reader._opened))
            with most._lock:
                if most._opened:
                    most._opened.popitem(last=False)

    def _open(self, shard: int) -> _OpenShard:
        opened = self._opened.get(shard)
        if opened is not None:  # by a thread that was just before
            return opened
        path = self.spec.shard_path(shard)
        self.check_sealed(shard)
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
        self.check_sealed(shard, len(file))
        chunks = self._index(shard, file).astype(np.int64)
        edges = np.append(chunks[:, 0], chunks[-1].sum())
        opened = _OpenShard(file, edges, *np.zeros((2, len(chunks)), np.bool_))
        with self._lock:
            self._opened[shard] = opened
        return opened

    def _damaged(self, shard: int, problem: str) -> StoreDamagedError:
        return StoreDamagedError(problem, array=self.spec.path, shard=shard)

    def _use(self, chunks: Sequence[int], use: Callable[[int, memoryview], None]) -> None:
        """Read chunks of one shard together, and call ``use`` with each one's number and checked payload.

        Raises:
            StoreDamagedError: the file is missing, cut short, or a chunk is not what was written.
        """
        shard, first = divmod(chunks[0], self.spec.chunks_per_shard)
        opened = self._shard(shard)
        if _is_cut_short(opened.file):
            raise self._damaged(shard, _CUT_SHORT)
        wanted = [chunk - chunks[0] for chunk in chunks]
        edges: list[int] = opened.edges[first : first + wanted[-1] + 2].tolist()
        for chunk, part in zip(chunks, opened.file.parts(edges, wanted), strict=True):
            within = first + chunk - chunks[0]
            try:
                use(chunk, self._payload(opened, within, part))
            except ChunkError as error:
                raise StoreDamagedError(str(error), array=self.spec.path, shard=shard, chunk=within) from None
            if not opened.touched[within]:
                opened.touched[within] = True
                self._let_go_of_pages(len(part))

    def _payload(self, shard: _OpenShard, within: int, data: memoryview) -> memoryview:
        """The bytes of a chunk before its checksum, after checking it."""
        codec, n_bytes = self.spec.codec, self.spec.chunk_bytes
        if shard.checked[within]:
            return data[:-CHECKSUM_BYTES]
        try:
            payload = codec.payload(data, n_bytes)
        except ChunkError:  # changed on its way here, or in a cache
            (data,) = shard.file.parts(shard.edges[within : within + 2].tolist(), [0], anew=True)
            payload = codec.payload(data, n_bytes)
        # Uncompressed rows may be read one by one; checking all of the chunk each time would cost more.
        shard.checked[within] = codec.compressor is None and isinstance(shard.file, MappedFile)
        return payload

    def _let_go_of_pages(self, n_bytes: int) -> None:
        """Count the pages of maps in memory, and release all when they are many."""
        with self._lock:
            self._touched_bytes += n_bytes
            if self._touched_bytes < _PAGES_KEPT_BYTES:
                return
            self._touched_bytes = 0
            for opened in self._opened.values():
                opened.touched[:] = False
                if isinstance(opened.file, MappedFile):
                    opened.file.let_go()

    def read_chunk(self, chunk: int, out: NDArray[Any]) -> None:
        """Decode a chunk into ``out``, C-contiguous bits of shape ``spec.chunk_shape``.

        Raises:
            StoreDamagedError: the chunk is missing or not what was written.
        """
        self._use([chunk], lambda _, payload: self.spec.codec.decode(payload, out))

    def will_need(self, chunks: Iterable[int]) -> None:
        """Ask the operating system to read these chunks ahead, without waiting."""
        for chunk in chunks:
            shard, within = divmod(chunk, self.spec.chunks_per_shard)
            opened = self._shard(shard)
            if isinstance(opened.file, MappedFile):
                opened.file.will_need(*opened.edges[within : within + 2].tolist())

    def start_reading(
        self, chunks: Collection[int], use: Callable[[int, Decode], None], pool: Executor
    ) -> list[Future[None]]:
        """Begin to read chunks in the threads of ``pool``.

        Args:
            chunks: their numbers.
            use: called with the number of a chunk and a function that decodes it, as ``read_chunk`` does,
                into an array.
            pool: threads to read and decode in.
        """
        if not self.files.has_latency:
            self.will_need(chunks)

        def decode(chunk: int, payload: memoryview) -> None:
            use(chunk, partial(self.spec.codec.decode, payload))

        return [pool.submit(self._use, run, decode) for run in self._runs(sorted(chunks))]

    def _runs(self, chunks: Sequence[int]) -> list[list[int]]:
        """Sorted chunks in groups to be read together; local ones each alone."""
        if not self.files.has_latency:
            return [[chunk] for chunk in chunks]
        runs: list[list[int]] = []
        longest, gap, end = 0, 0, -1
        for chunk in chunks:
            if chunk >= end:  # in another shard
                shard = chunk // self.spec.chunks_per_shard
                n_chunks = self.spec.chunks_in(shard)
                end = shard * self.spec.chunks_per_shard + n_chunks
                size = self.files.size_bytes(self.spec.shard_path(shard)) or 1
                longest = gap = n_chunks
                if size > WHOLE_BYTES:
                    longest, gap = n_chunks * _RUN_BYTES // size, max(1, n_chunks * _GAP_BYTES // size)
                runs.append([chunk])
            elif chunk - runs[-1][0] < longest and chunk - runs[-1][-1] <= gap:
                runs[-1].append(chunk)
            else:
                runs.append([chunk])
        return runs

    def read_rows(
        self, rows: NDArray[np.int64], pool: Executor | None = None, columns: NDArray[np.int64] | None = None
    ) -> NDArray[Any]:
        """The entries ``rows`` of axis 0, in that order; bits [rows, …].

        Args:
            rows: indices from 0.
            pool: threads to decode in; by default this one.
            columns: indices into axis 1, by default all; whole chunks are decoded, but one at a time.

        Raises:
            StoreDamagedError: a chunk is missing or not what was written.
        """
        spec = self.spec
        width = spec.shape[1:2] if columns is None else (len(columns),)
        out = np.empty((len(rows), *width, *spec.shape[2:]), spec.dtype)
        chunk_of = rows // spec.chunk_rows
        order = np.argsort(chunk_of, kind="stable")
        starts = np.flatnonzero(np.diff(chunk_of[order], prepend=-1))
        groups = np.split(order, starts[1:]) if len(rows) else []
        places_of = {int(chunk_of[places[0]]): places for places in groups}

        def read(chunk: int, payload: memoryview) -> None:
            places = places_of[chunk]
            first, within = int(places[0]), rows[places] % spec.chunk_rows
            whole = (
                columns is None
                and len(places) == spec.chunk_rows
                and bool((within == np.arange(spec.chunk_rows)).all() and (np.diff(places) == 1).all())
            )
            if whole:
                spec.codec.decode(payload, out[first : first + spec.chunk_rows])
            else:
                part = within if columns is None else (within[:, np.newaxis], columns)
                out[places] = self._decoded(payload)[part]

        runs = self._runs([*places_of])
        if pool is None:
            for run in runs:
                self._use(run, read)
            return out
        running = [pool.submit(self._use, run, read) for run in runs]
        try:
            for future in running:
                future.result()
        finally:
            stop(running)
        return out

    def _decoded(self, payload: memoryview) -> NDArray[Any]:
        """A decoded chunk to copy a part from, before this thread decodes the next one."""
        shape, dtype = self.spec.chunk_shape, self.spec.dtype
        if self.spec.codec.compressor is None:
            return np.frombuffer(payload, dtype).reshape(shape)
        if not hasattr(self._scratch, "chunk"):
            self._scratch.chunk = np.empty(shape, dtype)
        scratch: NDArray[Any] = self._scratch.chunk
        self.spec.codec.decode(payload, scratch)
        return scratch


def _is_cut_short(file: ShardFile) -> bool:
    # Reading a map past the end of a truncated file would kill the process.
    return isinstance(file, MappedFile) and file.is_cut_short
