"""Copying a whole sealed store into a local folder, from a folder or a server.

Files are copied unchanged, several at once, and each is checked against the seal before it gets its name. The
root is written last except for the seal, so an unfinished copy is not a store; a record of the source lets
the same copy resume, and every other writer refuses the folder. Nothing else is overwritten, except a seal
whose files are all in the new one: so a store gains a layer. Takes one pass over the bytes, and a few
megabytes of memory per file in transfer.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from ...store.card import is_ours, read_card, write_card
from ...store.errors import (
    StoreDamagedError,
    StoreError,
    StoreFormatError,
    StoreMismatchError,
    StoreWriteError,
)
from ...store.files import StoreFiles, exclusive, is_leftover, unlocked
from ...store.reader import ActivationStore
from ...store.seal import (
    CARD_PATH,
    COPY_PATH,
    MAX_METADATA_BYTES,
    MAX_SEAL_BYTES,
    ROOT_PATH,
    SEAL_PATH,
    Seal,
    SealedFile,
    parse_seal,
    sha256_of,
)
from ...store.writer import files_of

FILES_AT_ONCE = 8

Moved = Callable[[int], None]
"""Called with the number of bytes that arrived since the last call."""


def bytes_to_move(store: ActivationStore) -> int:
    """Bytes of all files of a sealed store, its seal aside."""
    return sum(entry.n_bytes for entry in store.seal.files.values()) if store.seal else 0


def copy_store(store: ActivationStore, destination: Path, moved: Moved) -> int:
    """Copy a sealed store into a local folder.

    Args:
        store: opened; its files are read from the source, not from a cache.
        destination: the folder; created if missing.
        moved: called with numbers of bytes, including those of earlier attempts.

    Returns:
        Number of files copied this time; 0 if the copy was complete before.

    Raises:
        StoreFormatError: the folder holds something else.
        StoreMismatchError: the folder holds another store.
        StoreDamagedError: a file of the source is missing, or not what was sealed.
        StoreRemoteError: a server refused, or does not answer.
        StoreWriteError: the disk refused, or has too little room.
    """
    seal = seal_of(store)
    files = StoreFiles(destination)
    with unlocked(destination):
        _begun(seal, files)
    files.make_root()
    with exclusive(destination):
        old, is_begun = _begun(seal, files)
        if old is not None and holds(old, seal, str(destination)):
            moved(bytes_to_move(store))
            _end(store, files)
            return 0
        _check_room(seal, files)
        if not is_begun:
            files.write(COPY_PATH, seal.identity.encode())

        def bring(path: str) -> bool:
            return _bring(store, files, path, seal.files[path], moved, old)

        n_moved = each(bring, [path for path in seal.files if path != ROOT_PATH])
        # Without its root a folder is no store, so no other writer takes these files for its own.
        n_moved += int(bring(ROOT_PATH))
        files.write(SEAL_PATH, store.files.read(SEAL_PATH, MAX_SEAL_BYTES))
        _end(store, files)
    return n_moved + 1


def _end(store: ActivationStore, files: StoreFiles) -> None:
    """Write the card of the source's owner if the copy has none, else posae's."""
    files.remove("", lambda name: name == COPY_PATH)
    theirs = read_card(store.files)
    if theirs is not None and not is_ours(theirs):
        here = read_card(files)
        if here is None or is_ours(here):
            files.write(CARD_PATH, theirs)
    write_card(ActivationStore.open(files.root))


def seal_of(store: ActivationStore) -> Seal:
    """The seal of a store that is to be moved.

    Raises:
        StoreFormatError: the store is not sealed.
        StoreDamagedError: the seal names other files than such a store has.
    """
    if store.seal is None:
        raise StoreFormatError(
            f"{store.root} is an unfinished harvest and cannot be copied; run the harvest again to finish it"
        )
    # A hostile seal could name other files in the folder.
    if others := store.seal.files.keys() ^ set(files_of(store.manifest, store.layers)):
        raise StoreDamagedError(f"it names {min(others)} wrongly, or lacks it", array=SEAL_PATH)
    return store.seal


def _seal_there(files: StoreFiles, destination: Path) -> Seal | None:
    try:
        return parse_seal(files.read(SEAL_PATH, MAX_SEAL_BYTES))
    except FileNotFoundError:
        return None
    except StoreFormatError as error:
        raise StoreFormatError(f"{destination} holds something else: {error}") from None


def holds(old: Seal, new: Seal, place: str) -> bool:
    """Whether the new store is complete already.

    Raises:
        StoreMismatchError: there is another store, and not an earlier state of this one.
    """
    if new.files.items() <= old.files.items():
        return True
    if not old.files.items() <= new.files.items():
        raise StoreMismatchError(
            f"{place} holds another store, sealed as {old.identity[:16]}; choose another place, or remove it"
        )
    return False


def _begun(seal: Seal, files: StoreFiles) -> tuple[Seal | None, bool]:
    """The seal in the folder, and whether this copy was begun there; refuses anything else.

    Raises:
        StoreFormatError: the folder holds something else.
        StoreMismatchError: another store, or a copy of another one.
    """
    old = _seal_there(files, files.root)
    if old is not None and holds(old, seal, str(files.root)):
        return old, True
    try:
        source = files.read(COPY_PATH, MAX_METADATA_BYTES).decode(errors="replace")
    except FileNotFoundError:
        # Beside a sealed store only files that would be replaced are in the way.
        new = [path for path in seal.files if path not in old.files and files.exists(path)] if old else ()
        if other := next((path for path in (new if old else files.walk()) if not is_leftover(path)), None):
            raise StoreFormatError(
                f"{files.root} holds {other}, which this copy did not write; finish what was begun there, "
                "remove it, or choose another folder"
            ) from None
        return old, False
    if source != seal.identity:
        raise StoreMismatchError(
            f"{files.root} holds an unfinished copy of another store; finish that copy, or choose another "
            "folder"
        )
    return old, True


def _check_room(seal: Seal, files: StoreFiles) -> None:
    missing = sum(entry.n_bytes for path, entry in seal.files.items() if files.size_bytes(path) is None)
    free = shutil.disk_usage(files.root).free
    if missing > free:
        raise StoreWriteError(
            f"the copy needs {missing:,} bytes, but {files.root} has {free:,} free; free some space, or copy "
            "a part: --layers, --fraction"
        )


def _bring(
    store: ActivationStore, files: StoreFiles, path: str, entry: SealedFile, moved: Moved, old: Seal | None
) -> bool:
    """Copy one file unless it is there; return whether it was copied."""
    if (old is not None and path in old.files) or _has_arrived(files, path, entry):
        moved(entry.n_bytes)
        return False
    try:
        files.write_pieces(path, checked_pieces(store, path, entry, moved))
    except StoreDamagedError:
        # It may have been damaged in transfer; after a second time the source itself is damaged.
        files.write_pieces(path, checked_pieces(store, path, entry, moved))
    return True


def _has_arrived(files: StoreFiles, path: str, entry: SealedFile) -> bool:
    # Read, as someone may have changed it since.
    return files.size_bytes(path) == entry.n_bytes and sha256_of(files, path) == entry


def checked_pieces(store: ActivationStore, path: str, entry: SealedFile, moved: Moved) -> Iterator[bytes]:
    """The bytes of a file of the source; raises at the end unless they match the seal.

    Args:
        store: the source.
        path: the file.
        entry: its entry in the seal.
        moved: called with numbers of bytes, and with a negative one if they were wrong.
    """
    digest, n_bytes = hashlib.sha256(), 0
    try:
        for piece in store.files.pieces(path):
            digest.update(piece)
            if n_bytes + len(piece) > entry.n_bytes:
                break
            yield piece
            n_bytes += len(piece)
            moved(len(piece))
    except FileNotFoundError:
        moved(-n_bytes)
        raise StoreDamagedError(f"the file is missing in {store.root}", array=path) from None
    except StoreError:
        moved(-n_bytes)
        raise
    if (n_bytes, digest.hexdigest()) != entry:
        moved(-n_bytes)
        raise StoreDamagedError(f"its bytes in {store.root} are not those that were sealed", array=path)


def nobody(_: int) -> None:
    """Ignore the number of bytes."""


def each(work: Callable[[str], bool], paths: Iterable[str]) -> int:
    """Do the work for every path, several at once; return how many needed it."""
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="posae-move") as pool:
        running = [pool.submit(work, path) for path in paths]
        try:
            return sum(future.result() for future in as_completed(running))
        finally:
            for future in running:
                future.cancel()
