"""Merging several harvests of one corpus into one store.

They must agree in everything that activations depend on, and hold different contexts of the corpus, like
harvests with ``--skip-contexts``. The new store begins with the whole shards of the training parts, which are
linked or copied unchanged; then comes the rest of the training parts, then all held-out contexts. Training
shuffles chunks, so the order does not matter to it. For costs see ``stores/assembling.py``.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...store.errors import SettingsError, StoreIncompleteError, StoreMismatchError
from ...store.manifest import Manifest
from ...store.reader import ActivationStore
from ..harvest.corpus import digests_of
from ..progress import Progress
from ..settings import MergeSettings
from .assembling import VERSIONS_OF_BYTES, Piece, assemble, but

MAY_DIFFER = {
    *("n_contexts", "skip_contexts", "origin"),  # which contexts they hold: what a merge is about
    *("held_out", "seed"),  # how these were dealt out, after which each activation is the same
    *("shard_contexts", "byte_counts"),  # how they are kept; the larger shards, the counts that all have
}
"""Manifest keys that may differ between merged stores, and in ``versions`` the libraries that only encode.
All others must agree: activations depend on them, or the new store can have only one value."""


class Merged(NamedTuple):
    """The result of a merge."""

    store: ActivationStore
    n_tokens: int
    """Tokens written this time; 0 if the store was complete."""

    n_repeated: int
    """Contexts with the same tokens as a context of another store, as the corpus repeats itself."""


class Merge:
    """A merge before it runs: the stores are checked, and nothing is written yet."""

    def __init__(self, stores: Sequence[ActivationStore], path: Path, settings: MergeSettings) -> None:
        """Check that the stores can be merged.

        Args:
            stores: two or more, in the order of the new store.
            path: folder of the new store.
            settings: select layers.

        Raises:
            SettingsError: a single store.
            StoreIncompleteError: a store is unfinished, or lacks a layer.
            StoreMismatchError: stores differ in a setting or in their layers, or hold the same contexts.
            StoreDamagedError: a store is not what was sealed.
        """
        if len(stores) < 2:
            raise SettingsError("merging needs at least two stores; give another one")
        self.stores = stores
        self.path = path
        for store in stores:
            if not store.is_sealed:
                raise StoreIncompleteError(f"{store.root} is an unfinished harvest; finish it before merging")
        for other in stores[1:]:
            _check_agreement(stores[0], other)
        self.layers: tuple[int, ...] = _layers(stores, settings.layers)
        for other in stores[1:]:
            for layer in self.layers:
                _check_versions(stores[0], other, layer)
        for one, other in combinations(stores, 2):
            _check_apart(one, other)

    @property
    def pieces(self) -> list[Piece]:
        """Pieces of the stores, in the order that keeps most shards whole."""
        size = max(store.manifest.shard_contexts for store in self.stores)
        whole: list[Piece] = []
        rest: list[Piece] = []
        held_out: list[Piece] = []
        for store in self.stores:
            manifest = store.manifest
            end = manifest.held_out[0] // size * size
            whole.append(Piece(store, 0, end))
            rest.append(Piece(store, end, manifest.held_out[0]))
            held_out.append(Piece(store, *manifest.held_out))
        # An incomplete chunk would misalign all chunks after it.
        chunk = self.stores[0].manifest.chunk_contexts
        rest.sort(key=lambda piece: (piece.stop - piece.start) % chunk > 0)
        return [piece for piece in whole + rest + held_out if piece.start < piece.stop]

    def run(self, progress: Progress | None = None) -> Merged:
        """Write what is missing, and seal the new store.

        Raises:
            SettingsError: the new store's folder is one of the stores'.
            StoreDamagedError: a store is not what was sealed.
            StoreMismatchError: something else was begun in the new store's folder.
            StoreWriteError: the disk refused.
        """
        done = assemble(self.path, self.pieces, self.layers, "merging", progress=progress)
        return Merged(done.store, done.n_tokens, self._n_repeated(done.store))

    def _n_repeated(self, merged: ActivationStore) -> int:
        """From the counts made when tokens were committed; 0 if a store has none."""
        corpora = [store.corpus for store in self.stores]
        if not all(corpora):
            return 0
        return merged.corpus["duplicate_contexts"] - sum(corpus["duplicate_contexts"] for corpus in corpora)


def _settings(manifest: Manifest) -> dict[str, Any]:
    """The values that must agree between two stores, by name."""
    found = manifest.model_dump(exclude=MAY_DIFFER)
    for name in ("versions", "planted"):
        inner: dict[str, str] = found.pop(name) or {}
        found |= {f"{name} {key}": value for key, value in inner.items() if key not in VERSIONS_OF_BYTES}
    return found


def _check_agreement(one: ActivationStore, other: ActivationStore) -> None:
    ones, others = _settings(one.manifest), _settings(other.manifest)
    differ = [
        f"{name} is {ones.get(name)!r} and {others.get(name)!r}"
        for name in {**ones, **others}
        if ones.get(name) != others.get(name)
    ]
    if not differ:
        return
    remedy = "harvest one of them again with the settings of the other"
    if [name for name in ones if ones[name] != others.get(name)] == ["codec"]:
        remedy = f"convert one of them to the other codec: posae copy --codec {one.manifest.codec}"
    raise StoreMismatchError(f"{one.root} and {other.root} differ: {'; '.join(differ)}; {remedy}")


def _check_versions(one: ActivationStore, other: ActivationStore, layer: int) -> None:
    """Refuse a layer computed with different library versions."""
    ones, others = (
        but({**store.manifest.versions, **store.layer_versions(layer)}, VERSIONS_OF_BYTES)
        for store in (one, other)
    )
    if ones != others:
        differ = [name for name in ones if ones[name] != others.get(name)]
        raise StoreMismatchError(
            f"layer {layer} of {one.root} and {other.root} was computed by other versions of "
            f"{', '.join(differ)}; harvest one of them again with the versions of the other"
        )


def _layers(stores: Sequence[ActivationStore], wanted: Sequence[int] | None) -> tuple[int, ...]:
    if wanted is not None:
        for store in stores:
            for layer in wanted:
                store.check_layer(layer)
        return tuple(sorted(set(wanted)))
    layers = stores[0].layers
    for store in stores[1:]:
        if store.layers != layers:
            common = sorted(set(layers).intersection(*(other.layers for other in stores)))
            shown = ",".join(map(str, common))
            raise StoreMismatchError(
                f"{stores[0].root} has layers {_shown(layers)} and {store.root} has {_shown(store.layers)}; "
                + (f"merge those that all have: --layers {shown}" if common else "they have none in common")
            )
    if not layers:
        raise StoreIncompleteError(f"{stores[0].root} holds no layer, so there is nothing to merge")
    return layers


def _shown(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _check_apart(one: ActivationStore, other: ActivationStore) -> None:
    """Refuse two stores that hold the same context of the corpus."""
    pairs = [(a, b) for a in one.manifest.corpus_contexts for b in other.manifest.corpus_contexts]
    shared = [range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs]
    shared = [interval for interval in shared if interval]
    if not shared:
        return
    # For a part it is not known which of its store's contexts it holds.
    if _is_whole(one) and _is_whole(other):
        first, last = shared[0].start, shared[0].stop - 1
        stop = max(interval.stop for interval in one.manifest.corpus_contexts)
        raise StoreMismatchError(
            f"{one.root} and {other.root} both hold contexts {first} to {last} of the corpus; "
            f"harvest one of them again with others: --skip-contexts {stop}"
        )
    mine, theirs = (digests_of(store.tokens(), store.documents()) for store in (one, other))
    if both := len(np.intersect1d(mine, theirs)):
        raise StoreMismatchError(
            f"{one.root} and {other.root} both hold {both:,} contexts of the corpus, the same tokens of the "
            "same documents; merge parts that hold different ones"
        )


def _is_whole(store: ActivationStore) -> bool:
    """Whether the store holds all contexts of the corpus that its manifest names."""
    return sum(map(len, store.manifest.corpus_contexts)) == store.manifest.n_contexts
