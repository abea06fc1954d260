"""Opening a store: what it holds, and each of its arrays, checked to be what the manifest says.

A sealed store is what its seal names; an unsealed one is what is committed at the moment of
opening: in each layer the longest run of shards that are whole, with their tokens and statistics.
What is not committed cannot be asked for, so a missing file is an error and never fill values.
Opening reads a few small files, from a server all at once, and, where unsealed, the index of every shard.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from .errors import StoreDamagedError, StoreFormatError, StoreIncompleteError, StoreMismatchError
from .files import StoreFiles
from .layout import ArraySpec, Json
from .manifest import (
    Manifest,
    layer_path,
    layer_spec,
    layers_in,
    parse_corpus,
    parse_layer_versions,
    parse_manifest,
    token_specs,
)
from .opening import files_at, seal_of
from .plain_text import numbers
from .readable import ReadableFiles
from .remote.cache import PartCache
from .remote.files import READING_THREADS, RemoteFiles
from .seal import CORPUS_PATH, MAX_METADATA_BYTES, ROOT_PATH, Seal, check_sealed_bytes, parse_json
from .shards import ShardReader
from .stats import LayerStats, stats_specs
from .threads import Renewed

_THREADS = min(4, os.cpu_count() or 1)

Task = TypeVar("Task")
Result = TypeVar("Result")


class StoreArrays(Renewed):
    """The arrays of an opened store; other attributes are those of ``ActivationStore``.

    Attributes:
        files: where they lie.
        seal: what the finished store consists of; None where it is not finished.
    """

    def __init__(self, place: str | Path, cache: PartCache | None = None) -> None:
        """Open the store by its root and seal alone; ``open`` checks more."""
        self.files: ReadableFiles = files_at(place, cache)
        super().__init__()
        self.seal: Seal | None = seal_of(self.files)
        self.manifest: Manifest = parse_manifest(self.metadata(ROOT_PATH))
        self._readers: dict[str, ShardReader] = {}
        self._specs: dict[str, ArraySpec] = {}
        self._sound_layers: set[int] = set()
        self._digests: dict[int, dict[str, str]] = {}
        self._samples: dict[int, LayerStats] = {}
        self._corpus: Json | None = None
        self.layers: tuple[int, ...] = self._find_layers()
        self.contexts_by_layer = {layer: self._committed(layer) for layer in self.layers}
        self.n_contexts = min(self.contexts_by_layer.values(), default=0)

    def renew(self) -> None:
        """Make the threads that read."""
        self._pool = ThreadPoolExecutor(self.reading_threads, thread_name_prefix="posae-read")

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the store for itself."""
        cache = self.files.cache if isinstance(self.files, RemoteFiles) else None
        return _reopened, (type(self), self.address, cache, self.identity)

    @classmethod
    def open(cls, place: str | Path, cache: PartCache | None = None) -> Self:
        """Open the store at ``place``.

        Args:
            place: a folder, or a URL as ``https://host/pile.zarr``, ``s3://bucket/pile.zarr``.
            cache: where parts of a store on a server are kept; by default the user's own.

        Raises:
            StoreNotFoundError: there is no store.
            StoreFormatError: something else is there, or a store of a newer format.
            StoreDamagedError: the metadata or the positions are not what was written.
            StoreIncompleteError: a store on a server that is not sealed.
            StoreRemoteError: the server refused, or does not answer.
        """
        store = cls(place, cache)
        if store.n_contexts:
            store.check_metadata()
        return store

    def check_metadata(self) -> None:
        """Check every array's ``zarr.json``, and the positions.

        Raises:
            StoreFormatError: an array of another shape, type or codec.
            StoreDamagedError: the metadata or the positions are not what was written.
        """
        length = self.manifest.context_length
        self._each(
            self.spec, [*token_specs(self.manifest), *(p for n in self.layers for p in self._paths(n))]
        )
        if (self.array("position").read_rows(np.arange(length)) != np.arange(length)).any():
            raise StoreDamagedError("positions are not 0, 1, 2, …", array="position")

    def _paths(self, layer: int) -> Iterator[str]:
        """The arrays of a layer and its statistics."""
        yield layer_path(layer)
        for spec in stats_specs(self.manifest, layer).values():
            yield spec.path

    def _each(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        """The results in order; where each may ask a server, all at once."""
        return list((self._pool.map if self.is_remote else map)(work, tasks))

    @property
    def root(self) -> Path | str:
        """Its folder, or its URL as it may be shown."""
        return self.files.root

    @property
    def address(self) -> str:
        """Where it can be opened from any working folder: an absolute path, or the URL."""
        return str(self.root.absolute()) if isinstance(self.root, Path) else self.root

    @property
    def reading_threads(self) -> int:
        """Threads that read at once: for a server as many as hide its latency."""
        return READING_THREADS if self.is_remote else _THREADS

    @property
    def is_remote(self) -> bool:
        """Whether it lies on a server."""
        return isinstance(self.files, RemoteFiles)

    @property
    def is_sealed(self) -> bool:
        """Whether the harvest is finished."""
        return self.seal is not None

    @property
    def identity(self) -> str | None:
        """SHA-256 of the seal, in hex; None for an unfinished harvest."""
        return self.seal.identity if self.seal else None

    def metadata(self, path: str) -> Json:
        """A ``zarr.json``, checked against the seal.

        Raises:
            StoreDamagedError: missing or not what was sealed.
            StoreFormatError: not JSON.
        """
        try:
            data = self.files.read(path, MAX_METADATA_BYTES)
        except FileNotFoundError:
            raise StoreDamagedError("the file is missing", array=path) from None
        check_sealed_bytes(self.seal, path, data)
        return parse_json(data, path)

    def _find_layers(self) -> tuple[int, ...]:
        if self.seal:
            arrays = (path.removesuffix("/zarr.json") for path in self.seal.files)
            return layers_in(arrays, self.manifest)
        return begun_layers(StoreFiles(Path(self.root)), self.manifest)

    def spec(self, path: str) -> ArraySpec:
        """The array at ``path``, checked to be what the manifest says.

        Raises:
            StoreFormatError: its ``zarr.json`` says something else.
        """
        if path not in self._specs:
            expected = self._expected(path)
            try:
                expected.check_bounds()
            except ValueError as error:
                raise StoreFormatError(
                    f"{path} would have sizes past all bounds ({error}), says the manifest; "
                    "restore zarr.json from a copy of the store"
                ) from None
            if self.metadata(expected.metadata_path) != expected.to_json():
                raise StoreFormatError(
                    f"{expected.metadata_path} is not the array that the manifest describes (shape "
                    f"{list(expected.shape)}, {expected.data_type}); restore it from a copy of the store"
                )
            self._specs[path] = expected
        return self._specs[path]

    def _expected(self, path: str) -> ArraySpec:
        name, _, rest = path.partition("/")
        if name == "stats":
            layer, _, short = rest.partition("/")
            return stats_specs(self.manifest, int(layer.removeprefix("layer_")))[short]
        if name.startswith("layer_"):
            return layer_spec(self.manifest, int(name.removeprefix("layer_")))
        return token_specs(self.manifest)[name]

    def array(self, path: str) -> ShardReader:
        """The chunks of the array at ``path``."""
        if path not in self._readers:
            sealed = self.seal.files if self.seal else None
            self._readers[path] = ShardReader(self.files, self.spec(path), sealed)
        return self._readers[path]

    def _committed(self, layer: int) -> int:
        if self.seal:
            return self.manifest.n_contexts
        if not self.files.exists(CORPUS_PATH):
            return 0
        beside = [self.array(path) for path in ("tokens", "document")]
        stats = stats_specs(self.manifest, layer).values()
        shards = 0
        activations = self.array(layer_path(layer))
        while (
            shards < self.manifest.n_shards
            and all(array.is_committed(shards) for array in [activations, *beside])
            and all(self.files.exists(spec.shard_path(shards)) for spec in stats)
        ):
            shards += 1
        return min(shards * self.manifest.shard_contexts, self.manifest.n_contexts)

    def committed_shards(self, layer: int) -> int:
        """How many shards of ``layer`` are committed, from the first."""
        return -(-self.contexts_by_layer[layer] // self.manifest.shard_contexts)

    def check_layer(self, layer: int) -> None:
        """Check that every committed file of ``layer`` is there, of its size, with an index that holds.

        Of a store on a server, that the seal names them all. An opened store looks once.

        Raises:
            StoreIncompleteError: the store has no such layer, or nothing of it is committed.
            StoreDamagedError: a file is missing or cut short.
        """
        if layer in self._sound_layers:
            return
        if layer not in self.layers:
            raise StoreIncompleteError(
                f"{self.root} has no layer {layer}; it has {numbers(self.layers) or 'none'}. "
                f"Add it: posae harvest {self.root} --layers {layer}"
            )
        if not self.contexts_by_layer[layer]:
            raise StoreIncompleteError(
                f"{self.root} holds no finished shard of layer {layer} yet; run the harvest again, "
                "it goes on where it stopped"
            )
        for path in ("tokens", "document", *self._paths(layer)):
            array = self.array(path)
            # The seal names no file on a server without its size: its index is checked when it is first read.
            check = array.check_sealed if self.is_remote else array.check_index
            for shard in range(self.committed_shards(layer)):
                check(shard)
        self._sound_layers.add(layer)

    @property
    def context_length(self) -> int:
        """Positions of a context, L."""
        return self.manifest.context_length

    @property
    def d_model(self) -> int:
        """Width of an activation."""
        return self.manifest.d_model

    def layer_or_middle(self, layer: int | None) -> int:
        """``layer``, or the middle one of the store where none is named.

        Raises:
            StoreIncompleteError: the store has no layers.
        """
        if not self.layers:
            raise StoreIncompleteError(
                f"{self.root} holds no layer yet; run the harvest again, it goes on where it stopped"
            )
        return layer if layer is not None else self.layers[len(self.layers) // 2]

    @property
    def corpus(self) -> Json:
        """Counts made when the tokens were committed: documents, duplicates, special tokens."""
        if self._corpus is None:
            is_there = self.files.exists(CORPUS_PATH)
            self._corpus = parse_corpus(self.metadata(CORPUS_PATH)) if is_there else {}
        return self._corpus

    def layer_versions(self, layer: int) -> dict[str, str]:
        """Versions of libraries that wrote ``layer`` where they are not the manifest's, by library."""
        return parse_layer_versions(self.metadata(f"stats/{layer_path(layer)}/zarr.json"))

    def stored_bytes(self, layer: int) -> int:
        """Bytes on disk of the committed shards of ``layer``."""
        spec = self.spec(layer_path(layer))
        shards = range(self.committed_shards(layer))
        return sum(self.files.size_bytes(spec.shard_path(shard)) or 0 for shard in shards)

    def raw_bytes(self, layer: int) -> int:
        """Bytes of the committed activations of ``layer``, uncompressed."""
        return self.contexts_by_layer[layer] * self.context_length * self.d_model * 2

    def digests(self, layer: int) -> dict[str, str]:
        """What a run that reads ``layer`` reads: digest by name of tokens, activations, statistics.

        Empty for an unsealed store, whose files have no final digest. An opened store reckons once.
        """
        if not self.seal:
            return {}
        if layer in self._digests:
            return dict(self._digests[layer])
        found: dict[str, str] = {}
        for name in ("tokens", layer_path(layer), "stats"):
            prefix = f"stats/{layer_path(layer)}/" if name == "stats" else f"{name}/"
            lines = sorted(
                f"{path} {file.sha256}\n" for path, file in self.seal.files.items() if path.startswith(prefix)
            )
            found[name] = hashlib.sha256("".join(lines).encode()).hexdigest()
        self._digests[layer] = found
        return dict(found)


def _reopened(
    kind: type[StoreArrays], place: str, cache: PartCache | None, identity: str | None
) -> StoreArrays:
    store = kind(place, cache)
    if identity is not None and store.identity != identity:
        raise StoreMismatchError(f"{place} is another store than it was a moment ago; open it anew")
    return store


def begun_layers(files: StoreFiles, manifest: Manifest) -> tuple[int, ...]:
    """Layers whose metadata is written, sealed or not."""
    layers = layers_in(files.names(""), manifest)
    return tuple(layer for layer in layers if files.exists(f"{layer_path(layer)}/zarr.json"))
