"""Opening a store and reading from it: ``ActivationStore``.

A sealed store is what its seal names; an unsealed one is what is committed at the moment of
opening: in each layer the longest run of shards that are whole, with their tokens and statistics.
What is not committed cannot be asked for, so a missing file is an error and never fill values.
Opening reads a few small files and, where unsealed, the index of every shard. Reading decodes
whole chunks (8 contexts) out of the memory map, about 2 GB/s to a core with checksums on.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .errors import (
    SettingsError,
    StoreDamagedError,
    StoreFormatError,
    StoreIncompleteError,
    StoreNotFoundError,
)
from .files import StoreFiles
from .layout import ArraySpec, Json
from .manifest import Manifest, layer_path, layer_spec, parse_corpus, parse_manifest, token_specs
from .notebook import block, columns, facts
from .plain_text import quantity
from .readable import ReadableFiles
from .remote.cache import PartCache
from .remote.files import READING_THREADS, RemoteFiles
from .remote.servers import open_remote
from .seal import (
    CORPUS_PATH,
    MAX_METADATA_BYTES,
    ROOT_PATH,
    SEAL_PATH,
    Seal,
    check_sealed_bytes,
    parse_json,
    read_seal,
)
from .shards import ShardReader
from .stats import (
    LayerStats,
    NormStats,
    RoundingError,
    bits_to_float32,
    byte_plane_bound,
    norm_stats,
    stats_specs,
)

# What is told of a whole layer by its first shards: 8,192 contexts, and about 20 MB to read at d_model 2,304.
_SAMPLE_SHARDS = 16
_THREADS = min(4, os.cpu_count() or 1)
_ENTRIES = 32

Selection = slice | Sequence[int] | NDArray[Any]


class ActivationStore:
    """A store opened for reading; safe to use from many threads.

    Attributes:
        manifest: what was harvested from what.
        layers: the layers that can be read, sorted.
        n_contexts: contexts committed in every layer.
        contexts_by_layer: contexts committed, by layer.
        is_sealed: whether the harvest is finished.
        identity: digest of the seal, or None.
    """

    def __init__(self, place: str | Path, cache: PartCache | None = None) -> None:
        """Open the store by its root and seal alone; ``open`` checks more."""
        self.files: ReadableFiles = _files_at(place, cache)
        self.seal: Seal | None = _seal_of(self.files)
        self.manifest: Manifest = parse_manifest(self.metadata(ROOT_PATH))
        self._readers: dict[str, ShardReader] = {}
        self._specs: dict[str, ArraySpec] = {}
        self._samples: dict[int, LayerStats] = {}
        self._sound_layers: set[int] = set()
        self._digests: dict[int, dict[str, str]] = {}
        self.layers: tuple[int, ...] = self._find_layers()
        self._check_seal_is_no_longer_than_the_store()
        self.contexts_by_layer = {layer: self._committed(layer) for layer in self.layers}
        self.n_contexts = min(self.contexts_by_layer.values(), default=0)

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
        for path in token_specs(self.manifest):
            self.spec(path)
        for layer in self.layers:
            for spec in [layer_spec(self.manifest, layer), *stats_specs(self.manifest, layer).values()]:
                self.spec(spec.path)
        if (self.array("position").read_rows(np.arange(length)) != np.arange(length)).any():
            raise StoreDamagedError("positions are not 0, 1, 2, …", array="position")

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
        candidates = range(self.manifest.model_layers)
        if self.seal:
            return tuple(i for i in candidates if f"{layer_path(i)}/zarr.json" in self.seal.files)
        return tuple(i for i in candidates if self.files.exists(f"{layer_path(i)}/zarr.json"))

    def _check_seal_is_no_longer_than_the_store(self) -> None:
        """Refuse a stranger's endless seal, before anyone goes through all of it."""
        beside = token_specs(self.manifest).values()
        of_a_layer = [layer_spec(self.manifest, 0), *stats_specs(self.manifest, 0).values()]
        most = 2 + sum(1 + spec.n_shards for spec in beside)
        most += len(self.layers) * (1 + sum(1 + spec.n_shards for spec in of_a_layer))
        if self.seal and len(self.seal.files) > most:
            problem = f"it names {len(self.seal.files):,} files, and a store of these layers has {most:,}"
            raise StoreDamagedError(problem, array=SEAL_PATH)

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
                found = ArraySpec.from_json(path, self.metadata(expected.metadata_path))
                raise StoreFormatError(
                    f"{found.metadata_path} has shape {list(found.shape)} of {found.data_type}, and the "
                    f"manifest says {list(expected.shape)} of {expected.data_type}, or other chunks or "
                    "attributes; restore it from a copy of the store"
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
        stats = [spec for spec in stats_specs(self.manifest, layer).values()]
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

        An opened store looks once: what it found sound it does not open again.

        Raises:
            StoreIncompleteError: the store has no such layer, or nothing of it is committed.
            StoreDamagedError: a file is missing or cut short.
        """
        if layer in self._sound_layers:
            return
        if layer not in self.layers:
            has = ", ".join(map(str, self.layers)) or "none"
            raise StoreIncompleteError(
                f"{self.root} has no layer {layer}; it has {has}. "
                f"Add it: posae harvest {self.root} --layers {layer}"
            )
        if not self.contexts_by_layer[layer]:
            raise StoreIncompleteError(
                f"{self.root} holds no finished shard of layer {layer} yet; run the harvest again, "
                "it goes on where it stopped"
            )
        paths = [layer_path(layer), "tokens", "document"]
        paths += [spec.path for spec in stats_specs(self.manifest, layer).values()]
        checks = [
            (self.array(path), shard) for path in paths for shard in range(self.committed_shards(layer))
        ]
        if self.is_remote:
            _ = list(self._pool.map(_check_index, checks))
        else:
            for array, shard in checks:
                array.check_index(shard)
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

    def held_out_part(self, layer: int) -> tuple[int, int]:
        """Contexts [start, stop) that training does not read.

        Where none that the manifest names is committed (a part copied out, an unfinished harvest),
        the last 5 % of what is there, in whole chunks; nothing of a single chunk.
        """
        committed, chunk = self.contexts_by_layer[layer], self.manifest.chunk_contexts
        start = self.manifest.held_out[0]
        if start < committed:
            return start, committed
        n_chunks = -(-committed // chunk)
        kept = n_chunks - max(1, n_chunks // 20) if n_chunks > 1 else n_chunks
        return min(kept * chunk, committed), committed

    def training_contexts(self, layer: int) -> int:
        """How many contexts, from the first, training reads."""
        return self.held_out_part(layer)[0]

    def read(
        self,
        layer: int,
        contexts: Selection = slice(None),
        positions: Selection = slice(None),
        dtype: str = "uint16",
    ) -> NDArray[Any]:
        """Activations of one layer, decoded by a few threads.

        Args:
            layer: one of ``layers``.
            contexts: a slice, indices or booleans over the layer's committed contexts.
            positions: the same over positions.
            dtype: ``uint16`` for the bits of bfloat16, or ``float32``.

        Returns:
            uint16 or float32 [contexts, positions, d_model].

        Raises:
            StoreIncompleteError: no such layer, or contexts that are not committed.
            StoreDamagedError: a chunk is not what was written.
        """
        if dtype not in ("uint16", "float32"):
            raise SettingsError(f"dtype {dtype!r}: take uint16 (the bits of bfloat16) or float32")
        if layer not in self.layers:
            self.check_layer(layer)
        rows = select(contexts, self.contexts_by_layer[layer], "contexts")
        columns = select(positions, self.context_length, "positions")
        whole = len(columns) == self.context_length and bool((np.diff(columns) == 1).all())
        bits = self.array(layer_path(layer)).read_rows(rows, self._pool, None if whole else columns)
        return bits_to_float32(bits) if dtype == "float32" else bits

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.reading_threads, thread_name_prefix="posae-read")

    def tokens(self, contexts: Selection = slice(None)) -> NDArray[np.int32]:
        """Token ids; int32 [contexts, positions].

        By default, and counted from the end, of the contexts that every layer has; by their numbers of any
        that some layer has.

        Raises:
            StoreDamagedError: a chunk is not what was written.
        """
        rows = self._beside("tokens", contexts)
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < self.manifest.vocabulary_size:
            raise StoreDamagedError("token ids outside the vocabulary", array="tokens")
        return rows

    def documents(self, contexts: Selection = slice(None)) -> NDArray[np.int64]:
        """Which document of the dataset each token came from; int64 [contexts, positions]."""
        return self._beside("document", contexts)

    def _beside(self, name: str, contexts: Selection) -> NDArray[Any]:
        # Of what is named, as far as the layer that is farthest: each is read, and trained on, by itself.
        farthest = max(self.contexts_by_layer.values(), default=0)
        rows = select(contexts, farthest if _names_each(contexts) else self.n_contexts, "contexts")
        if not len(rows):
            # The array itself may not be committed yet.
            return np.empty((0, self.context_length), token_specs(self.manifest)[name].dtype)
        pool = self._pool if self.is_remote else None
        return self.array(name).read_rows(rows, pool)

    @cached_property
    def corpus(self) -> Json:
        """Counts made when the tokens were committed: documents, duplicates, special tokens."""
        if not self.files.exists(CORPUS_PATH):
            return {}
        return parse_corpus(self.metadata(CORPUS_PATH))

    def impossible(self, spec: ArraySpec, entry: NDArray[Any]) -> str:
        """What is wrong with an entry of statistics that no harvest writes; empty where nothing is."""
        if entry.dtype.kind == "f":
            return "sums that are no numbers" if np.isnan(entry).any() else ""
        # A count is over a shard's contexts, of bytes also over all of their values.
        values = self.context_length * self.d_model if spec.path.endswith("/byte_counts") else 1
        possible = 0 <= entry.min() <= entry.max() <= self.manifest.shard_contexts * values
        return "" if possible or entry.dtype.kind != "i" else "counts that cannot be"

    def _merged(self, layer: int, name: str, most_shards: int | None = None) -> NDArray[Any]:
        array = self.array(f"stats/{layer_path(layer)}/{name}")
        shards = np.arange(self.committed_shards(layer))[:most_shards]
        pool = self._pool if self.is_remote else None
        total: NDArray[Any] | None = None
        # Not all at once: an entry may have a megabyte, and a layer thousands of them.
        for start in range(0, len(shards), _ENTRIES):
            some = shards[start : start + _ENTRIES]
            for shard, entry in zip(some.tolist(), array.read_rows(some, pool), strict=True):
                if problem := self.impossible(array.spec, entry):
                    raise StoreDamagedError(problem, array=array.spec.path, shard=shard)
                entry = entry.astype(np.float64) if entry.dtype.kind == "f" else entry
                total = entry if total is None else total + entry
        return np.zeros(array.spec.shape[1:]) if total is None else total

    def stats(self, layer: int, most_shards: int | None = None) -> LayerStats:
        """Statistics of the ordinary tokens of the training part.

        Args:
            layer: one of ``layers``.
            most_shards: read the entries of so many shards, the first, and no more. Contexts are in random
                order, so they are a sample; an entry is L · d_model float32 numbers.
        """
        return LayerStats(*(self._merged(layer, name, most_shards) for name in LayerStats._fields))

    def norms(self, layer: int) -> NormStats:
        """Norms by position over all committed tokens."""
        counts = self._merged(layer, "norm_counts")
        if (counts.sum(axis=1) != self.contexts_by_layer[layer]).any():
            raise StoreDamagedError(
                "it does not count every token", array=f"stats/{layer_path(layer)}/norm_counts"
            )
        return norm_stats(self._merged(layer, "norm_sums"), counts)

    def compression_bound(self, layer: int) -> float | None:
        """The best ratio of raw to stored bytes that a code of single bytes can reach; None if not counted.

        The low byte of a bfloat16 is noise, so without rounding this is about 1.5.
        """
        if not self.manifest.byte_counts:
            return None
        return byte_plane_bound(self._merged(layer, "byte_counts"))

    def rounding_error(self, layer: int) -> RoundingError | None:
        """The error that rounding to ``mantissa_bits`` made, measured at harvest; None if lossless."""
        if self.manifest.mantissa_bits is None:
            return None
        relative, squared = self._merged(layer, "rounding").sum(axis=1).tolist()
        sample = self._sample(layer)
        variance = sample.variation / max(1, sample.n_tokens)
        squared /= max(1, int(self._merged(layer, "counts").sum()))
        return RoundingError(
            relative / (self.contexts_by_layer[layer] * self.context_length),
            squared / variance if variance > 0 else float("nan"),
        )

    def position_r2(self, layer: int) -> float:
        """Share of the variance that position alone explains, of a sample of at most 16 shards."""
        return self._sample(layer).position_r2

    def _sample(self, layer: int) -> LayerStats:
        if layer not in self._samples:
            self._samples[layer] = self.stats(layer, _SAMPLE_SHARDS)
        return self._samples[layer]

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
        prefixes = {name: f"{name}/" for name in ("tokens", layer_path(layer))}
        prefixes["stats"] = f"stats/{layer_path(layer)}/"
        found: dict[str, str] = {}
        for name, prefix in prefixes.items():
            lines = sorted(
                f"{path} {file.sha256}\n" for path, file in self.seal.files.items() if path.startswith(prefix)
            )
            found[name] = hashlib.sha256("".join(lines).encode()).hexdigest()
        self._digests[layer] = found
        return dict(found)

    def __repr__(self) -> str:
        """A line for notebooks."""
        state = "sealed" if self.is_sealed else "unfinished"
        return (
            f"ActivationStore({str(self.root)!r}: {self.manifest.model} on {self.manifest.dataset}, "
            f"layers {list(self.layers)}, {self.n_contexts} contexts of {self.context_length}, {state})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: where from, how much, and a line for each layer; sizes of files are read."""
        manifest = self.manifest
        told = {
            "model": f"{manifest.model}, {manifest.hook_point}, {self.d_model} wide",
            "text": manifest.dataset,
            "contexts": f"{self.n_contexts:,} of {self.context_length} tokens, codec {manifest.codec}",
            "state": f"sealed as {self.identity[:16]}" if self.identity else "unfinished",
        }
        rows: list[list[str]] = []
        for layer in self.layers:
            stored, raw = self.stored_bytes(layer), self.raw_bytes(layer)
            ratio = f"{raw / stored:.3f}" if stored else "-"
            n_contexts = self.contexts_by_layer[layer]
            rows.append([str(layer), f"{n_contexts:,}", quantity(stored), quantity(raw), ratio])
        by_layer = columns(["layer", "contexts", "on disk", "uncompressed", "ratio"], rows)
        return block(str(self.root), facts(told), *([by_layer] if rows else []))


def _check_index(shard: tuple[ShardReader, int]) -> None:
    shard[0].check_index(shard[1])


def is_store(folder: Path) -> bool:
    """Whether there is a store, or a group of one, in a folder of this machine; nothing is checked."""
    try:
        found: Any = json.loads((folder / ROOT_PATH).read_bytes())
        return "posae" in found["attributes"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return False


def _files_at(place: str | Path, cache: PartCache | None) -> ReadableFiles:
    if "://" in str(place):  # of whatever scheme: no folder is named so
        return RemoteFiles(open_remote(str(place)), cache or PartCache())
    return StoreFiles(Path(place))


def _seal_of(files: ReadableFiles) -> Seal | None:
    root = files.root
    if not isinstance(files, StoreFiles):
        return read_seal(files)
    try:
        seal = read_seal(files)
        if seal is None and not files.exists(ROOT_PATH):
            if next(files.root.iterdir(), None) is None:
                raise FileNotFoundError
            raise StoreFormatError(
                f"{root} is no store: it has no zarr.json; give the folder that posae harvest wrote"
            )
    except FileNotFoundError:
        raise StoreNotFoundError(f"there is no store at {root}; make one: posae harvest {root}") from None
    except NotADirectoryError:
        raise StoreFormatError(f"{root} is a file, and a store is a folder") from None
    except OSError as error:
        raise StoreFormatError(f"{root} cannot be read: {error.strerror}") from None
    return seal


def _names_each(selection: Selection) -> bool:
    """Whether what is selected does not depend on how many there are."""
    if isinstance(selection, slice):
        ends = (selection.start, selection.stop)
        return selection.stop is not None and all(end is None or end >= 0 for end in ends)
    wanted = np.asarray(selection)
    return wanted.dtype != np.bool_ and wanted.size > 0 and int(wanted.min()) >= 0


def select(selection: Selection, size: int, axis: str) -> NDArray[np.int64]:
    """A selection along one axis as indices from 0.

    Raises:
        StoreIncompleteError: an index that is not committed.
        TypeError: neither whole numbers nor booleans.

    >>> select(slice(-2, None), 5, "contexts")
    array([3, 4])
    """
    if isinstance(selection, slice):
        for edge in (selection.start, selection.stop):
            if edge is not None and edge > size:
                raise StoreIncompleteError(f"{axis} up to {edge} were asked for, and {size} are there")
        return np.arange(*selection.indices(size))
    wanted = np.atleast_1d(np.asarray(selection))
    if wanted.size and wanted.dtype.kind not in "iub":
        raise TypeError(f"{axis} are chosen by a slice, whole numbers or booleans, not by {wanted.dtype}")
    if wanted.dtype == np.bool_:
        if wanted.shape != (size,):
            raise StoreIncompleteError(f"{len(wanted)} booleans for {size} {axis}; give one for each")
        return np.flatnonzero(wanted)
    wanted = wanted.astype(np.int64).reshape(-1)
    if wanted.size and not -size <= int(wanted.min()) <= int(wanted.max()) < size:
        low, high = int(wanted.min()), int(wanted.max())
        told = f"{axis} {low} to {high} were" if low < high else f"{axis.removesuffix('s')} {low} was"
        raise StoreIncompleteError(f"{told} asked for, and {size} are there")
    return wanted % size if wanted.size else wanted
