"""A whole sealed store published to a server.

Files are sent as they are, several at once, each checked against the seal first; the seal comes last. Nothing
that someone else put there is ever overwritten, but for a seal whose files are all in the new one.
"""

import hashlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Lock

from ..card import MAX_CARD_BYTES, card, is_ours, read_card
from ..errors import StoreDamagedError, StoreMismatchError, StoreWriteError
from ..files import StoreFiles
from ..reader import ActivationStore
from ..seal import CARD_PATH, MAX_SEAL_BYTES, ROOT_PATH, SEAL_PATH, Seal, SealedFile, parse_seal
from ..transfer import Moved, bytes_to_move, checked_pieces, each, holds, nobody, seal_of
from .cache import default_folder
from .folder import RemoteFolder, TakesMany

_MOST_TOGETHER, _MOST_BYTES_TOGETHER = 100, 4 * 10**9
_MOST_IN_A_FOLDER = 10_000
_MOST_ON_THE_HUB = 100_000
_LARGEST_ON_THE_HUB = 50 * 10**9


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
    seal = seal_of(store)
    _check_limits(seal, folder.url)
    try:
        old = parse_seal(folder.read_small(SEAL_PATH, MAX_SEAL_BYTES))
    except FileNotFoundError:
        old = None
    if old is not None and holds(old, seal, folder.url):
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
    n_sent += len(together) + each(send, rest)
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
    seal = seal_of(store)
    sent: set[str] = set()
    for batch in batches:
        with ExitStack() as open_files:
            sources: dict[str, Path | bytes] = {}
            for path in batch:
                files = open_files.enter_context(_local(store, path))
                for _ in checked_pieces(store, path, seal.files[path], nobody, files):
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
            for _ in checked_pieces(store, path, entry, nobody, files):
                pass
            try:
                folder.write(path, files.root / path, only_new=True)
                sent = True
            except FileExistsError:
                if not _holds(folder, path, entry):
                    raise StoreMismatchError(
                        f"{folder.url}/{path} is there and is not of this store: someone else may be "
                        "publishing there; name another place, or remove it"
                    ) from None
        journal.add(path)
    moved(entry.n_bytes)
    return sent


def _holds(folder: RemoteFolder, path: str, entry: SealedFile) -> bool:
    """Whether a file there is what was sealed; reads it back."""
    digest = hashlib.sha256()
    try:
        for piece in folder.pieces(path, entry.n_bytes):
            digest.update(piece)
    except (FileNotFoundError, StoreDamagedError):
        return False
    return digest.hexdigest() == entry.sha256


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
