"""Copying a store, or a part of it, to a folder or a server.

A whole store is copied file by file. A part is first made in a local folder, from whole shards where
possible; for a server that folder is in ``staging``, beside the cache of parts, and is removed after the
upload or a refusal; after an error of the server it stays.
"""

import hashlib
import shutil
from pathlib import Path
from typing import NamedTuple

from ...store.errors import SettingsError, StoreError, StoreIncompleteError, StoreRemoteError
from ...store.reader import ActivationStore
from ...store.remote.cache import default_folder
from ...store.remote.folder import RemoteFolder, refuse_half_url, shown
from ...store.remote.servers import open_remote
from ..progress import Progress, Silent
from ..settings import CopySettings
from .assembling import copy_part, first_part
from .copying import bytes_to_move, copy_store
from .publishing import publish


class Copied(NamedTuple):
    """The result of a copy."""

    store: ActivationStore
    """The copy; for a server, the store that was sent."""

    place: str
    """Its address without credentials."""

    was_there: bool
    """Whether the copy was complete before."""

    n_bytes: int
    """Size of its layers."""


def copy(
    source: ActivationStore, destination: str, settings: CopySettings, progress: Progress | None = None
) -> Copied:
    """Copy the part that ``settings`` select; run again, it resumes.

    Args:
        source: a sealed store, opened from a folder or a server.
        destination: a folder, or a URL.
        settings: select the part.
        progress: receives the progress.

    Raises:
        SettingsError: a part that the store does not have, or a copy onto itself.
        StoreIncompleteError: the source is an unfinished harvest.
        StoreMismatchError: another store is there.
        StoreDamagedError: the source is not what was sealed.
        StoreRemoteError: a server refused, or does not answer.
        StoreWriteError: the disk or the server refused.
    """
    progress = progress or Silent()
    if source.identity is None:
        raise StoreIncompleteError(
            f"{source.root} is an unfinished harvest and cannot be copied; run the harvest again to finish it"
        )
    refuse_half_url(destination)
    is_remote = "://" in destination
    if is_remote and destination.lower().startswith(("http://", "https://")):
        raise SettingsError(
            f"{shown(destination)} cannot be written: web servers are read-only; give a folder, hf://, "
            "s3://, gs:// or az://"
        )
    server = open_remote(destination) if is_remote else None
    place = shown(destination) if is_remote else str(Path(destination).absolute())
    if place == source.address:
        raise SettingsError(f"{destination} is the store to copy from; choose another destination")
    if not _is_part(source, settings):
        if server:
            return _published(source, server, progress)
        return _moved(source, Path(destination), progress)
    if not server:
        return _copied(*_part(source, Path(destination), settings, progress))
    # One per destination: the first of two copies to finish removes it.
    words = f"{source.identity} {settings.model_dump_json()} {place}"
    folder = default_folder() / "staging" / hashlib.sha256(words.encode()).hexdigest()[:16]
    part, _, _ = _part(source, folder, settings, progress)
    try:
        copied = _published(part, server, progress)
    except StoreRemoteError as error:  # which may pass
        raise StoreRemoteError(
            f"{error}; the part to send waits in {folder}: run the same command again, or remove it"
        ) from None
    except StoreError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return copied


def _is_part(source: ActivationStore, settings: CopySettings) -> bool:
    """Whether ``settings`` select anything but the whole, unchanged store."""
    layers = set(source.layers if settings.layers is None else settings.layers)
    codec = settings.codec or source.manifest.codec
    return (
        layers != set(source.layers)
        or codec != source.manifest.codec
        or _contexts(source, settings) not in (None, (0, source.n_contexts))
    )


def _contexts(source: ActivationStore, settings: CopySettings) -> tuple[int, int] | None:
    if settings.fraction is not None:
        return first_part(source.manifest, settings.fraction)
    if settings.contexts is None:
        return None
    start, stop = map(int, settings.contexts.split(":"))
    if not start < stop <= source.n_contexts:
        raise SettingsError(
            f"contexts {settings.contexts}: {source.root} has 0:{source.n_contexts}; choose a part of them"
        )
    return start, stop


def _part(
    source: ActivationStore, folder: Path, settings: CopySettings, progress: Progress
) -> tuple[ActivationStore, str, bool]:
    made = copy_part(
        source,
        folder,
        layers=settings.layers,
        contexts=_contexts(source, settings),
        codec=settings.codec,
        progress=progress,
    )
    return made.store, str(folder), not made.n_tokens


def _moved(source: ActivationStore, folder: Path, progress: Progress) -> Copied:
    progress.begin("copying", bytes_to_move(source), "bytes")
    n_files = copy_store(source, folder, progress.advance)
    progress.end()
    return _copied(ActivationStore.open(folder), str(folder), not n_files)


def _published(source: ActivationStore, folder: RemoteFolder, progress: Progress) -> Copied:
    progress.begin("sending", bytes_to_move(source), "bytes")
    n_files = publish(source, folder, progress.advance)
    progress.end()
    return _copied(source, folder.url, not n_files)


def _copied(store: ActivationStore, place: str, was_there: bool) -> Copied:
    return Copied(store, place, was_there, sum(map(store.stored_bytes, store.layers)))
