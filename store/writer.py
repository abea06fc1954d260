"""Writing a store: the root, the tokens, shard after shard, the seal. Each step is durable.

The order is the protocol (docs/format.md): root ``zarr.json``; tokens, documents, positions, then their
counts; per layer its metadata; per shard its statistics and then, by a rename, the shard itself;
``seal.json`` when all is complete, and last the card. After a kill at any step, repeating the work finishes
it with the same bytes. Several processes may write one store: a shard is written by the process that holds
its lock.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .arrays import begun_layers
from .card import write_card
from .errors import (
    SettingsError,
    StoreDamagedError,
    StoreFormatError,
    StoreIncompleteError,
    StoreMismatchError,
    StoreNotFoundError,
)
from .files import PARTIAL, StoreFiles, exclusive, is_leftover, unlocked
from .layout import MAX_CHUNK_BYTES, ArraySpec, Json
from .manifest import Manifest, group_json, layer_path, layer_spec, root_json, token_specs
from .plain_text import differences, layers_named, quantity
from .reader import ActivationStore
from .rounding import round_mantissas
from .seal import (
    COPY_PATH,
    CORPUS_PATH,
    MAX_METADATA_BYTES,
    ROOT_PATH,
    SEAL_PATH,
    SealedFile,
    pretty_json,
    seal_bytes,
    sha256_of,
)
from .shard_writer import Rows, ShardWriter, encode_chunks, shard_bytes, write_array
from .shards import ShardReader
from .stats import ChunkStats, stats_specs

_CHOSEN = {
    *("model", "dataset", "dataset_config", "n_contexts", "context_length", "skip_contexts", "packing"),
    *("held_out", "seed", "codec", "mantissa_bits", "batch_contexts", "attention", "device"),
}
"""Keys of the manifest that the user chose; messages list them before those that follow from them."""
_OTHER_OPTIONS = {"model_revision", "dataset_revision", "dataset_split", "dataset_column"}
_LARGE_FILE = SealedFile(10**10 - 1, "0" * 64)


def standing_store(root: Path) -> ActivationStore | None:
    """The store at ``root``, or None if a new one can be begun.

    Raises:
        StoreFormatError: something else is there.
        StoreDamagedError: what is there is not what was written.
    """
    try:
        return ActivationStore.open(root)
    except StoreNotFoundError:
        return None
    except StoreFormatError:
        # Leftovers of a kill are ignored.
        if any(not is_leftover(name) for name in StoreFiles(root).walk()):
            raise
        return None


class NotFiniteError(FloatingPointError):
    """An activation is not finite.

    Attributes:
        layer: its layer.
    """

    def __init__(self, layer: int) -> None:
        """Name the layer."""
        super().__init__(f"layer {layer}")
        self.layer = layer


class StoreWriter:
    """A store opened for writing; every method may be called again after a kill.

    Attributes:
        manifest: of the store.
        files: its files.
    """

    def __init__(self, root: Path, manifest: Manifest, *, allow_versions: bool = False) -> None:
        """A store at ``root``, which may not exist yet; see ``begin``."""
        self.root = root
        self.manifest = manifest
        self._allow_versions = allow_versions
        self.files = StoreFiles(root)

    @classmethod
    def begin(
        cls, root: Path, manifest: Manifest, layers: Sequence[int] = (), *, allow_versions: bool = False
    ) -> "StoreWriter":
        """Create the store, or open it to resume.

        Before the tokens are committed nothing is fixed, and the root is written again.

        Args:
            root: the store's folder.
            manifest: of the store.
            layers: layers to fill.
            allow_versions: let other library versions than the store's write further layers, and record
                them.

        Raises:
            SettingsError: chunks larger than a store can have.
            StoreFormatError: the folder holds something else.
            StoreMismatchError: the store was made with other settings; lists them.
            StoreDamagedError: what is there is not what was written.
            StoreWriteError: the disk refused, or the store would have more files than its seal can name.
        """
        writer = cls(root, manifest, allow_versions=allow_versions)
        with unlocked(root):
            writer.check(layers)
        writer.files.make_root()
        with exclusive(root):
            writer.check(layers)
            if not writer.has_tokens:
                writer.files.write(ROOT_PATH, pretty_json(root_json(manifest)))
        return writer

    def check(self, layers: Sequence[int]) -> None:
        """Refuse what ``begin`` refuses; writes nothing.

        Raises:
            StoreError: see ``begin``.
            SettingsError: chunks larger than a store can have.
        """
        store = standing_store(self.root)
        if store and self.files.exists(COPY_PATH):
            raise StoreMismatchError(
                f"{self.root} holds an unfinished copy; run the same posae copy again to finish it first"
            )
        if store and self.has_tokens:
            _check_same(self.root, store.manifest, self.manifest, allow_versions=self._allow_versions)
        elif store and store.is_sealed:
            raise StoreDamagedError("the file is missing", array=CORPUS_PATH)
        elif store and (foreign := next(filter(_follows_tokens, self.files.walk()), None)):
            raise StoreFormatError(
                f"{self.root} holds {foreign} but no committed tokens, so it is not an unfinished harvest; "
                "remove the folder, or choose another"
            )
        self._check_can_be_finished({*layers, *(store.layers if store else ())})

    def _check_can_be_finished(self, layers: Collection[int]) -> None:
        """Check the new store against the reader's bounds before anything is written."""
        for spec in specs_of(self.manifest, [*layers] or [0]):
            try:
                spec.check_bounds()
            except ValueError:
                raise SettingsError(
                    f"contexts of {self.manifest.context_length:,} tokens with {self.manifest.d_model:,} "
                    f"numbers each make chunks of {quantity(spec.chunk_bytes)} in {spec.path}, above the "
                    f"maximum of {quantity(MAX_CHUNK_BYTES)}; choose a smaller --context-length"
                ) from None
        # As if each file had ten digits: the seal must name them all.
        seal_bytes(dict.fromkeys(files_of(self.manifest, sorted(layers)), _LARGE_FILE))

    @property
    def has_tokens(self) -> bool:
        """Whether the tokens are committed."""
        return self.files.exists(CORPUS_PATH)

    def lock(self) -> AbstractContextManager[bool]:
        """Hold the store's lock, under which tokens, layer metadata and the seal are written."""
        return exclusive(self.root)

    def write_tokens(
        self,
        tokens: Rows,
        documents: Rows,
        corpus: Json,
        existing: Callable[[str, int], bytes | None] = lambda _array, _shard: None,
    ) -> None:
        """Commit the tokens; call under ``lock``.

        Args:
            tokens: int32 [contexts, positions]; read a shard at a time.
            documents: int64 [contexts, positions]; likewise.
            corpus: counts of documents, duplicates and special tokens.
            existing: the file of a shard of ``tokens`` or ``document``, if there is one to take unchanged.

        Raises:
            StoreWriteError: the disk refused.
        """
        # Another process may have begun the store with other settings: nothing was fixed before.
        self.files.write(ROOT_PATH, pretty_json(root_json(self.manifest)))
        values: dict[str, Rows] = {
            "tokens": tokens,
            "document": documents,
            "position": np.arange(self.manifest.context_length, dtype=np.int32),
        }
        for name, spec in token_specs(self.manifest).items():
            # Other settings may have left shards here before the commit.
            self._remove_shards_past(spec)
            self.files.write(spec.metadata_path, pretty_json(spec.to_json()))
            write_array(self.files, spec, values[name], partial(existing, name))
        self.files.write(CORPUS_PATH, pretty_json(group_json({"posae": corpus})))

    def _remove_shards_past(self, spec: ArraySpec) -> None:
        ours = {spec.shard_path(shard) for shard in range(spec.n_shards)}
        self.files.remove(spec.path, lambda name: name.startswith("c.") and f"{spec.path}/{name}" not in ours)

    def _write_metadata(self, spec: ArraySpec) -> None:
        if not self.files.exists(spec.metadata_path):
            self.files.write(spec.metadata_path, pretty_json(spec.to_json()))

    def add_layers(
        self, layers: Sequence[int], versions: Mapping[int, Mapping[str, str]] | None = None
    ) -> None:
        """Write the metadata of new layers; call under ``lock``.

        Args:
            layers: the layers.
            versions: by layer, the library versions that computed its activations, where they differ from
                this writer's manifest, e.g. for a layer of another store.

        Raises:
            StoreMismatchError: a layer was begun with other versions of libraries.
            StoreWriteError: the disk refused.
        """
        fixed = ActivationStore(self.root).manifest.versions
        for layer in layers:
            now = _but_posae({**self.manifest.versions, **(versions or {}).get(layer, {})})
            self._write_layer_group(layer, {name: v for name, v in now.items() if v != fixed.get(name)})
            for spec in stats_specs(self.manifest, layer).values():
                self._write_metadata(spec)
            self._write_metadata(layer_spec(self.manifest, layer))

    def _write_layer_group(self, layer: int, versions: Mapping[str, str]) -> None:
        """The group of a layer's statistics; it records versions that differ from the manifest's."""
        path = f"stats/{layer_path(layer)}/zarr.json"
        group = pretty_json(group_json({"posae": {"versions": versions}} if versions else {}))
        if not self.files.exists(path):
            self.files.write(path, group)
        elif self.files.read(path, MAX_METADATA_BYTES) != group:
            raise StoreMismatchError(
                f"layer {layer} of {self.root} was begun with other library versions, recorded in {path} or "
                "zarr.json; finish it with those"
            )

    def begin_layers(
        self, requested: Sequence[int], versions: Mapping[int, Mapping[str, str]] | None = None
    ) -> tuple[int, ...]:
        """Begin the ``requested`` layers, and return those to fill; call under ``lock``.

        Sealed layers are not touched; layers begun by others are left to them. ``versions``: see
        ``add_layers``.

        Raises:
            StoreMismatchError: another process committed other tokens since ``begin``.
            StoreWriteError: the disk refused.
        """
        store = ActivationStore.open(self.root)
        _check_same(self.root, store.manifest, self.manifest, allow_versions=self._allow_versions)
        layers = tuple(sorted({*requested} - {*(store.layers if store.is_sealed else ())}))
        self._check_can_be_finished({*layers, *store.layers})
        self.add_layers(layers, versions)
        return layers

    def is_committed(self, layer: int, shard: int) -> bool:
        """Whether one shard of one layer, and its statistics, are committed."""
        specs = [layer_spec(self.manifest, layer), *stats_specs(self.manifest, layer).values()]
        return all(ShardReader(self.files, spec).is_committed(shard) for spec in specs)

    def missing_shards(self, layers: Sequence[int]) -> list[int]:
        """The shards that at least one of ``layers`` lacks."""
        shards = range(self.manifest.n_shards)
        return [shard for shard in shards if not all(self.is_committed(layer, shard) for layer in layers)]

    def standing_shards(self, layers: Sequence[int]) -> set[int]:
        """The shards whose files exist in all of ``layers``, unchecked: the progress of other processes."""
        standing = set(range(self.manifest.n_shards))
        for layer in layers:
            spec = layer_spec(self.manifest, layer)
            names = self.files.names(spec.path)
            standing = {shard for shard in standing if spec.shard_path(shard).rpartition("/")[2] in names}
        return standing

    def lock_each(self, layers: Sequence[int], shards: Sequence[int]) -> "Iterator[ShardOfLayers]":
        """Lock one shard after another for the caller to fill: first the free ones.

        Then come those that another process left unfinished. A caller that commits a shard after requesting
        the next one must do so in another thread, as other processes may wait for it.

        Args:
            layers: layers to fill; a shard is locked in those of them that lack it.
            shards: their indices, in the order to try.

        Raises:
            StoreWriteError: the disk refused.
        """
        missing = list(shards)
        for wait in (False, True):
            for shard in list(missing):
                locked = self.lock_shard(layers, shard, wait=wait)
                if locked is not None:
                    yield locked
                    missing.remove(shard)

    def lock_shard(self, layers: Sequence[int], shard: int, *, wait: bool) -> "ShardOfLayers | None":
        """The shard of those ``layers`` that lack it, or None if none does or another process has it.

        Raises:
            StoreWriteError: the disk refused.
        """
        writers: dict[int, ShardWriter] = {}
        with ExitStack() as abandoning:
            for layer in layers:
                is_committed = partial(self.is_committed, layer, shard)
                if is_committed():
                    continue
                spec = layer_spec(self.manifest, layer)
                writer = ShardWriter.try_lock(self.files, spec, shard, wait=wait, is_committed=is_committed)
                if writer is not None:
                    writers[layer] = writer
                    abandoning.callback(writer.abandon)
                elif not is_committed():
                    return None
            locked = ShardOfLayers(self, shard, writers) if writers else None
            abandoning.pop_all()
            return locked

    def finish(self, layers: Sequence[int]) -> str:
        """Seal the store unless its seal names ``layers``, and write its card; call under ``lock``.

        The card is last: if writing it fails, the store is finished, and repeating the call writes it.

        Returns:
            The store's identity.

        Raises:
            StoreIncompleteError: a shard of one of ``layers`` is not committed.
            StoreDamagedError: a file that was committed is missing or not what was written.
            StoreReadError: the disk could not read a file that the seal must name.
            StoreWriteError: the disk refused.
        """
        store = ActivationStore.open(self.root)
        if not store.is_sealed or set(layers) - set(store.layers):
            self.seal(layers)
            store = ActivationStore.open(self.root)
        write_card(store)
        return str(store.identity)

    def seal(self, layers: Sequence[int] = ()) -> str:
        """Write the seal, and return the store's identity; ``finish`` calls it if necessary.

        It names ``layers``, the files of an older seal with their entries, and other complete layers.
        Digests of shards were taken while they were written.

        Raises:
            StoreError: as for ``finish``.
        """
        old = ActivationStore.open(self.root).seal
        sealed: dict[str, SealedFile] = dict(old.files) if old else {}
        complete = [
            layer for layer in begun_layers(self.files, self.manifest) if not self.missing_shards([layer])
        ]
        if lacking := sorted(set(layers) - set(complete)):
            raise StoreIncompleteError(
                f"{self.root} lacks shards of {layers_named(lacking)} and cannot be sealed yet; "
                "run the same command again"
            )
        for path in files_of(self.manifest, complete):
            if path not in sealed:
                sealed[path] = self._digest(path)
        # Complete layers have no writers, so these are leftovers of a kill.
        for spec in specs_of(self.manifest, complete):
            self.files.remove(spec.path, lambda name: name.startswith(".") and name.endswith(PARTIAL))
        data = seal_bytes(sealed)
        self.files.write(SEAL_PATH, data)
        return hashlib.sha256(data).hexdigest()

    def _digest(self, path: str) -> SealedFile:
        name, _, key = path.partition("/")
        if name.startswith("layer_") and key.startswith("c."):
            layer, shard = int(name.removeprefix("layer_")), int(key.split(".")[1])
            digests = ShardReader(self.files, stats_specs(self.manifest, layer)["sha256"])
            size = self.files.size_bytes(path)
            return SealedFile(size or 0, digests.read_rows(np.array([shard]))[0].tobytes().hex())
        try:
            return sha256_of(self.files, path)
        except FileNotFoundError:
            raise StoreDamagedError("the file is missing", array=path) from None


class ShardOfLayers:
    """One shard of several layers, written batch after batch. A context manager.

    A pool's threads encode chunks and compute their statistics; each layer has a thread that digests and
    writes them in order. At most a few batches are pending, so appending waits only for slow encoding or
    disks.
    """

    def __init__(self, store: StoreWriter, shard: int, writers: dict[int, ShardWriter]) -> None:
        """Hold the locks in ``writers``; use ``StoreWriter.lock_shard``."""
        self.shard = shard
        self.contexts = store.manifest.contexts_of(shard)
        self._store = store
        self._writers = writers
        self._stats: dict[int, ChunkStats] = {}
        self._rounding: dict[int, NDArray[np.float64]] = {}
        self._adopted: dict[int, Mapping[str, bytes]] = {}
        self._threads = {layer: ThreadPoolExecutor(1, f"posae-write-{layer}") for layer in writers}
        self._waiting: deque[tuple[Encoding, Future[None]]] = deque()
        self._taken = dict.fromkeys(writers, 0)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that lack this shard."""
        return tuple(self._writers)

    def __enter__(self) -> "ShardOfLayers":
        """Hold the locks."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the locks, and remove uncommitted files."""
        for encoding, _writing in self._waiting:
            encoding.cancel()
        for thread in self._threads.values():
            thread.shutdown(cancel_futures=True)
        for writer in self._writers.values():
            writer.abandon()

    def append(
        self, layer: int, bits: NDArray[np.uint16], ordinary: NDArray[np.bool_], pool: Executor
    ) -> "list[Encoding]":
        """Take the next contexts of one layer, a whole number of chunks unless the shard ends.

        Args:
            layer: one of ``layers``.
            bits: bfloat16 bits [contexts, positions, d_model]; unchanged until they are encoded.
            ordinary: bool [contexts, positions]: tokens that enter the position means.
            pool: threads to encode in.

        Returns:
            The pending encodings by chunk: when all are done, ``bits`` may be changed.

        Raises:
            ValueError: part of a chunk before the shard's end, or contexts past it.
            NotFiniteError: an activation is not finite.
            StoreWriteError: the disk refused.
        """
        manifest = self._store.manifest
        step = manifest.chunk_contexts
        spec = layer_spec(manifest, layer)
        self._taken[layer] += len(bits)
        left = len(self.contexts) - self._taken[layer]
        if left < 0 or (left and len(bits) % step):
            raise ValueError(f"{len(bits)} contexts are not whole chunks of {step} up to the shard's end")
        encodings: list[Encoding] = []
        for start in range(0, len(bits), step):
            part, mask = bits[start : start + step], ordinary[start : start + step]
            encoding = pool.submit(_encode_and_count, spec, part, mask, manifest.mantissa_bits)
            self._waiting.append((encoding, self._threads[layer].submit(self._write, layer, encoding)))
            encodings.append(encoding)
        # Bounded: two batches of every layer may wait for the pool, no more.
        self._drain(2 * len(self._writers) * max(1, len(bits) // step))
        return encodings

    def adopt(self, layer: int, source: ShardReader, shard: int, statistics: Mapping[str, bytes]) -> None:
        """Take a whole shard of a sealed store for one layer, instead of ``append``.

        Args:
            layer: one of ``layers``.
            source: the layer in the other store, with the same codec and sizes.
            shard: index of its shard, which has as many contexts as this one.
            statistics: files of its entries, by short name.

        Raises:
            StoreDamagedError: the shard is missing or not what was sealed.
            StoreWriteError: the disk refused.
        """
        self._writers[layer].adopt(source, shard)
        self._adopted[layer] = statistics

    def set_rounding(self, layer: int, rounding: NDArray[np.float64]) -> None:
        """Record the error of rounding that was done before ``append``.

        Args:
            layer: one of ``layers``.
            rounding: the entry of that name, float64 [measures, positions].
        """
        self._rounding[layer] = rounding

    def _write(self, layer: int, encoding: "Encoding") -> None:
        """Write the next chunk of one layer; in its thread."""
        try:
            encoded, stats = encoding.result()
        except FloatingPointError:
            raise NotFiniteError(layer) from None
        for chunk in encoded:
            self._writers[layer].append(chunk)
        if layer in self._stats:
            self._stats[layer].add(stats)
        else:
            self._stats[layer] = stats

    def _drain(self, keep: int) -> None:
        while len(self._waiting) > keep:
            self._waiting.popleft()[1].result()

    def commit(self) -> None:
        """Commit the shard in every layer concurrently: statistics first, then the rename.

        Raises:
            NotFiniteError: an activation is not finite.
            StoreWriteError: the disk refused.
        """
        self._drain(0)
        committing = [thread.submit(self._commit, layer) for layer, thread in self._threads.items()]
        for committed in committing:
            committed.result()

    def _commit(self, layer: int) -> None:
        writer = self._writers[layer]
        statistics = self._adopted.get(layer) or self._statistics(layer, writer.finish().sha256)
        writer.check_is_held()
        for name, spec in stats_specs(self._store.manifest, layer).items():
            self._store.files.write(spec.shard_path(self.shard), statistics[name])
        writer.commit()

    def _statistics(self, layer: int, sha256: str) -> dict[str, bytes]:
        """The files of the shard's entries, by short name."""
        entries = self._stats[layer].arrays(bytes.fromhex(sha256))
        if layer in self._rounding:
            entries["rounding"] = self._rounding[layer]
        specs = stats_specs(self._store.manifest, layer)
        return {name: shard_bytes(spec, entries[name][np.newaxis]) for name, spec in specs.items()}


Encoding = Future[tuple[list[bytes], ChunkStats]]
"""A chunk being encoded, with its statistics."""


def _encode_and_count(
    spec: ArraySpec, bits: NDArray[np.uint16], ordinary: NDArray[np.bool_], mantissa_bits: int | None
) -> tuple[list[bytes], ChunkStats]:
    if mantissa_bits is None:
        return encode_chunks(spec, bits), ChunkStats.of(bits, ordinary)
    rounded = round_mantissas(bits, mantissa_bits)
    return encode_chunks(spec, rounded), ChunkStats.of(rounded, ordinary, exact=bits)


def specs_of(manifest: Manifest, layers: Sequence[int]) -> list[ArraySpec]:
    """All arrays of a store of these layers."""
    specs = list(token_specs(manifest).values())
    for layer in layers:
        specs += [layer_spec(manifest, layer), *stats_specs(manifest, layer).values()]
    return specs


def files_of(manifest: Manifest, layers: Sequence[int]) -> list[str]:
    """The files that the seal of a store of these layers names."""
    specs = specs_of(manifest, layers)
    groups = [ROOT_PATH, CORPUS_PATH, *(f"stats/{layer_path(layer)}/zarr.json" for layer in layers)]
    paths = [spec.metadata_path for spec in specs]
    paths += [spec.shard_path(shard) for spec in specs for shard in range(spec.n_shards)]
    return groups + paths


def _follows_tokens(path: str) -> bool:
    """Whether a file can only exist after the tokens are committed."""
    return path.startswith(("layer_", "stats/")) and not is_leftover(path)


def _but_posae(versions: Mapping[str, str]) -> dict[str, str]:
    # Within a format every version of posae writes the same bytes; other libraries may not.
    return {name: version for name, version in versions.items() if name != "posae"}


def _option(key: str) -> str:
    """The option of ``posae harvest`` that sets a key of the manifest; the key if there is none."""
    if key not in _CHOSEN | _OTHER_OPTIONS:
        return key
    name = {"n_contexts": "contexts", "dataset_split": "split", "dataset_column": "column"}.get(key, key)
    return f"--{name.replace('_', '-')}"


def _rank(key: str) -> int:
    """Sort order of the keys that differ: before those that follow from them."""
    if key in ("model", "dataset"):
        return 0
    return 1 if key.startswith(("planted ", "origin ", "imported ")) else 2 if key in _CHOSEN else 3


def _check_same(root: Path, recorded: Manifest, new: Manifest, *, allow_versions: bool) -> None:
    before, now = recorded.model_dump(), new.model_dump()
    for manifest in (before, now):
        manifest["versions"] = {} if allow_versions else _but_posae(manifest["versions"])
        for name in ("planted", "origin", "imported", "versions"):
            inner: Json = manifest.pop(name) or {}
            manifest |= {f"{name} {key}": value for key, value in inner.items()}
    differ = [
        (key, before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)
    ]
    if not differ:
        return
    differ.sort(key=lambda change: _rank(change[0]))
    remedy = "give the same settings to resume, or another folder"
    if all(key.startswith("versions ") for key, *_ in differ):
        remedy = "install those versions, or record the difference: --allow-versions"
    if not (recorded.planted or recorded.origin or recorded.imported):
        differ = [(_option(key), old, value) for key, old, value in differ]
    raise StoreMismatchError(f"{root} was begun with other settings: {differences(differ)}; {remedy}")
