"""Opening a store: its contents, and its arrays, each checked against the manifest.

A sealed store consists of the files that its seal names; an unsealed one of what is committed when it is
opened: in each layer the complete shards from the first on, with their tokens and statistics. Only committed
contexts can be read, so a missing file is an error and never yields fill values. Opening reads a few small
files, from a server all at once, and the index of every shard if the store is unsealed.
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
        files: the files of the store.
        seal: lists the files of a finished store; None for an unfinished one.
    """

    def __init__(self, place: str | Path, cache: PartCache | None = None) -> None:
        """Read the root and the seal only; ``open`` checks more."""
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
        """Create the reading threads."""
        self._pool = ThreadPoolExecutor(self.reading_threads, thread_name_prefix="posae-read")

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickle by opening the store again."""
        cache = self.files.cache if isinstance(self.files, RemoteFiles) else None
        return _reopened, (type(self), self.address, cache, self.identity)

    @classmethod
    def open(cls, place: str | Path, cache: PartCache | None = None) -> Self:
        """Open the store at ``place``.

        Args:
            place: a folder, or a URL, e.g. ``https://host/pile.zarr`` or ``s3://bucket/pile.zarr``.
            cache: keeps parts of a store on a server; by default the user's cache.

        Raises:
            StoreNotFoundError: there is no store.
            StoreFormatError: something else is there, or a store of a newer format.
            StoreDamagedError: the metadata or the positions are not what was written.
            StoreIncompleteError: the store is on a server and not sealed.
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
        """Paths of a layer's array and its statistics."""
        yield layer_path(layer)
        for spec in stats_specs(self.manifest, layer).values():
            yield spec.path

    def _each(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        """Results in order; for a store on a server the tasks run concurrently."""
        return list((self._pool.map if self.is_remote else map)(work, tasks))

    @property
    def root(self) -> Path | str:
        """The store's folder, or its URL without credentials."""
        return self.files.root

    @property
    def address(self) -> str:
        """The absolute path, or the URL."""
        return str(self.root.absolute()) if isinstance(self.root, Path) else self.root

    @property
    def reading_threads(self) -> int:
        """Number of reading threads; for a server enough to hide its latency."""
        return READING_THREADS if self.is_remote else _THREADS

    @property
    def is_remote(self) -> bool:
        """Whether the store is on a server."""
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
        """The specification of the array at ``path``, checked against the manifest.

        Raises:
            StoreFormatError: its ``zarr.json`` is not what the manifest implies.
        """
        if path not in self._specs:
            expected = self._expected(path)
            try:
                expected.check_bounds()
            except ValueError as error:
                raise StoreFormatError(
                    f"the manifest gives {path} sizes that no store can have ({error}); "
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
        """Number of committed shards of ``layer``, from the first."""
        return -(-self.contexts_by_layer[layer] // self.manifest.shard_contexts)

    def check_layer(self, layer: int) -> None:
        """Check that every committed file of ``layer`` exists, with its size and a valid index.

        For a store on a server, check that the seal names them all. The result is remembered.

        Raises:
            StoreIncompleteError: the store has no such layer, or no committed shard of it.
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
                f"{self.root} has no finished shard of layer {layer} yet; run the harvest again to resume"
            )
        for path in ("tokens", "document", *self._paths(layer)):
            array = self.array(path)
            # The seal gives the size of every file on a server; an index is checked when it is first read.
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
        """``layer``, or the store's middle layer if ``layer`` is None.

        Raises:
            StoreIncompleteError: the store has no layers.
        """
        if not self.layers:
            raise StoreIncompleteError(f"{self.root} has no layer yet; run the harvest again to resume")
        return layer if layer is not None else self.layers[len(self.layers) // 2]

    @property
    def corpus(self) -> Json:
        """Counts made when the tokens were committed: documents, duplicates, special tokens."""
        if self._corpus is None:
            is_there = self.files.exists(CORPUS_PATH)
            self._corpus = parse_corpus(self.metadata(CORPUS_PATH)) if is_there else {}
        return self._corpus

    def layer_versions(self, layer: int) -> dict[str, str]:
        """By library, the versions that wrote ``layer`` where they differ from the manifest's."""
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
        """Digests of what a run on ``layer`` reads: tokens, activations, statistics.

        Empty for an unsealed store, whose files have no final digest. Computed once.
        """
        if not self.seal:
            return {}
        if layer in self._digests:
            return dict(self._digests[layer])
        digests: dict[str, str] = {}
        for name in ("tokens", layer_path(layer), "stats"):
            prefix = f"stats/{layer_path(layer)}/" if name == "stats" else f"{name}/"
            lines = sorted(
                f"{path} {file.sha256}\n" for path, file in self.seal.files.items() if path.startswith(prefix)
            )
            digests[name] = hashlib.sha256("".join(lines).encode()).hexdigest()
        self._digests[layer] = digests
        return dict(digests)


def _reopened(
    kind: type[StoreArrays], place: str, cache: PartCache | None, identity: str | None
) -> StoreArrays:
    store = kind(place, cache)
    if identity is not None and store.identity != identity:
        raise StoreMismatchError(f"{place} was replaced by another store in the meantime; open it again")
    return store


def begun_layers(files: StoreFiles, manifest: Manifest) -> tuple[int, ...]:
    """Layers whose metadata is written, sealed or not."""
    layers = layers_in(files.names(""), manifest)
    return tuple(layer for layer in layers if files.exists(f"{layer_path(layer)}/zarr.json"))
