"""Making a store from pieces of sealed ones, for merging and for copying a part.

A shard that equals a whole shard of another store, in the same codec, becomes a hard link to that file, or a
copy if the file system has no hard links. Every other shard is decoded and encoded. Both give the same bytes.

Like a harvest, it resumes after a kill, and several processes may share it. Linking writes ten small files
per shard, whatever its size; encoding costs as much as in a harvest. Memory: all tokens, and a few batches.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...store.codecs import CHECKSUM_BYTES, CODECS, HEADER_BYTES
from ...store.errors import SettingsError, StoreDamagedError, StoreIncompleteError
from ...store.layout import MAX_SHARDS, ArraySpec, Json
from ...store.manifest import Manifest, Origin, layer_path, layer_spec, token_specs
from ...store.reader import ActivationStore
from ...store.seal import check_sealed_bytes
from ...store.shards import ShardReader, index_bytes
from ...store.stats import ordinary_tokens, stats_specs
from ...store.writer import ShardOfLayers, StoreWriter
from ..harvest.corpus import corpus_counts
from ..progress import Progress, Silent

VERSIONS_OF_BYTES = ("posae", "numpy", "numcodecs")
"""Libraries that encode and compute statistics, but do not change activations."""

_BATCH_CHUNKS = 4
_ENCODING_THREADS = 4


class Piece(NamedTuple):
    """Contexts [start, stop) of a store."""

    store: ActivationStore
    start: int
    stop: int

    @property
    def n_training(self) -> int:
        """Number of them in the store's training part."""
        return max(0, min(self.stop, self.store.manifest.held_out[0]) - self.start)


def assembled_manifest(pieces: Sequence[Piece], codec: str | None = None) -> Manifest:
    """The manifest of a store made of ``pieces``; unchanged keys come from the first piece's store.

    Args:
        pieces: in their order along axis 0, of the training parts first, then of those held out.
        codec: of the layers; by default that of the first one's store.

    Raises:
        StoreIncompleteError: a store is not sealed.
        SettingsError: all contexts are held out.
        ValueError: a context that is held out before one that is not.
    """
    for store in {id(piece.store): piece.store for piece in pieces}.values():
        if store.identity is None:
            raise StoreIncompleteError(f"{store.root} is an unfinished harvest; finish it first")
    sources = [piece.store.manifest for piece in pieces]
    n_contexts = sum(piece.stop - piece.start for piece in pieces)
    n_training = sum(piece.n_training for piece in pieces)
    if not n_training:
        raise SettingsError(
            f"all {n_contexts} contexts are held out, but a store needs some to train on; "
            f"include some before {sources[0].held_out[0]}"
        )
    _check_order(pieces, n_training)
    corpus = union(interval for source in sources for interval in source.corpus_contexts)
    shard_contexts = max(source.shard_contexts for source in sources)
    while -(-n_contexts // shard_contexts) > MAX_SHARDS:
        shard_contexts *= 2
    changed = {
        "n_contexts": n_contexts,
        "skip_contexts": corpus[0].start,
        "held_out": (n_training, n_contexts),
        "codec": codec or sources[0].codec,
        "byte_counts": all(source.byte_counts for source in sources),
        "origin": Origin(
            stores=tuple(str(piece.store.identity) for piece in pieces),
            contexts=tuple(f"{piece.start}:{piece.stop}" for piece in pieces),
            corpus=tuple(f"{interval.start}:{interval.stop}" for interval in corpus),
        ),
        "shard_contexts": shard_contexts,
        "versions": {**sources[0].versions, **{name: version(name) for name in VERSIONS_OF_BYTES}},
    }
    return Manifest.model_validate(sources[0].model_dump() | changed)


def _check_order(pieces: Sequence[Piece], n_training: int) -> None:
    first = 0
    for piece in pieces:
        if piece.n_training and first + piece.n_training > n_training:
            raise ValueError("pieces of the training parts come first")
        first += piece.stop - piece.start


def but(versions: Mapping[str, str], left_out: Collection[str]) -> dict[str, str]:
    """Versions of all libraries except some."""
    return {name: version for name, version in versions.items() if name not in left_out}


def union(intervals: Iterable[range]) -> list[range]:
    """The fewest intervals that cover the same numbers, sorted.

    >>> union([range(4, 6), range(0, 2), range(2, 3)])
    [range(0, 3), range(4, 6)]
    """
    found: list[range] = []
    for interval in sorted(intervals, key=lambda interval: interval.start):
        if found and interval.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, interval.stop))
        else:
            found.append(interval)
    return found


class Assembly:
    """A store to be made of pieces, by ``begin``, ``fill``, ``finish``; repeat them after a kill."""

    def __init__(self, root: Path, pieces: Sequence[Piece], manifest: Manifest) -> None:
        """Plan a store in ``root``; nothing is read or written yet.

        Args:
            root: folder of the new store.
            pieces: the pieces; their stores agree in everything that activations depend on.
            manifest: of the new store, from ``assembled_manifest``.
        """
        self.root = root
        self.pieces = pieces
        self.manifest = manifest
        self._starts = np.cumsum([0, *(piece.stop - piece.start for piece in pieces)]).tolist()

    def begin(self, layers: Sequence[int]) -> int:
        """Commit the tokens, begin ``layers``, and return the number of contexts left to write.

        Raises:
            StoreIncompleteError: a store lacks one of the layers.
            StoreDamagedError: a store is not what was sealed.
            StoreMismatchError: something else was begun in this folder.
            StoreWriteError: the disk refused.
        """
        for store in {id(piece.store): piece.store for piece in self.pieces}.values():
            for layer in set(layers) - set(store.layers):
                store.check_layer(layer)
        self._writer = StoreWriter.begin(self.root, self.manifest, layers)
        with self._writer.lock():
            if not self._writer.has_tokens:
                self._write_tokens()
            self._layers = self._writer.begin_layers(layers, self._versions(layers))
        self._wanted = tuple(layers)
        self._missing = self._writer.missing_shards(self._layers)
        return sum(len(self.manifest.contexts_of(shard)) for shard in self._missing)

    def _versions(self, layers: Sequence[int]) -> dict[int, dict[str, str]]:
        """By layer, the versions that computed it where they differ from the first store's manifest."""
        first = self.pieces[0].store
        return {layer: but(first.layer_versions(layer), VERSIONS_OF_BYTES) for layer in layers}

    def fill(self, advance: Callable[[int], None]) -> None:
        """Commit every shard that is missing.

        Args:
            advance: called with the number of contexts written since the last call.

        Raises:
            StoreDamagedError: a store is not what was sealed.
            StoreWriteError: the disk refused.
        """
        with ThreadPoolExecutor(_ENCODING_THREADS, thread_name_prefix="posae-encode") as pool:
            for shard in self._writer.lock_each(self._layers, self._missing):
                with shard:
                    if not self._adopt(shard, advance):
                        self._append(shard, pool, advance)
                    shard.commit()

    def finish(self) -> ActivationStore:
        """Seal the store, and open it.

        Raises:
            StoreDamagedError: a file that was committed is missing or not what was written.
            StoreWriteError: the disk refused.
        """
        with self._writer.lock():
            self._writer.finish(self._wanted)
        return ActivationStore.open(self.root)

    def _write_tokens(self) -> None:
        tokens: list[NDArray[np.int32]] = []
        documents: list[NDArray[np.int64]] = []
        for piece in self.pieces:
            with _named(piece.store):
                tokens.append(piece.store.tokens(slice(piece.start, piece.stop)))
                documents.append(piece.store.documents(slice(piece.start, piece.stop)))
        all_tokens = np.concatenate(tokens)
        self._writer.write_tokens(
            all_tokens, np.concatenate(documents), self._counts(all_tokens), self._existing
        )

    def _counts(self, tokens: NDArray[np.int32]) -> Json:
        corpora = [piece.store.corpus for piece in self.pieces]
        if not all(corpora):
            return {}
        # Counts begin at the start of the corpus, so the store that read furthest includes the others.
        return corpus_counts(
            tokens,
            self.manifest.special_token_ids,
            n_documents=max(corpus["documents"] for corpus in corpora),
            n_left_out=max(corpus["documents_left_out"] for corpus in corpora),
        )

    def _existing(self, array: str, shard: int) -> bytes | None:
        """The file of a shard of tokens or documents, if a store has it."""
        if array == "position":
            return None
        found = self._whole_shard(self.manifest.contexts_of(shard))
        if found is None:
            return None
        store, number = found
        with _named(store):
            return _sealed_file(store, token_specs(store.manifest)[array], number)

    def _parts(self, contexts: range) -> list[Piece]:
        """The parts of pieces that make up some contexts of the new store."""
        found: list[Piece] = []
        for piece, first in zip(self.pieces, self._starts[:-1], strict=True):
            start = piece.start + max(0, contexts.start - first)
            stop = min(piece.stop, piece.start + contexts.stop - first)
            if start < stop:
                found.append(Piece(piece.store, start, stop))
        return found

    def _whole_shard(self, contexts: range) -> tuple[ActivationStore, int] | None:
        """The store and shard that equal a shard of the new store; else None."""
        (store, start, stop), *others = self._parts(contexts)
        shard, rest = divmod(start, self.manifest.shard_contexts)
        is_whole = not others and not rest and store.manifest.shard_contexts == self.manifest.shard_contexts
        return (store, shard) if is_whole and stop == store.manifest.contexts_of(shard).stop else None

    def _adopt(self, shard: ShardOfLayers, advance: Callable[[int], None]) -> bool:
        """Link or copy a whole shard of another store, if this shard equals one.

        Held-out contexts are the same in both, so the statistics are too.
        """
        found = self._whole_shard(shard.contexts)
        if found is None or found[0].manifest.codec != self.manifest.codec:
            return False
        store, number = found
        for layer in shard.layers:
            specs = stats_specs(store.manifest, layer)
            wanted = stats_specs(self.manifest, layer)
            with _named(store):
                statistics = {name: _sealed_file(store, specs[name], number) for name in wanted}
                _check_digest(store, layer, number)
                shard.adopt(layer, _reader(store, layer_path(layer)), number, statistics)
        advance(len(shard.contexts))
        return True

    def _append(self, shard: ShardOfLayers, pool: ThreadPoolExecutor, advance: Callable[[int], None]) -> None:
        """Fill a shard with re-encoded chunks."""
        tokens = ShardReader(self._writer.files, token_specs(self.manifest)["tokens"])
        ordinary = ordinary_tokens(self.manifest, tokens.read_rows(np.array(shard.contexts)), shard.contexts)
        step = self.manifest.chunk_contexts * _BATCH_CHUNKS
        for start in range(0, len(shard.contexts), step):
            contexts = shard.contexts[start : start + step]
            for layer in shard.layers:
                bits = self._read(layer, contexts)
                shard.append(layer, bits, ordinary[start : start + step], pool)
            advance(len(contexts))
        if self.manifest.mantissa_bits is not None:
            for layer in shard.layers:
                shard.set_rounding(layer, self._rounding(layer, shard.contexts, ordinary))

    def _read(self, layer: int, contexts: range) -> NDArray[np.uint16]:
        """Activations of the new store; bfloat16 bits [contexts, positions, d_model]."""
        rows: list[NDArray[np.uint16]] = []
        for part in self._parts(contexts):
            with _named(part.store):
                rows.append(part.store.read(layer, slice(part.start, part.stop)))
                if not _is_finite(rows[-1]):
                    problem = (
                        f"activations that are not finite among contexts {part.start} to {part.stop - 1}"
                    )
                    raise StoreDamagedError(problem, array=layer_path(layer))
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _rounding(self, layer: int, contexts: range, ordinary: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Rounding errors of these contexts, in proportion to their share in their original shards.

        Relative errors are divided by contexts, squared errors by ordinary tokens at the position, so the
        sums over a whole store stay the same. float64 [measures, positions].
        """
        total = np.zeros((2, self.manifest.context_length))
        done = 0
        for part in self._parts(contexts):
            manifest, at = part.store.manifest, part.start
            specs = stats_specs(manifest, layer)
            while at < part.stop:
                shard = at // manifest.shard_contexts
                there = manifest.contexts_of(shard)
                stop = min(part.stop, there.stop)
                with _named(part.store):
                    errors = _entry(part.store, specs["rounding"], shard)
                    counts = _entry(part.store, specs["counts"], shard)
                n_ordinary = ordinary[done : done + stop - at].sum(axis=0)
                share = np.divide(n_ordinary, counts, out=np.zeros(len(counts)), where=counts > 0)
                total += errors * np.stack([np.full_like(share, (stop - at) / len(there)), share])
                done, at = done + stop - at, stop
        return total


def _reader(store: ActivationStore, path: str) -> ShardReader:
    """A reader for one use, so that thousands of maps do not stay open."""
    array = store.array(path)
    return ShardReader(array.files, array.spec, array.sealed)


def _entry(store: ActivationStore, spec: ArraySpec, shard: int) -> NDArray[Any]:
    """An entry of statistics.

    Raises:
        StoreDamagedError: it is not what was written, or no harvest writes it.
    """
    entry = _reader(store, spec.path).read_rows(np.array([shard]))[0]
    if problem := store.impossible(spec, entry):
        raise StoreDamagedError(problem, array=spec.path, shard=shard)
    return entry


def _sealed_file(store: ActivationStore, spec: ArraySpec, shard: int) -> bytes:
    """The file of a shard of a small array, checked against the seal.

    Raises:
        StoreDamagedError: it is not.
    """
    if spec.path.startswith("stats/"):
        _entry(store, spec, shard)
    path = spec.shard_path(shard)
    most = spec.chunks_per_shard * (spec.chunk_bytes + HEADER_BYTES + CHECKSUM_BYTES) + index_bytes(spec)
    try:
        data = store.files.read(path, most)
    except FileNotFoundError:
        raise StoreDamagedError("the file is missing", array=path) from None
    check_sealed_bytes(store.seal, path, data)
    return data


def _check_digest(store: ActivationStore, layer: int, shard: int) -> None:
    """Refuse a digest in the statistics that differs from the seal, as the new seal would repeat it."""
    spec = stats_specs(store.manifest, layer)["sha256"]
    path = layer_spec(store.manifest, layer).shard_path(shard)
    sealed = store.seal.files.get(path) if store.seal else None
    if sealed is None or _entry(store, spec, shard).tobytes().hex() != sealed.sha256:
        raise StoreDamagedError("its digest is not the sealed one", array=spec.path, shard=shard)


def _is_finite(bits: NDArray[np.uint16]) -> bool:
    exponent = np.uint16(0x7F80)
    return not ((bits & exponent) == exponent).any()


@contextmanager
def _named(store: ActivationStore) -> Generator[None]:
    """Name the store in an error of damage."""
    try:
        yield
    except StoreDamagedError as error:
        raise StoreDamagedError(
            error.problem, array=f"{store.root}/{error.array}", shard=error.shard, chunk=error.chunk
        ) from None


class Assembled(NamedTuple):
    """The result of making a store of pieces."""

    store: ActivationStore
    n_tokens: int
    """Tokens written this time; 0 if the store was complete."""


def assemble(
    path: Path,
    pieces: Sequence[Piece],
    layers: Sequence[int],
    task: str,
    *,
    codec: str | None = None,
    progress: Progress | None = None,
) -> Assembled:
    """Make a store of ``pieces``, or resume it, and seal it.

    Args:
        path: folder of the new store.
        pieces: of sealed stores, in their order along axis 0; those of training parts first.
        layers: layers to take.
        task: its name in the progress.
        codec: of the new store; by default that of the first piece's store.
        progress: receives the progress.

    Raises:
        SettingsError: the folder is that of a piece's store, or all contexts are held out.
        StoreIncompleteError: a store is unfinished or lacks a layer.
        StoreDamagedError: a store is not what was sealed.
        StoreMismatchError: something else was begun in this folder.
        StoreWriteError: the disk refused.
    """
    progress = progress or Silent()
    for piece in pieces:
        if str(path.absolute()) == piece.store.address:
            raise SettingsError(f"{path} is one of the source stores; choose another folder for the new one")
    manifest = assembled_manifest(pieces, codec)
    length = manifest.context_length
    assembly = Assembly(path, pieces, manifest)
    missing = assembly.begin(layers)
    if missing:
        total = manifest.n_contexts * length
        unit_bytes = manifest.d_model * 2 * len(layers)
        progress.begin(task, total, "tokens", total - missing * length, unit_bytes)
        assembly.fill(lambda n_contexts: progress.advance(n_contexts * length))
        progress.end()
    return Assembled(assembly.finish(), missing * length)


def copy_part(
    source: ActivationStore,
    destination: Path,
    *,
    layers: Sequence[int] | None = None,
    contexts: tuple[int, int] | None = None,
    codec: str | None = None,
    progress: Progress | None = None,
) -> Assembled:
    """Copy some layers or contexts, or convert to another codec; run again, it resumes.

    Held-out contexts stay held out. For a part without any, training holds out the last 5 %.

    Args:
        source: a sealed store; it is not changed.
        destination: folder of the new store.
        layers: by default all of the store.
        contexts: [start, stop) along axis 0; by default all.
        codec: ``small``, ``fast`` or ``raw``; by default that of the store.
        progress: receives the progress.

    Raises:
        SettingsError: contexts that are not there, or all held out; no such codec; source and destination
            are the same.
        StoreIncompleteError: the store is unfinished or lacks a layer.
        StoreDamagedError: the store is not what was sealed.
        StoreMismatchError: something else was begun in the destination.
        StoreWriteError: the disk refused.
    """
    start, stop = contexts or (0, source.manifest.n_contexts)
    if not 0 <= start < stop <= source.manifest.n_contexts:
        raise SettingsError(
            f"contexts {start}:{stop}: {source.root} has 0:{source.manifest.n_contexts}; choose some of these"
        )
    if codec is not None and codec not in CODECS:
        raise SettingsError(f"codec {codec!r} does not exist; use one of {', '.join(CODECS)}")
    chosen = source.layers if layers is None else tuple(sorted(set(layers)))
    if not chosen:
        raise StoreIncompleteError(f"{source.root} holds no layer, so there is nothing to copy")
    return assemble(
        destination, [Piece(source, start, stop)], chosen, "copying", codec=codec, progress=progress
    )


def first_part(manifest: Manifest, fraction: float) -> tuple[int, int]:
    """The contexts of the first part of a store, rounded to whole shards, at least one.

    Whole shards are copied unchanged; contexts are in random order, so the first are a random sample.

    Raises:
        SettingsError: not a fraction.
    """
    if not 0 < fraction <= 1:
        raise SettingsError(f"fraction {fraction:g} is not above 0 and at most 1; use e.g. 0.1")
    n_shards = max(1, round(fraction * manifest.n_shards))
    return 0, min(n_shards * manifest.shard_contexts, manifest.n_contexts)
