"""Locating a store and reading its seal, before any of it is trusted."""

import json
from pathlib import Path
from typing import Any

from .errors import StoreDamagedError, StoreFormatError, StoreIncompleteError, StoreNotFoundError
from .files import StoreFiles
from .manifest import layer_spec, parse_manifest, token_specs
from .readable import ReadableFiles
from .remote.cache import PartCache
from .remote.files import RemoteFiles
from .remote.folder import refuse_half_url
from .remote.servers import open_remote
from .seal import (
    COPY_PATH,
    MAX_METADATA_BYTES,
    MAX_SEAL_BYTES,
    ROOT_PATH,
    SEAL_PATH,
    Seal,
    parse_json,
    parse_seal,
)
from .stats import stats_specs

_FEW_FILES = 10_000


def is_store(folder: Path) -> bool:
    """Whether a local folder holds a store, or a group of one; nothing is checked."""
    try:
        root: Any = json.loads((folder / ROOT_PATH).read_bytes())
        return "posae" in root["attributes"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return False


def files_at(place: str | Path, cache: PartCache | None) -> ReadableFiles:
    """The files of the store at a folder or URL.

    Raises:
        SettingsError: a URL of another kind, or one that lacks a slash.
        StoreNotFoundError: the server has no store there.
        StoreIncompleteError: the store is on a server and not sealed.
        StoreRemoteError: the server refused, or does not answer.
    """
    if "://" in str(place):  # no folder is named like this, whatever the scheme
        return RemoteFiles(open_remote(str(place)), cache or PartCache())
    refuse_half_url(place)
    return StoreFiles(Path(place))


def seal_of(files: ReadableFiles) -> Seal | None:
    """The seal of a store; None if it is unfinished.

    Raises:
        StoreNotFoundError: there is no store.
        StoreFormatError: something else is there, or a store of a newer format.
        StoreDamagedError: the store cannot have this seal.
    """
    if isinstance(files, RemoteFiles):
        _refuse_endless(files, files.read(SEAL_PATH, MAX_SEAL_BYTES))
        return files.seal
    root = Path(files.root)
    try:
        if files.exists(SEAL_PATH):
            data = files.read(SEAL_PATH, MAX_SEAL_BYTES)
        elif files.exists(ROOT_PATH):
            return None
        elif next(root.iterdir(), None) is None:
            raise FileNotFoundError
        elif files.exists(COPY_PATH):
            raise StoreIncompleteError(
                f"{root} holds an unfinished copy; run the same posae copy again to finish it"
            )
        else:
            raise StoreFormatError(
                f"{root} is not a store: it has no zarr.json; give the folder that posae harvest wrote"
            )
    except FileNotFoundError:
        raise StoreNotFoundError(
            f"there is no store at {root}; make one with: posae harvest {root}"
        ) from None
    except NotADirectoryError:
        raise StoreFormatError(f"{root} is a file, but a store is a folder") from None
    except OSError as error:
        raise StoreFormatError(f"{root} cannot be read: {error.strerror}") from None
    _refuse_endless(files, data)
    return parse_seal(data)


def _refuse_endless(files: ReadableFiles, data: bytes) -> None:
    """Refuse a seal that names more files than its store can have, before parsing it."""
    n_files = data.count(b"{") - 2  # no path in a store has a brace
    if n_files <= _FEW_FILES:
        return
    try:
        manifest = parse_manifest(parse_json(files.read(ROOT_PATH, MAX_METADATA_BYTES), ROOT_PATH))
    except FileNotFoundError:
        raise StoreDamagedError("the file is missing", array=ROOT_PATH) from None
    beside = token_specs(manifest).values()
    of_a_layer = [layer_spec(manifest, 0), *stats_specs(manifest, 0).values()]
    most = 2 + sum(1 + spec.n_shards for spec in beside)
    most += manifest.model_layers * (1 + sum(1 + spec.n_shards for spec in of_a_layer))
    if n_files > most:
        problem = f"it names {n_files:,} files, but a store of this manifest has at most {most:,}"
        raise StoreDamagedError(problem, array=SEAL_PATH)
