"""Files below one folder: opened without following links, written so that a kill leaves no half.

Each folder below the root is opened relative to the one before with ``O_NOFOLLOW``, to read and to
write, and only regular files are read: a link, pipe or device in a store from a stranger is an error,
never a detour or a hang. Writing goes to a temporary name in the same folder, is synced, renamed and the
folder synced (about 1 ms a file on a local disk): after that the file is there for good, before it is
not there.
"""

import errno
import fcntl
import logging
import mmap
import os
import stat
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import StoreDamagedError, StoreError, StoreReadError, StoreWriteError
from .readable import MappedFile, UnmappedFile

PARTIAL = ".partial"
"""Ending of a file being written; such a file is never part of a store."""

LOCK_PATH = ".lock"
_SILENT_SECONDS = 1.0
_PIECE_BYTES = 2**22
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 256, 4096  # on Linux, with the slash and the NUL
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_log = logging.getLogger(__name__)


def partial_name(path: str) -> str:
    """The temporary name, in its own folder, of the file at ``path``.

    >>> partial_name("layer_5/c.0.0.0")
    '.c.0.0.0.partial'
    """
    return f".{path.rpartition('/')[2]}{PARTIAL}"


def is_leftover(path: str) -> bool:
    """Whether a file is no part of any store or run: a lock, or what a kill left half-written.

    >>> is_leftover(".lock"), is_leftover("layer_5/.c.0.0.0.partial"), is_leftover("zarr.json")
    (True, True, False)
    """
    return path == LOCK_PATH or path.endswith(PARTIAL)


class StoreFiles:
    """The files below ``root``, named by relative paths with ``/``."""

    has_latency = False

    def __init__(self, root: Path) -> None:
        """Name the folder; nothing is opened yet."""
        self.root = root

    @contextmanager
    def folder_of(self, path: str, *, make: bool = False) -> Generator[int]:
        """A descriptor of the folder that ``path`` lies in; no link below the root is followed.

        Args:
            path: a file below the root.
            make: make the folders that are missing.

        Raises:
            OSError: a folder is missing, or something else stands in its place.
        """
        handle = _descend(os.open(self.root, _FOLDER), path, make=make)
        try:
            yield handle
        finally:
            os.close(handle)

    def open(self, path: str) -> int:
        """A read-only file descriptor of a regular file.

        Raises:
            FileNotFoundError: no such file.
            StoreDamagedError: a link, pipe, device or folder stands there.
            StoreReadError: the disk could not read it, or this user may not.
        """
        name = path.rpartition("/")[2]
        # O_NONBLOCK: opening a pipe returns at once and is refused below.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            folder = _descend(os.open(self.root, _FOLDER), path)
            try:
                file = os.open(name, flags, dir_fd=folder)
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno == errno.ELOOP:
                problem = f"in {self.root} it is a link, and links are not followed"
                remedy = "get the files: hf download --local-dir FOLDER, or posae copy hf://… FOLDER"
                raise StoreDamagedError(problem, array=path, remedy=remedy) from None
            if error.errno in (errno.ENOTDIR, errno.ENXIO):
                raise StoreDamagedError("not a regular file (a link, pipe or device)", array=path) from None
            if error.errno in (errno.ENOENT, errno.EMFILE, errno.ENFILE):
                raise
            raise StoreReadError(self.root / path, error) from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise StoreDamagedError("not a regular file (a link, pipe or device)", array=path)
        return file

    def read(self, path: str, limit_bytes: int) -> bytes:
        """The bytes of a small file.

        Raises:
            FileNotFoundError: no such file.
            StoreDamagedError: not a regular file, or longer than ``limit_bytes``.
        """
        with os.fdopen(self.open(path), "rb") as file:
            too_large = os.fstat(file.fileno()).st_size > limit_bytes
            data = b"" if too_large else file.read(limit_bytes + 1)
        if too_large or len(data) > limit_bytes:
            raise StoreDamagedError(f"larger than the {limit_bytes:,} bytes allowed here", array=path)
        return data

    def pieces(self, path: str, start: int = 0) -> Iterator[bytes]:
        """The bytes of a file from ``start`` on, a few megabytes at a time; see ``ReadableFiles``."""
        with open(self.open(path), "rb", buffering=0) as file:  # noqa: PTH123 (a descriptor)
            file.seek(start)
            while piece := file.read(_PIECE_BYTES):
                yield piece

    def map(self, path: str) -> MappedFile | UnmappedFile:
        """The whole of a file as read-only memory, if its file system can do that; see ``ReadableFiles``."""
        file = self.open(path)
        try:
            if os.fstat(file).st_size == 0:
                raise StoreDamagedError("the file is empty", array=path)
            return MappedFile(mmap.mmap(file, 0, access=mmap.ACCESS_READ))
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.EINVAL):
                raise
            return UnmappedFile(os.dup(file))
        finally:
            os.close(file)

    def link(self, path: str, folder: int, name: str) -> bool:
        """Give a file one more name, ``name`` in the folder with the descriptor ``folder``.

        Returns:
            Whether it has that name now: another file system, or a file of somebody else, may refuse.

        Raises:
            FileNotFoundError: no such file.
            StoreDamagedError: not a regular file.
        """
        file = self.open(path)
        try:
            os.fsync(file)  # whoever put it here may not have
            with self.folder_of(path) as own:
                own_name = path.rpartition("/")[2]
                os.link(own_name, name, src_dir_fd=own, dst_dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False
        finally:
            os.close(file)
        return True

    def size_bytes(self, path: str) -> int | None:
        """The size of a regular file, or None where there is no such file."""
        try:
            file = self.open(path)
        except FileNotFoundError:
            return None
        try:
            return os.fstat(file).st_size
        finally:
            os.close(file)

    def exists(self, path: str) -> bool:
        """Whether something stands at ``path``; links are not followed.

        Raises:
            StoreReadError: the disk could not say.
        """
        try:
            (self.root / path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise StoreReadError(self.root / path, error) from None
        return True

    def is_there(self) -> bool:
        """Whether the root itself is there: a disk may vanish while it is read."""
        return self.root.exists()

    def walk(self) -> Iterator[str]:
        """Every file, link or device below the root, sorted; folders that are links are not entered.

        Nor is a folder so deep that no path leads to what is in it; it is listed itself.
        """
        # Not os.walk, which recurses and so gives up at folders a thousand deep.
        waiting = [""]
        while waiting:
            base = waiting.pop()
            if len(os.fsencode(self.root / base)) + _MAX_NAME_BYTES >= _MAX_PATH_BYTES:
                yield base.rstrip("/")
                continue
            try:
                entries = sorted(os.scandir(self.root / base), key=lambda entry: entry.name)
            except OSError:
                if base:
                    yield base.rstrip("/")
                continue
            folders = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
            yield from (base + entry.name for entry in entries if entry.name not in folders)
            waiting += [f"{base}{name}/" for name in sorted(folders, reverse=True)]

    def names(self, folder: str) -> set[str]:
        """What stands in one folder; nothing, where there is no such folder."""
        try:
            with self.folder_of(f"{folder}/" if folder else "") as handle:
                return set(os.listdir(handle))  # noqa: PTH208 (a descriptor)
        except OSError:
            return set()

    def make_root(self) -> None:
        """Make the root, where it is not there; ``write`` never does, as it may have been moved away.

        Raises:
            StoreWriteError: the disk refused.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)

    def write(self, path: str, data: bytes) -> None:
        """Put ``data`` at ``path``, durably, in place of what may be there; one writer at a time.

        Raises:
            StoreWriteError: the disk refused, or a link or file stands where a folder should be.
        """
        self.write_pieces(path, (data,))

    def write_pieces(self, path: str, pieces: Iterable[bytes]) -> None:
        """Put what the pieces are together at ``path``, as ``write`` does; nothing, if one of them raises.

        The temporary name is always the same, so doing it again after a kill leaves nothing over.

        Raises:
            StoreWriteError: the disk refused, or a link or file stands where a folder should be.
        """
        name, partial = path.rpartition("/")[2], partial_name(path)
        with writing(self.root / path), self.folder_of(path, make=True) as folder:
            with suppress(FileNotFoundError):
                os.unlink(partial, dir_fd=folder)
            try:
                # O_EXCL: never through a link that stands there.
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                with os.fdopen(os.open(partial, flags, 0o666, dir_fd=folder), "wb") as file:
                    for piece in pieces:
                        file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(OSError):
                    os.unlink(partial, dir_fd=folder)
                raise
            sync_folder(folder)

    def remove(self, folder: str, unwanted: Callable[[str], bool]) -> None:
        """Remove the files in one folder (``""``: the root) whose name is ``unwanted``.

        Raises:
            StoreWriteError: the disk refused, or a link stands in the folder's place.
        """
        inside = f"{folder}/" if folder else ""
        with writing(self.root / folder), suppress(FileNotFoundError), self.folder_of(inside) as handle:
            for name in filter(unwanted, os.listdir(handle)):  # noqa: PTH208 (a descriptor)
                os.unlink(name, dir_fd=handle)


def _descend(handle: int, path: str, *, make: bool = False) -> int:
    """The folder of ``path`` below the folder ``handle``, in whose place it comes."""
    try:
        for folder in path.split("/")[:-1]:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(folder, dir_fd=handle)
            inner = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = inner
    except BaseException:
        os.close(handle)
        raise
    return handle


def sync_folder(folder: int) -> None:
    """Make renames within ``folder``, by its descriptor, and its own entry survive a power cut."""
    os.fsync(folder)
    parent = os.open("..", _FOLDER, dir_fd=folder)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turn what the disk refuses into one clear error.

    Raises:
        StoreWriteError: no space, no permission, a read-only or vanished folder.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        reason = {
            errno.ENOSPC: "no space left on the disk; free some",
            errno.EDQUOT: "the disk quota is used up; free some space",
            errno.EACCES: "permission denied; choose a folder that you may write to",
            errno.EPERM: "permission denied; choose a folder that you may write to",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.ENOENT: "the folder vanished; put it back",
            errno.EEXIST: "a file stands where a folder should be; choose another place",
            errno.EISDIR: "a folder stands where a file should be; choose another place",
            errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
            errno.ENOTDIR: "a file stands where a folder should be, or a link; choose another place",
            errno.ELOOP: "a link stands in its place; choose another place",
            errno.ENOSYS: "its file system has no locks (flock); choose another one",
            errno.ENOLCK: "its file system has no locks (flock); choose another one",
        }.get(error.errno or 0, error.strerror or str(error))
        raise StoreWriteError(
            f"cannot write {path}: {reason} and run the same command again: it resumes where it stopped"
        ) from error


@contextmanager
def exclusive(folder: Path, *, wait: bool = True) -> Generator[bool]:
    """Hold the lock of a folder; a kill frees it. Waiting for it for more than a second is logged.

    The lock is on a file that stays in the folder: a network file system does not pass on locks on the folder
    itself, and removing the file would race with a process that opens it. Anyone who may write into the
    folder may lock it. Where nothing can be written there is nothing to lock.

    Yields:
        Whether it is held: not where another process holds it and ``wait`` is not set.

    Raises:
        StoreWriteError: no such folder, or its file system has no locks.
    """
    path = folder / LOCK_PATH
    with writing(path):
        try:
            handle = _open_lock(path)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or os.access(folder, os.W_OK):
                raise
            yield True
            return
    try:
        with writing(path):
            silent_until = time.monotonic() + _SILENT_SECONDS
            while not (is_held := lock(handle, wait=False)) and wait and time.monotonic() < silent_until:
                time.sleep(0.02)
            if wait and not is_held:
                _log.warning("waiting for another process that writes %s", folder)
                is_held = lock(handle, wait=True)
        yield is_held
    finally:
        os.close(handle)


@contextmanager
def unlocked(folder: Path) -> Generator[None]:
    """A look at a folder before its lock is taken, so that none is left in a folder of something else.

    What is wrong there is an error only if nobody has locked the folder yet: else look again under the lock.
    """
    try:
        yield
    except StoreError:
        if not StoreFiles(folder).exists(LOCK_PATH):
            raise


def _open_lock(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o666)
    except FileExistsError:
        try:
            return os.open(path, os.O_RDWR | flags)
        except PermissionError:
            # Made by another user whose umask keeps us out: reading is enough to lock it on a local disk.
            return os.open(path, os.O_RDONLY | flags)
    os.fchmod(handle, 0o666)
    return handle


def lock(handle: int, *, wait: bool) -> bool:
    """Lock an open file, to be freed by closing it; whether this process holds it now.

    Args:
        handle: its descriptor, open for writing, which network file systems require.
        wait: wait for another process that holds it, rather than return False.

    Raises:
        OSError: its file system has no locks, or (ESTALE) another machine removed the file.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
