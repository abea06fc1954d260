"""The files of a sealed store on a server, as readers ask for them.

What the seal says is known before anything is asked for: which files there are, and how long. Files up to
2 MiB are fetched whole, others part by part: the index, then one chunk at a time. Whoever reads many chunks
hides the latency by reading in many threads. Every part is kept in a cache under the store's identity.
Metadata is checked against the seal, chunks by their own checksums; what does not hold is fetched once more.
"""

import hashlib
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StoreDamagedError, StoreIncompleteError, StoreNotFoundError
from ..files import StoreFiles
from ..seal import CARD_PATH, MAX_SEAL_BYTES, ROOT_PATH, SEAL_PATH, SealedFile, parse_seal
from .cache import PartCache
from .folder import RemoteFolder

READING_THREADS = 32
"""Parts that are asked for at once: at 50 ms to a request, 640 of them a second."""

_WHOLE_BYTES = 2**21


class RemoteFiles:
    """The files of one store.

    Attributes:
        folder: the server's.
        seal: as it was when the store was opened.
    """

    def __init__(self, folder: RemoteFolder, cache: PartCache) -> None:
        """Fetch the seal.

        Raises:
            StoreNotFoundError: there is no store.
            StoreIncompleteError: a store that is not sealed.
            StoreFormatError: something else is there.
            StoreRemoteError: the server refused, or does not answer.
        """
        self.folder = folder
        self._cache = cache
        try:
            self._seal_bytes = folder.read_small(SEAL_PATH, MAX_SEAL_BYTES)
        except FileNotFoundError:
            if folder.size_bytes(ROOT_PATH) is None:
                raise StoreNotFoundError(
                    f"there is no store at {folder.url}; check the address: a store's folder holds seal.json"
                ) from None
            raise StoreIncompleteError(
                f"{folder.url} is an unfinished store, which may change while it is read; finish the "
                "harvest, and publish it again: posae copy"
            ) from None
        self.seal = parse_seal(self._seal_bytes)
        self._name = self.seal.identity[:32]

    @property
    def root(self) -> str:
        """The URL, as it may be shown."""
        return self.folder.url

    def _entry(self, path: str) -> SealedFile:
        entry = self.seal.files.get(path)
        if entry is None:
            raise FileNotFoundError(path)
        return entry

    def read(self, path: str, limit_bytes: int) -> bytes:
        """The bytes of a small file, those that were sealed; of the card, which is not, those that are there.

        Raises:
            FileNotFoundError: the seal does not name it.
            StoreDamagedError: longer than ``limit_bytes``, missing, or not what was sealed.
            StoreRemoteError: the server refused, or does not answer.
        """
        if path == SEAL_PATH:
            return self._seal_bytes
        if path == CARD_PATH:
            return self.folder.read_small(path, limit_bytes)
        entry = self._entry(path)
        if entry.n_bytes > limit_bytes:
            raise StoreDamagedError(f"larger than the {limit_bytes:,} bytes allowed here", array=path)
        data = self.part(path, 0, entry.n_bytes)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            self.forget(path, 0, entry.n_bytes)
            data = self.part(path, 0, entry.n_bytes)  # who asked checks it
        return data

    def pieces(self, path: str) -> Iterator[bytes]:
        """The bytes of a file of any size, fetched anew.

        Raises:
            FileNotFoundError: the seal does not name it, or the server lacks it.
            StoreDamagedError: of another size than was sealed.
            StoreRemoteError: the server refused, or does not answer.
        """
        return self.folder.pieces(path, self._entry(path).n_bytes)

    def map(self, path: str) -> "RemoteFile":
        """A file to decode chunks out of; nothing is fetched yet.

        Raises:
            FileNotFoundError: the seal does not name it.
        """
        return RemoteFile(self, path, self._entry(path).n_bytes)

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

    def link(self, path: str, folder: int, name: str) -> bool:
        """Nothing: a file on a server has no name here."""
        return False

    @contextmanager
    def local(self, path: str) -> Generator[StoreFiles]:
        """A temporary folder with the whole of one file, fetched anew."""
        with tempfile.TemporaryDirectory(prefix="posae-") as folder:
            files = StoreFiles(Path(folder))
            files.write_pieces(path, self.pieces(path))
            yield files

    def _part_name(self, path: str, start: int, stop: int) -> str:
        return f"{self._name}/{path}/{start}-{stop}"

    def part(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, from the cache or the server.

        Raises:
            StoreDamagedError: the file is missing, or has another size than was sealed.
            StoreRemoteError: the server refused, or does not answer.
        """
        size = self._entry(path).n_bytes
        if start == stop:
            return b""
        if size <= _WHOLE_BYTES and (start, stop) != (0, size):
            return self.part(path, 0, size)[start:stop]
        name = self._part_name(path, start, stop)
        data = self._cache.get(name)
        if data is None or len(data) != stop - start:
            try:
                data = self.folder.read(path, start, stop, size)
            except FileNotFoundError:
                raise StoreDamagedError("the file is missing on the server", array=path) from None
            self._cache.put(name, data)
        return data

    def forget(self, path: str, start: int, stop: int) -> None:
        """Fetch a part anew the next time."""
        size = self._entry(path).n_bytes
        if size <= _WHOLE_BYTES:
            start, stop = 0, size
        self._cache.forget(self._part_name(path, start, stop))


class RemoteFile:
    """A shard on a server."""

    is_cut_short = False  # a part is all there, or an error
    stays = False

    def __init__(self, files: RemoteFiles, path: str, n_bytes: int) -> None:
        """Speak of the file at ``path``."""
        self._files, self._path, self._n_bytes = files, path, n_bytes

    def __len__(self) -> int:
        """Bytes that were sealed."""
        return self._n_bytes

    def part(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop), fetched if need be."""
        return memoryview(self._files.part(self._path, start, stop))

    def will_need(self, start: int, stop: int) -> None:
        """Nothing: whoever wants many parts asks for them in many threads."""

    def let_go(self) -> None:
        """Nothing is held."""

    def forget(self, start: int, stop: int) -> bool:
        """Fetch a part anew: the cache's file, or the way here, may have changed it."""
        self._files.forget(self._path, start, stop)
        return True
