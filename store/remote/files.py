"""The files of a sealed store on a server, as readers ask for them.

What the seal says is known before anything is asked for: which files there are, and how long. Files up to
2 MiB are fetched whole, others part by part: the index, then chunks, neighbours with one request. Whoever
reads many chunks hides the latency by reading in many threads. Every part is kept in a cache under the
store's identity. Metadata is checked against the seal, chunks by their own checksums; what does not hold is
fetched once more.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from ..errors import StoreDamagedError, StoreIncompleteError, StoreNotFoundError
from ..readable import WHOLE_BYTES
from ..seal import (
    CARD_PATH,
    MAX_METADATA_BYTES,
    MAX_SEAL_BYTES,
    ROOT_PATH,
    SEAL_PATH,
    Seal,
    SealedFile,
    parse_seal,
)
from ..threads import SharedWork
from .cache import PartCache
from .folder import RemoteFolder

READING_THREADS = 48
"""Requests that are under way at once: at 50 ms to each, 960 of them a second. More cost CPU time."""


class RemoteFiles:
    """The files of one store.

    Attributes:
        folder: the server's.
        cache: where parts are kept.
    """

    has_latency = True

    def __init__(self, folder: RemoteFolder, cache: PartCache) -> None:
        """Fetch the seal and the root's metadata, at once.

        Raises:
            StoreNotFoundError: there is no store.
            StoreIncompleteError: a store that is not sealed.
            StoreRemoteError: the server refused, or does not answer.
        """
        self.folder, self.cache = folder, cache
        self._fetching = SharedWork[bytes]()
        with ThreadPoolExecutor(2, thread_name_prefix="posae-fetch") as pool:
            seal, root = (
                pool.submit(folder.read_small, path, limit_bytes)
                for path, limit_bytes in ((SEAL_PATH, MAX_SEAL_BYTES), (ROOT_PATH, MAX_METADATA_BYTES))
            )
        try:
            self._first = {SEAL_PATH: seal.result()}
        except FileNotFoundError:
            if isinstance(root.exception(), FileNotFoundError):
                raise StoreNotFoundError(
                    f"there is no store at {folder.url}; check the address: a store's folder holds seal.json"
                ) from None
            raise StoreIncompleteError(
                f"{folder.url} is an unfinished store, which may change while it is read; finish the "
                "harvest, and publish it again: posae copy"
            ) from None
        try:
            self._first[ROOT_PATH] = root.result()
        except FileNotFoundError:
            raise StoreDamagedError("the file is missing on the server", array=ROOT_PATH) from None

    @cached_property
    def seal(self) -> Seal:
        """As it was when the store was opened.

        Raises:
            StoreFormatError: something else is there.
        """
        return parse_seal(self._first[SEAL_PATH])

    @property
    def root(self) -> str:
        """The URL, as it may be shown."""
        return self.folder.url

    def _size(self, path: str) -> int:
        entry = self.seal.files.get(path)
        if entry is None:
            raise FileNotFoundError(path)
        return entry.n_bytes

    def read(self, path: str, limit_bytes: int) -> bytes:
        """The bytes of a small file, those that were sealed; of the card, which is not, those that are there.

        Raises:
            FileNotFoundError: the seal does not name it.
            StoreDamagedError: longer than ``limit_bytes``, missing, or not what was sealed.
            StoreRemoteError: the server refused, or does not answer.
        """
        if path in self._first:
            return self._first[path]
        if path == CARD_PATH:
            return self.folder.read_small(path, limit_bytes)
        size = self._size(path)
        if size > limit_bytes:
            raise StoreDamagedError(f"larger than the {limit_bytes:,} bytes allowed here", array=path)
        data = self.part(path, 0, size)
        if SealedFile(size, hashlib.sha256(data).hexdigest()) != self.seal.files[path]:
            data = self.part(path, 0, size, anew=True)  # who asked checks it
        return data

    def pieces(self, path: str, start: int = 0) -> Iterator[bytes]:
        """The bytes of a file from ``start`` on, fetched anew; see ``ReadableFiles``."""
        size = self._size(path)
        return iter([self.folder.read(path, start, size, size)]) if start else self.folder.pieces(path, size)

    def map(self, path: str) -> "RemoteFile":
        """A file to decode chunks out of; nothing is fetched yet. See ``ReadableFiles``."""
        return RemoteFile(self, path, self._size(path))

    def size_bytes(self, path: str) -> int | None:
        """The size that was sealed; of other files none is known."""
        entry = self.seal.files.get(path)
        return entry.n_bytes if entry else None

    def exists(self, path: str) -> bool:
        """Whether the seal names ``path``."""
        return path == SEAL_PATH or path in self.seal.files

    def is_there(self) -> bool:
        """Whether the store is still there."""
        return self.folder.size_bytes(SEAL_PATH) is not None

    def walk(self) -> Iterator[str]:
        """Every file that the server lists; where it lists none, those that the seal names."""
        listed = self.folder.list_files()
        return iter([*self.seal.files, SEAL_PATH] if listed is None else listed)

    def _name(self, path: str, start: int, stop: int) -> str:
        return f"{self.seal.identity[:32]}/{path}.{start}-{stop}"

    def _kept(self, path: str, start: int, stop: int) -> bytes | None:
        data = self.cache.get(self._name(path, start, stop))
        return data if data is not None and len(data) == stop - start else None

    def _fetched(self, path: str, start: int, stop: int) -> bytes:
        try:
            return self.folder.read(path, start, stop, self._size(path))
        except FileNotFoundError:
            raise StoreDamagedError("the file is missing on the server", array=path) from None

    def part(self, path: str, start: int, stop: int, *, anew: bool = False) -> bytes:
        """Bytes [start, stop) of a file, from the cache or the server; threads that want the same ask once.

        Raises:
            StoreDamagedError: the file is missing, or has another size than was sealed.
            StoreRemoteError: the server refused, or does not answer.
        """

        def work() -> bytes:
            data = None if anew else self._kept(path, start, stop)
            if data is None:
                data = self._fetched(path, start, stop)
                self.cache.put(self._name(path, start, stop), data)
            return data

        return self._fetching.do((path, start, stop, anew), work) if start < stop else b""

    def parts(
        self, path: str, edges: Sequence[int], wanted: Sequence[int], *, anew: bool
    ) -> Sequence[memoryview]:
        """See ``ShardFile.parts``: from the cache, or with one request, of which every part is kept."""
        if len(wanted) == 1:
            start, stop = edges[wanted[0]], edges[wanted[0] + 1]
            return [memoryview(self.part(path, start, stop, anew=anew))]
        found = {part: None if anew else self._kept(path, edges[part], edges[part + 1]) for part in wanted}
        missing = [part for part, data in found.items() if data is None]
        if missing:
            start = edges[missing[0]]
            data = self._fetched(path, start, edges[missing[-1] + 1])
            for part in range(missing[0], missing[-1] + 1):
                if found.get(part) is None:
                    found[part] = data[edges[part] - start : edges[part + 1] - start]
                    self.cache.put(self._name(path, edges[part], edges[part + 1]), found[part] or b"")
        return [memoryview(found[part] or b"") for part in wanted]


class RemoteFile:
    """A shard on a server."""

    def __init__(self, files: RemoteFiles, path: str, n_bytes: int) -> None:
        """Name the file at ``path``."""
        self._files, self._path, self._n_bytes = files, path, n_bytes
        self._held: memoryview | None = None  # a small file, from when its index is read to its first chunk

    def __len__(self) -> int:
        """Bytes that were sealed."""
        return self._n_bytes

    def parts(
        self, edges: Sequence[int], wanted: Sequence[int], *, anew: bool = False
    ) -> Sequence[memoryview]:
        """The parts, fetched if need be."""
        if self._n_bytes > WHOLE_BYTES:
            return self._files.parts(self._path, edges, wanted, anew=anew)
        whole, self._held = self._held, None
        if whole is None or anew:
            whole = memoryview(self._files.part(self._path, 0, self._n_bytes, anew=anew))
        if edges[-1] == self._n_bytes:
            self._held = whole
        return [whole[edges[part] : edges[part + 1]] for part in wanted]
