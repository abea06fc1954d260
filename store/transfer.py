"""A whole sealed store brought to another place: to a folder of this machine, or to a server.

Files are moved as they are, several at once, each checked against the seal: what arrives is what was sealed,
or it is not there. The seal comes last, so what was begun and not finished is no store that looks whole.
Doing it again goes on: a file that has arrived is not moved again. Nothing that someone else put there is
ever overwritten, but for a seal whose files are all in the new one: so a store grows by a layer. Costs one
pass over the bytes, and a few megabytes of memory for each file on its way.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Lock

from .cache import default_folder
from .card import MAX_CARD_BYTES, card, is_ours, read_card, write_card
from .errors import StoreDamagedError, StoreError, StoreFormatError, StoreMismatchError, StoreWriteError
from .files import PARTIAL, StoreFiles, exclusive
from .readable import ReadableFiles
from .reader import ActivationStore
from .remote import RemoteFolder, TakesMany, same
from .seal import (
    CARD_PATH,
    CORPUS_PATH,
    MAX_METADATA_BYTES,
    MAX_SEAL_BYTES,
    ROOT_PATH,
    SEAL_PATH,
    Seal,
    SealedFile,
    parse_seal,
    sha256_of,
)

FILES_AT_ONCE = 8
_MOST_TOGETHER, _MOST_BYTES_TOGETHER = 100, 4 * 10**9
_MOST_IN_A_FOLDER = 10_000
_MOST_ON_THE_HUB = 100_000
_LARGEST_ON_THE_HUB = 50 * 10**9

Moved = Callable[[int], None]
"""Told how many bytes arrived since the last call."""


def bytes_to_move(store: ActivationStore) -> int:
    """Bytes of all files of a sealed store, its seal aside."""
    return sum(entry.n_bytes for entry in _seal(store).files.values())


def copy_store(store: ActivationStore, destination: Path, moved: Moved) -> int:
    """Copy a sealed store, from wherever it lies, into a folder of this machine.

    Args:
        store: opened; its files are read anew, not from a cache.
        destination: the folder; made where it is not there.
        moved: told of the bytes, those that had arrived before too.

    Returns:
        How many files were moved this time; 0 where the copy was whole before.

    Raises:
        StoreFormatError: the folder holds something else.
        StoreMismatchError: the folder holds another store.
        StoreDamagedError: a file of the source is missing, or not what was sealed.
        StoreRemoteError: a server refused, or does not answer.
        StoreWriteError: the disk refused, or has too little room.
    """
    seal = _seal(store)
    files = StoreFiles(destination)
    files.make_root()
    with exclusive(destination):
        old = _seal_there(files, destination)
        if old is not None and _holds(old, seal, str(destination)):
            moved(bytes_to_move(store))
            _bring_card(store, files)
            return 0
        if old is None:
            _check_begun_by_the_same(store, files)
        _check_room(seal, files)

        def bring(path: str) -> bool:
            return _bring(store, files, path, seal.files[path], moved, old)

        # First the root, which says whose copy this is; the corpus, which says that tokens are there, late.
        n_moved = int(bring(ROOT_PATH))
        n_moved += _each(bring, [path for path in seal.files if path not in (ROOT_PATH, CORPUS_PATH)])
        n_moved += int(bring(CORPUS_PATH))
        files.write(SEAL_PATH, store.files.read(SEAL_PATH, MAX_SEAL_BYTES))
        _bring_card(store, files)
    return n_moved + 1


def _bring_card(store: ActivationStore, files: StoreFiles) -> None:
    """The card that the source's owner wrote, where the copy has none of its own; else posae's."""
    theirs = read_card(store.files)
    if theirs is not None and not is_ours(theirs):
        here = read_card(files)
        if here is None or is_ours(here):
            files.write(CARD_PATH, theirs)
    write_card(ActivationStore.open(files.root))


def _seal(store: ActivationStore) -> Seal:
    if store.seal is None:
        raise StoreFormatError(
            f"{store.root} is an unfinished harvest, which is not copied; run the harvest again to finish it"
        )
    return store.seal


def _seal_there(files: StoreFiles, destination: Path) -> Seal | None:
    try:
        return parse_seal(files.read(SEAL_PATH, MAX_SEAL_BYTES))
    except FileNotFoundError:
        return None
    except StoreFormatError as error:
        raise StoreFormatError(f"{destination} holds something else: {error}") from None


def _holds(old: Seal, new: Seal, place: str) -> bool:
    """Whether all of the new store is there already.

    Raises:
        StoreMismatchError: what is there is neither it, nor what it grew from.
    """
    if new.files.items() <= old.files.items():
        return True
    if not old.files.items() <= new.files.items():
        raise StoreMismatchError(
            f"{place} holds another store, sealed as {old.identity[:16]}; name another place, or remove it"
        )
    return False


def _check_begun_by_the_same(store: ActivationStore, files: StoreFiles) -> None:
    """Refuse a folder that holds anything but the beginning of this copy."""
    try:
        root = files.read(ROOT_PATH, MAX_METADATA_BYTES)
    except FileNotFoundError:
        if all(path.endswith(PARTIAL) for path in files.walk()):
            return
        raise StoreFormatError(f"{files.root} is not empty and holds no store; name another folder") from None
    if root != store.files.read(ROOT_PATH, MAX_METADATA_BYTES):
        raise StoreMismatchError(
            f"{files.root} holds the beginning of another store; name another folder, or remove it"
        )


def _check_room(seal: Seal, files: StoreFiles) -> None:
    missing = sum(entry.n_bytes for path, entry in seal.files.items() if files.size_bytes(path) is None)
    free = shutil.disk_usage(files.root).free
    if missing > free:
        raise StoreWriteError(
            f"{files.root} has room for {free:,} bytes and {missing:,} are to come; free some space, or copy "
            "a part: --layers, --fraction"
        )


def _bring(
    store: ActivationStore, files: StoreFiles, path: str, entry: SealedFile, moved: Moved, old: Seal | None
) -> bool:
    """Bring one file, unless it has arrived; whether it was brought."""
    if (old is not None and path in old.files) or _has_arrived(files, path, entry):
        moved(entry.n_bytes)
        return False
    try:
        files.write_pieces(path, _checked(store, path, entry, moved))
    except StoreDamagedError:
        # Perhaps it was changed on the way here; a second time it is the source's own damage.
        files.write_pieces(path, _checked(store, path, entry, moved))
    return True


def _has_arrived(files: StoreFiles, path: str, entry: SealedFile) -> bool:
    # Read, as someone may have changed it since.
    return files.size_bytes(path) == entry.n_bytes and sha256_of(files, path) == entry


def _checked(
    store: ActivationStore, path: str, entry: SealedFile, moved: Moved, files: ReadableFiles | None = None
) -> Iterator[bytes]:
    """The bytes of a file of the source; raises at their end unless they are those that were sealed.

    Args:
        store: the source.
        path: the file.
        entry: what the seal says of it.
        moved: told of the bytes; told to take them back where they are not the right ones.
        files: where the file is read; by default the source's own.
    """
    digest, n_bytes = hashlib.sha256(), 0
    try:
        for piece in (files or store.files).pieces(path):
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


def _nobody(_: int) -> None:
    """Told of bytes, and does nothing."""


def _each(work: Callable[[str], bool], paths: Iterable[str]) -> int:
    """Do the work for every path, several at once; how many of them were work."""
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="posae-move") as pool:
        running = [pool.submit(work, path) for path in paths]
        try:
            return sum(future.result() for future in as_completed(running))
        finally:
            for future in running:
                future.cancel()


def publish(store: ActivationStore, folder: RemoteFolder, moved: Moved) -> int:
    """Bring a sealed store to a server.

    Args:
        store: opened, on this machine or on a server.
        folder: where it is to lie.
        moved: told of the bytes, those that had arrived before too.

    Returns:
        How many files were sent this time; 0 where it was whole before.

    Raises:
        StoreMismatchError: another store is there, or someone else publishes one there.
        StoreDamagedError: a file of the source is missing, or not what was sealed.
        StoreRemoteError: a server refused, or does not answer.
    """
    seal = _seal(store)
    _check_limits(seal, folder.url)
    try:
        old = parse_seal(folder.read_small(SEAL_PATH, MAX_SEAL_BYTES))
    except FileNotFoundError:
        old = None
    if old is not None and _holds(old, seal, folder.url):
        moved(bytes_to_move(store))
        if old.identity == seal.identity:  # else it has grown since, and its card tells of more
            _send_card(store, folder)
        return 0
    journal = _Journal(seal.identity, folder.url)

    def send(path: str) -> bool:
        return _send(store, folder, path, seal.files[path], moved, old, journal)

    n_sent = int(send(ROOT_PATH))
    together: set[str] = set()
    if isinstance(folder, TakesMany):
        together = _send_together(store, folder, _batches(seal, journal, old), moved, journal)
    rest = [path for path in seal.files if path != ROOT_PATH and path not in together]
    n_sent += len(together) + _each(send, rest)
    _send_seal(store, folder, old)
    _send_card(store, folder)
    journal.remove()
    return n_sent + 1


def _batches(seal: Seal, journal: "_Journal", old: Seal | None) -> Iterator[list[str]]:
    """Files that are to be sent, as many together as one commit may well have."""
    batch: list[str] = []
    n_bytes = 0
    for path, entry in seal.files.items():
        if path == ROOT_PATH or path in journal or (old is not None and path in old.files):
            continue
        if batch and (len(batch) == _MOST_TOGETHER or n_bytes + entry.n_bytes > _MOST_BYTES_TOGETHER):
            yield batch
            batch, n_bytes = [], 0
        batch.append(path)
        n_bytes += entry.n_bytes
    if batch:
        yield batch


def _send_together(
    store: ActivationStore,
    folder: TakesMany,
    batches: Iterable[list[str]],
    moved: Moved,
    journal: "_Journal",
) -> set[str]:
    """Send files in few commits; those that were sent. Where one is there already, its batch is not."""
    seal = _seal(store)
    sent: set[str] = set()
    for batch in batches:
        with ExitStack() as open_files:
            sources: dict[str, Path | bytes] = {}
            for path in batch:
                files = open_files.enter_context(_local(store, path))
                for _ in _checked(store, path, seal.files[path], _nobody, files):
                    pass
                sources[path] = files.root / path
            try:
                folder.commit(sources, only_new=True)
            except FileExistsError:
                continue
        for path in batch:
            journal.add(path)
            sent.add(path)
            moved(seal.files[path].n_bytes)
    return sent


def _send(
    store: ActivationStore,
    folder: RemoteFolder,
    path: str,
    entry: SealedFile,
    moved: Moved,
    old: Seal | None,
    journal: "_Journal",
) -> bool:
    """Send one file, unless it is there; whether it was sent."""
    sent = False
    if not (path in journal or (old is not None and path in old.files)):
        with _local(store, path) as files:
            for _ in _checked(store, path, entry, _nobody, files):
                pass
            try:
                folder.write(path, files.root / path, only_new=True)
                sent = True
            except FileExistsError:
                if not same(folder, path, files.root / path):
                    raise StoreMismatchError(
                        f"{folder.url}/{path} is there and is not of this store: someone else may be "
                        "publishing there; name another place, or remove it"
                    ) from None
        journal.add(path)
    moved(entry.n_bytes)
    return sent


@contextmanager
def _local(store: ActivationStore, path: str) -> Generator[StoreFiles]:
    try:
        with store.files.local(path) as files:
            yield files
    except FileNotFoundError:
        raise StoreDamagedError(f"the file is missing in {store.root}", array=path) from None


def _send_seal(store: ActivationStore, folder: RemoteFolder, old: Seal | None) -> None:
    data = store.files.read(SEAL_PATH, MAX_SEAL_BYTES)
    with suppress(FileExistsError):  # whose it is, is seen below
        folder.write(SEAL_PATH, data, only_new=old is None)
    if folder.read_small(SEAL_PATH, MAX_SEAL_BYTES) != data:
        raise StoreMismatchError(
            f"someone else published another store at {folder.url} at the same time; theirs is there now: "
            "name another place"
        )


def _send_card(store: ActivationStore, folder: RemoteFolder) -> None:
    """Send the card, unless there is one that somebody edited."""
    data = read_card(store.files) or card(store).encode()
    try:
        folder.write(CARD_PATH, data, only_new=True)
    except FileExistsError:
        there = folder.read_small(CARD_PATH, MAX_CARD_BYTES)
        if there != data and is_ours(there):
            folder.write(CARD_PATH, data)


def _check_limits(seal: Seal, url: str) -> None:
    """Say before anything is sent what the place cannot take.

    Raises:
        StoreWriteError: too many files, or too large ones.
    """
    folders = Counter(path.rpartition("/")[0] for path in seal.files)
    name, most = folders.most_common(1)[0]
    problem = ""
    if most > _MOST_IN_A_FOLDER:
        problem = f"{name} would have {most:,} files, and a folder there may have {_MOST_IN_A_FOLDER:,}"
    if url.startswith("hf:"):
        if len(seal.files) > _MOST_ON_THE_HUB:
            problem = (
                f"the store has {len(seal.files):,} files, and a repository may have {_MOST_ON_THE_HUB:,}"
            )
        largest = max(entry.n_bytes for entry in seal.files.values())
        if largest > _LARGEST_ON_THE_HUB:
            problem = f"a file of {largest:,} bytes, and the Hub takes {_LARGEST_ON_THE_HUB:,}"
    if problem:
        raise StoreWriteError(
            f"{url} cannot take this store: {problem}; publish fewer --layers or --contexts"
        )


class _Journal:
    """Which files of a store this machine has sent to a place: they need not be read back to go on.

    A line for each file, in the cache; a line cut short by a kill counts for nothing.
    """

    def __init__(self, identity: str, url: str) -> None:
        """Read what an earlier process wrote."""
        place = hashlib.sha256(url.encode()).hexdigest()
        self._path = default_folder() / "published" / f"{identity[:16]}-{place[:16]}.txt"
        self._lock = Lock()
        try:
            self._sent = set(self._path.read_text().split("\n")[:-1])
        except (OSError, UnicodeDecodeError):
            self._sent = set[str]()

    def __contains__(self, path: str) -> bool:
        """Whether it was sent."""
        return path in self._sent

    def add(self, path: str) -> None:
        """Note a file that has arrived."""
        with self._lock:
            self._sent.add(path)
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as file:
                    file.write(f"{path}\n")
            except OSError:
                pass  # then it is read back the next time

    def remove(self) -> None:
        """Forget it all, at the end."""
        with self._lock:
            self._path.unlink(missing_ok=True)
