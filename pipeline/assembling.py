"""Stores made of pieces of others, with progress: what ``merge`` uses, and a part of one store copied out.

What it costs stands in ``store/assembly.py``: next to nothing where whole shards stay as they are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..store.assembly import Assembly, Piece, assembled_manifest
from ..store.codecs import CODECS
from ..store.errors import SettingsError, StoreIncompleteError
from ..store.manifest import Manifest
from ..store.reader import ActivationStore
from .progress import Progress, Silent


class Assembled(NamedTuple):
    """What making a store of pieces left."""

    store: ActivationStore
    n_tokens: int
    """Tokens that were written this time; 0 if all was there."""


def assemble(
    path: Path,
    pieces: Sequence[Piece],
    layers: Sequence[int],
    task: str,
    *,
    codec: str | None = None,
    progress: Progress | None = None,
) -> Assembled:
    """Make what is missing of a store of ``pieces``, and seal it.

    Args:
        path: folder of the new store.
        pieces: of sealed stores, in their order along axis 0; those of training parts first.
        layers: layers to take.
        task: what is being done, in a word, for whoever watches.
        codec: of the new store; by default that of the first piece's store.
        progress: told what is done.

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
            raise SettingsError(f"{path} is a store to take from; name another folder for the new one")
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
    """Copy some layers, some contexts, or into another codec; run again, it goes on where it stopped.

    Contexts that are held out stay so. A part without any names none, and training then leaves out its last
    5 %, as of any such store.

    Args:
        source: a sealed store; it is not changed.
        destination: folder of the new store.
        layers: by default all of the store.
        contexts: [start, stop) along axis 0; by default all.
        codec: ``small``, ``fast`` or ``raw``; by default that of the store.
        progress: told what is done.

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
            f"contexts {start}:{stop}: {source.root} has 0:{source.manifest.n_contexts}; name some of these"
        )
    if codec is not None and codec not in CODECS:
        raise SettingsError(f"there is no codec {codec!r}; there are {', '.join(CODECS)}")
    chosen = source.layers if layers is None else tuple(sorted(set(layers)))
    if not chosen:
        raise StoreIncompleteError(f"{source.root} holds no layer, so there is nothing to copy")
    return assemble(
        destination, [Piece(source, start, stop)], chosen, "copying", codec=codec, progress=progress
    )


def first_part(manifest: Manifest, fraction: float) -> tuple[int, int]:
    """The contexts of the first part of a store, in whole shards: the nearest number, at least one.

    Whole shards are copied as they are; contexts are in random order, so that the first are as good as any.

    Raises:
        SettingsError: no fraction.
    """
    if not 0 < fraction <= 1:
        raise SettingsError(f"fraction {fraction:g}: take one above 0, up to 1")
    n_shards = max(1, round(fraction * manifest.n_shards))
    return 0, min(n_shards * manifest.shard_contexts, manifest.n_contexts)
