"""Reading a store back, byte by byte, to find damage.

Every file that the seal names must have its sealed size and SHA-256; every chunk must have a correct checksum
and decode; positions must be 0, 1, 2, … and token ids within the vocabulary. In an unfinished store each
shard under its final name is checked the same way, with its statistics, against the digests taken while
writing: the name is the commit record, so an incomplete shard is damage, though for readers the store just
ends before it. Files are looked for in reverse order of writing, as another process may be writing. Costs one
pass over the disk and about 1 core-second per GB. It stops after many findings, so a hostile store cannot
keep it busy.
"""

import errno
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import NamedTuple, TypeVar

import numpy as np

from .codecs import ChunkError
from .errors import StoreDamagedError, StoreError, StoreFormatError, StoreRemoteError
from .files import LOCK_PATH, is_leftover
from .layout import ArraySpec
from .manifest import layer_path, layer_spec, token_specs
from .readable import WHOLE_BYTES, ReadableFiles
from .reader import ActivationStore
from .seal import CARD_PATH, CORPUS_PATH, ROOT_PATH, SEAL_PATH, SealedFile, sha256_of
from .shards import ShardReader, index_bytes, parse_index
from .stats import stats_specs

MOST_DAMAGED = 1000
"""Maximum number of damaged parts to report; reading back stops after that."""

_MOST_CHUNKS = 100  # bad chunks of one shard, before the rest of it is left unread


Task = TypeVar("Task")
Result = TypeVar("Result")


class Damage(NamedTuple):
    """One damaged part."""

    array: str
    """Name of the array; for metadata the path of the file."""

    shard: int | None
    chunk: int | None
    """Index of the chunk within its shard; None where it is the whole file."""

    problem: str


class Verification(NamedTuple):
    """The result of reading everything back."""

    damaged: list[Damage]
    foreign: list[str]
    """Files that are not part of the store, e.g. leftovers of a kill; harmless."""

    n_bytes: int
    """Bytes read."""


def verify(
    store: ActivationStore, progress: Callable[[int], None] | None = None, threads: int = 2
) -> Verification:
    """Read the whole store back.

    Args:
        store: the store, from ``ActivationStore(root)``, which opens damaged ones too.
        progress: called with the bytes read since the last call.
        threads: files read at once.
    """
    expected: Mapping[str, SealedFile] = store.seal.files if store.seal else {}
    shards = list(_shards(store))
    covered = {reader.spec.shard_path(shard) for reader, shard, _ in shards}
    plain = sorted({*expected, *_plain_files(store)} - covered)

    damaged = list(_misread_metadata(store))
    n_bytes = 0
    with ThreadPoolExecutor(threads) as pool:
        for found, size in chain(
            _few_ahead(pool, lambda path: _check_file(store, path), plain, 8 * threads),
            _few_ahead(pool, lambda shard: _check_shard(store, *shard), shards, 8 * threads),
        ):
            damaged += found
            n_bytes += size
            if progress:
                progress(size)
            if len(damaged) >= MOST_DAMAGED:
                damaged.append(Damage(ROOT_PATH, None, None, "too much damage; the rest was not read"))
                break
    known = {*plain, *covered, *expected, SEAL_PATH, CARD_PATH}
    foreign = [path for path in store.files.walk() if path not in known and not _may_be_ours(store, path)]
    return Verification(damaged, foreign, n_bytes)


def _few_ahead(
    pool: Executor, check: Callable[[Task], Result], tasks: Iterable[Task], ahead: int
) -> Iterator[Result]:
    """As ``pool.map``, but with at most ``ahead`` pending results, and lazily."""
    waiting: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(check, task))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _may_be_ours(store: ActivationStore, path: str) -> bool:
    # A harvest in progress: files past the committed part are neither damage nor foreign.
    return path == LOCK_PATH or (not store.is_sealed and not is_leftover(path))


def _plain_files(store: ActivationStore) -> Iterator[str]:
    """Metadata that must exist."""
    yield ROOT_PATH
    if store.is_sealed or store.layers or store.files.exists(CORPUS_PATH):
        yield CORPUS_PATH
    for layer in store.layers:
        yield f"stats/{layer_path(layer)}/zarr.json"
    for path, _ in _arrays(store):
        yield f"{path}/zarr.json"


def _misread_metadata(store: ActivationStore) -> Iterator[Damage]:
    """Metadata that has the sealed bytes but is not in our form, which digests do not show."""
    checks: list[tuple[str, Callable[[], object]]] = [(CORPUS_PATH, lambda: store.corpus)]
    checks += [(f"{path}/zarr.json", partial(store.spec, path)) for path, _ in _arrays(store)]
    for path, check in checks:
        try:
            check()
        except StoreFormatError as error:
            yield Damage(path, None, None, str(error))
        except StoreDamagedError:
            pass  # reported by ``_check_file``


def _arrays(store: ActivationStore) -> Iterator[tuple[str, Sequence[int]]]:
    """Each array, and the shards of it that must be complete."""
    if not store.is_sealed and not store.files.exists(CORPUS_PATH):
        return
    for name, spec in token_specs(store.manifest).items():
        yield name, range(spec.n_shards)
    for layer in store.layers:
        committed = store.committed_shards(layer)
        spec = layer_spec(store.manifest, layer)
        shards = [i for i in range(spec.n_shards) if i < committed or store.files.exists(spec.shard_path(i))]
        for spec in stats_specs(store.manifest, layer).values():
            yield spec.path, shards
        yield layer_path(layer), shards


def _shards(store: ActivationStore) -> Iterator[tuple[ShardReader, int, str | None]]:
    """Every shard, with the SHA-256 in hex of its file, if known."""
    for path, shards in _arrays(store):
        try:
            reader = store.array(path)
        except (StoreDamagedError, StoreFormatError):
            continue  # its zarr.json is reported separately
        for shard in shards:
            yield reader, shard, _sha256(store, reader, shard)


def _sha256(store: ActivationStore, reader: ShardReader, shard: int) -> str | None:
    if store.seal:
        sealed = store.seal.files.get(reader.spec.shard_path(shard))
        return sealed.sha256 if sealed else None
    if reader.spec.path.startswith("layer_"):
        try:
            digests = store.array(f"stats/{reader.spec.path}/sha256")
            return digests.read_rows(np.array([shard]))[0].tobytes().hex()
        except StoreError:
            return None
    return None


def _check_file(store: ActivationStore, path: str) -> tuple[list[Damage], int]:
    entry = store.seal.files.get(path) if store.seal else None
    n_bytes, problem = 0, ""
    try:
        n_bytes = store.files.size_bytes(path)
        if n_bytes is None:
            problem = "the file is missing"
        elif store.seal and entry is None:
            problem = "the seal does not name it"
        # Sizes first: a file grown to terabytes is not read to the end.
        elif entry and (entry.n_bytes != n_bytes or entry != sha256_of(store.files, path)):
            problem = "its bytes are not those that were sealed"
    except OSError as error:
        problem = _unreadable(error)
    except StoreDamagedError as error:
        problem = error.problem
    return [Damage(path, None, None, problem)] if problem else [], n_bytes or 0


def _unreadable(error: OSError) -> str:
    """The problem of a file from an error, unless it is the limit of open files, or the server."""
    if error.errno in (errno.EMFILE, errno.ENFILE) or isinstance(error, StoreRemoteError):
        raise error
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    return f"it cannot be read ({error.strerror})"


def _check_shard(
    store: ActivationStore, reader: ShardReader, shard: int, sha256: str | None
) -> tuple[list[Damage], int]:
    spec = reader.spec
    try:
        found = _Stream(store.files, spec.shard_path(shard))
        reader.check_sealed(shard, found.n_bytes)
        places = parse_index(spec, shard, found.end(index_bytes(spec)), found.n_bytes)
        # Chunks first: a sparse file of terabytes has a bad one at its start.
        bad = islice(_bad_chunks(store, spec, shard, map(found.take, places[:, 1].tolist())), _MOST_CHUNKS)
        damaged = [Damage(spec.path, shard, chunk, problem) for chunk, problem in bad]
        if len(damaged) == _MOST_CHUNKS:
            return damaged, 0
        found.take(index_bytes(spec))
    except StoreDamagedError as error:
        return [Damage(spec.path, shard, error.chunk, error.problem)], 0
    except OSError as error:
        return [Damage(spec.path, shard, None, _unreadable(error))], 0
    if not damaged and sha256 is not None and found.digest.hexdigest() != sha256:
        damaged = [Damage(spec.path, shard, None, "its bytes are not those that were written")]
    return damaged, found.n_bytes


class _Stream:
    """A file read once from its start and hashed; the end of a long one is read first."""

    def __init__(self, files: ReadableFiles, path: str) -> None:
        self._files, self._path = files, path
        size = files.size_bytes(path)
        if size is None:
            raise FileNotFoundError(path)
        self.n_bytes = size
        self.digest = hashlib.sha256()
        self._pieces = files.pieces(path)
        self._data = bytearray()

    def end(self, n_bytes: int) -> bytes:
        """The last bytes."""
        if self.n_bytes > WHOLE_BYTES:
            return b"".join(self._files.pieces(self._path, max(0, self.n_bytes - n_bytes)))
        self._read(self.n_bytes)
        return bytes(self._data[-n_bytes:])

    def take(self, n_bytes: int) -> memoryview:
        """The next bytes; fewer where the file ends."""
        self._read(n_bytes)
        taken = memoryview(bytes(self._data[:n_bytes]))
        del self._data[:n_bytes]
        return taken

    def _read(self, n_bytes: int) -> None:
        while len(self._data) < n_bytes and (piece := next(self._pieces, b"")):
            self.digest.update(piece)
            self._data += piece


def _bad_chunks(
    store: ActivationStore, spec: ArraySpec, shard: int, chunks: Iterable[memoryview]
) -> Iterator[tuple[int, str]]:
    out = np.empty(spec.chunk_shape, spec.dtype)
    for within, data in enumerate(chunks):
        try:
            spec.codec.decode(spec.codec.payload(data, spec.chunk_bytes), out)
        except ChunkError as error:
            yield within, str(error)
            continue
        chunk = shard * spec.chunks_per_shard + within
        rows = out[: spec.shape[0] - chunk * spec.chunk_rows]
        if spec.path == "tokens" and not ((rows >= 0) & (rows < store.manifest.vocabulary_size)).all():
            yield within, "token ids outside the vocabulary"
        if spec.data_type == "bfloat16" and ((rows & np.uint16(0x7F80)) == 0x7F80).any():
            yield within, "activations that are not finite"
        if spec.path.startswith("stats/") and (problem := store.impossible(spec, rows)):
            yield within, problem
        if spec.path == "position" and (rows != np.arange(len(rows))).any():
            yield within, "positions are not 0, 1, 2, …"
