"""Publishing a whole sealed store to a server.

Only the server's current listing is trusted: a file that is missing, or differs in size or digest from the
seal, is written; the listing is then read again, and the seal is written last. Files of others are never
overwritten, except a seal whose files are all in the new one.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ...store.card import MAX_CARD_BYTES, card, is_ours, read_card
from ...store.errors import (
    StoreDamagedError,
    StoreFormatError,
    StoreMismatchError,
    StoreRemoteError,
    StoreWriteError,
)
from ...store.files import StoreFiles
from ...store.reader import ActivationStore
from ...store.remote.folder import ListedFile, RemoteFolder, TakesMany
from ...store.seal import CARD_PATH, MAX_SEAL_BYTES, ROOT_PATH, SEAL_PATH, Seal, SealedFile, parse_seal
from .copying import Moved, checked_pieces, each, holds, nobody, seal_of

_MOST_TOGETHER, _MOST_BYTES_TOGETHER = 100, 4 * 10**9
_MOST_IN_A_FOLDER = 10_000
_MOST_ON_THE_HUB = 100_000
_LARGEST_ON_THE_HUB = 50 * 10**9


def publish(store: ActivationStore, folder: RemoteFolder, moved: Moved) -> int:
    """Publish a sealed store to a server.

    Args:
        store: opened, local or on a server.
        folder: the destination.
        moved: called with numbers of bytes, including those of earlier attempts.

    Returns:
        Number of files written this time; 0 if the store was complete before.

    Raises:
        StoreFormatError: the folder holds something else.
        StoreMismatchError: another store is there, or someone else publishes one there.
        StoreDamagedError: a file of the source is missing, or not what was sealed.
        StoreRemoteError: a server refused, or does not answer.
        StoreWriteError: the place cannot take so many or so large files.
    """
    seal = seal_of(store)
    _check_limits(seal, folder.url)
    try:
        old = parse_seal(folder.read_small(SEAL_PATH, MAX_SEAL_BYTES))
    except FileNotFoundError:
        old = None
    was_sealed = old is not None and holds(old, seal, folder.url)
    listed = _listed(folder)
    if old is None:
        _check_not_foreign(seal, listed, folder.url)

    sealed = listed.keys() & (old.files.keys() if old else set())
    rest = [path for path in seal.files if path not in sealed]
    for path in seal.files.keys() & sealed:
        _check_listed(folder, path, listed[path], seal.files[path])
        moved(seal.files[path].n_bytes)

    def send(paths: list[str]) -> int:
        return _send(store, folder, paths, listed, moved)

    # First the root, which says whose store this is.
    n_sent = send([ROOT_PATH]) if ROOT_PATH in rest else 0
    rest = [path for path in rest if path != ROOT_PATH]
    if isinstance(folder, TakesMany):
        n_sent += sum(send(batch) for batch in _batches(seal, rest))
    else:
        n_sent += each(lambda path: bool(send([path])), rest)
    if rest:
        _check_arrived(seal, folder)
    if not was_sealed:
        _send_seal(store, folder, old)
        n_sent += 1
    if not was_sealed or (old and old.identity == seal.identity):  # else it has grown, and its card has more
        _send_card(store, folder)
    return n_sent


def _listed(folder: RemoteFolder) -> dict[str, ListedFile]:
    return folder.list_files() or {}


def _check_not_foreign(seal: Seal, listed: Mapping[str, object], url: str) -> None:
    """Refuse a folder with other contents, except for the initial files of a hub dataset."""
    foreign = listed.keys() - seal.files.keys() - {CARD_PATH, ".gitattributes"}
    if foreign and ROOT_PATH not in listed:
        raise StoreFormatError(
            f"{url} is not empty and holds no store but {min(foreign)!r}; name another folder"
        )


def _check_listed(folder: RemoteFolder, path: str, listed: ListedFile, entry: SealedFile) -> None:
    """Refuse a file whose listing contradicts the seal."""
    is_sha256 = len(listed.digest or "") == 64
    if listed.n_bytes != entry.n_bytes or (is_sha256 and listed.digest != entry.sha256):
        raise _not_ours(folder, path)


def _not_ours(folder: RemoteFolder, path: str) -> StoreMismatchError:
    return StoreMismatchError(
        f"{folder.url}/{path} exists and is not of this store: someone else may be publishing there; choose "
        "another place, or remove it"
    )


def _batches(seal: Seal, paths: Iterable[str]) -> Iterator[list[str]]:
    """Files to send, in groups of a commit's size."""
    batch: list[str] = []
    n_bytes = 0
    for path in paths:
        size = seal.files[path].n_bytes
        if batch and (len(batch) == _MOST_TOGETHER or n_bytes + size > _MOST_BYTES_TOGETHER):
            yield batch
            batch, n_bytes = [], 0
        batch.append(path)
        n_bytes += size
    if batch:
        yield batch


def _send(
    store: ActivationStore,
    folder: RemoteFolder,
    paths: list[str],
    listed: Mapping[str, ListedFile],
    moved: Moved,
) -> int:
    """Send files, together if several, unless they are there; return how many were sent."""
    seal = seal_of(store)
    missing: dict[str, Path | bytes] = {}
    with ExitStack() as open_files:
        for path in paths:
            source = open_files.enter_context(_checked(store, path, seal.files[path]))
            if path not in listed:
                missing[path] = source
                continue
            _check_listed(folder, path, listed[path], seal.files[path])
            if listed[path].digest not in folder.digests(source):
                _check_read_back(folder, path, seal.files[path])
        try:
            if isinstance(folder, TakesMany) and missing:
                folder.commit(missing, only_new=True)
            elif missing:
                folder.write(paths[0], missing[paths[0]], only_new=True)
        except FileExistsError:
            # Written since the listing, by an attempt whose answer was lost or by someone else.
            now = _listed(folder)
            if not missing.keys() & now.keys():
                raise StoreRemoteError(f"{folder.url} does not list its files; try again later") from None
            return _send(store, folder, paths, now, moved)
    for path in paths:
        moved(seal.files[path].n_bytes)
    return len(missing)


@contextmanager
def _checked(store: ActivationStore, path: str, entry: SealedFile) -> Generator[Path]:
    """A file of the source on this machine, the one that was sealed."""
    pieces = checked_pieces(store, path, entry, nobody)
    try:
        if isinstance(store.files, StoreFiles):
            for _ in pieces:
                pass
            yield store.files.root / path
        else:
            with tempfile.TemporaryDirectory(prefix="posae-") as folder:
                files = StoreFiles(Path(folder))
                files.write_pieces(path, pieces)
                yield files.root / path
    except FileNotFoundError:
        raise StoreDamagedError(f"the file is missing in {store.root}", array=path) from None


def _check_read_back(folder: RemoteFolder, path: str, entry: SealedFile) -> None:
    digest = hashlib.sha256()
    try:
        for piece in folder.pieces(path, entry.n_bytes):
            digest.update(piece)
    except FileNotFoundError:
        raise _gone(folder, path) from None
    if digest.hexdigest() != entry.sha256:
        raise _not_ours(folder, path)


def _check_arrived(seal: Seal, folder: RemoteFolder) -> None:
    listed = _listed(folder)
    for path, entry in seal.files.items():
        if path not in listed:
            raise _gone(folder, path)
        _check_listed(folder, path, listed[path], entry)


def _gone(folder: RemoteFolder, path: str) -> StoreRemoteError:
    return StoreRemoteError(f"{folder.url}/{path} was written and is missing now; run the same command again")


def _send_seal(store: ActivationStore, folder: RemoteFolder, old: Seal | None) -> None:
    data = store.files.read(SEAL_PATH, MAX_SEAL_BYTES)
    with suppress(FileExistsError):  # whose it is, is seen below
        folder.write(SEAL_PATH, data, only_new=old is None)
    try:
        present = folder.read_small(SEAL_PATH, MAX_SEAL_BYTES)
    except FileNotFoundError:
        raise _gone(folder, SEAL_PATH) from None
    if present != data:
        raise StoreMismatchError(
            f"someone else published another store at {folder.url} at the same time; choose another place"
        )


def _send_card(store: ActivationStore, folder: RemoteFolder) -> None:
    """Send the card, unless there is an edited one."""
    data = read_card(store.files) or card(store).encode()
    try:
        folder.write(CARD_PATH, data, only_new=True)
    except FileExistsError:
        present = folder.read_small(CARD_PATH, MAX_CARD_BYTES)
        if present != data and is_ours(present):
            folder.write(CARD_PATH, data)


def _check_limits(seal: Seal, url: str) -> None:
    """Refuse before anything is sent what the hub cannot take.

    Raises:
        StoreWriteError: too many files, or too large ones.
    """
    if not url.startswith("hf:"):
        return
    folders = Counter(path.rpartition("/")[0] for path in seal.files)
    name, most = folders.most_common(1)[0]
    largest = max(entry.n_bytes for entry in seal.files.values())
    problem = ""
    if most > _MOST_IN_A_FOLDER:
        problem = f"{name} would have {most:,} files, and a folder there may have {_MOST_IN_A_FOLDER:,}"
    elif len(seal.files) > _MOST_ON_THE_HUB:
        problem = f"the store has {len(seal.files):,} files, and a repository may have {_MOST_ON_THE_HUB:,}"
    elif largest > _LARGEST_ON_THE_HUB:
        problem = f"a file of {largest:,} bytes, and the Hub takes {_LARGEST_ON_THE_HUB:,}"
    if problem:
        raise StoreWriteError(
            f"{url} cannot take this store: {problem}; publish fewer --layers or --contexts"
        )
