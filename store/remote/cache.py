"""Parts of files that were fetched from a server, kept in a folder of bounded size.

Everything is in ``parts-v2`` below the folder that the user names, marked by a CACHEDIR.TAG. Only files
``<32 hex digits>/<path>.<start>-<stop>`` in there are counted and removed, and no link is followed, so
whatever else a user keeps in the folder is safe.

An entry is one file, made and written with one call each; processes may share the folder. What was used
longest ago is removed first. Nothing depends on an entry: one that is gone, still being written, cut short or
changed is fetched again, and a full disk only means that nothing is kept. Getting a part is reading a file,
some 10 us and a copy; keeping one takes four system calls.
"""

import contextlib
import os
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..threads import Renewed

DEFAULT_BYTES = 50 * 10**9
_OWN = "parts-v2"
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Parts of stores on servers, kept by posae.\n"
_STORE, _ANY = re.compile("[0-9a-f]{32}"), re.compile(".*")
_PART = re.compile(r".+\.[0-9]+-[0-9]+")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_READ = os.O_RDONLY | os.O_NOFOLLOW
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_LEAST_BYTES = 10**6
_KEPT_OF_FULL = 0.9
_LOOKS = 16
"""A process that wrote this part of the limit looks through the folder: others may write too."""


def parse_size(text: str) -> int:
    """Bytes that a size in words means; decimal units.

    Raises:
        SettingsError: no size.

    >>> parse_size("50GB"), parse_size("1.5 mb")
    (50000000000, 1500000)
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise SettingsError(f"cache size {text!r}: write it as 50GB or 500MB")
    n_bytes = int(float(found[1]) * unit)
    if n_bytes < _LEAST_BYTES:
        raise SettingsError(f"cache size {text!r} is below 1 MB; give it room for a few chunks at least")
    return n_bytes


def default_folder() -> Path:
    """Where parts are kept unless told: ``$POSAE_CACHE``, else in the user's own cache folder."""
    named = os.environ.get("POSAE_CACHE")
    return (
        Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "posae"
    )


class PartCache(Renewed):
    """Parts by name. Safe to use from many threads and processes.

    Attributes:
        folder: the marked folder that they lie in; made when the first one is kept.
        limit_bytes: how much they may take.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        """Keep parts below ``folder``; by default the user's own, of 50 GB or ``$POSAE_CACHE_SIZE``.

        Raises:
            SettingsError: the environment names no size.
        """
        named = os.environ.get("POSAE_CACHE_SIZE")
        self.folder = (folder or default_folder()) / _OWN
        self.limit_bytes = limit_bytes or (parse_size(named) if named else DEFAULT_BYTES)
        self._written = self.limit_bytes  # so that the first to be kept looks
        self._own_folders: set[str] = set()
        super().__init__()

    def renew(self) -> None:
        """Make the lock."""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """The same folder, for another process."""
        return PartCache, (self.folder.parent, self.limit_bytes)

    def get(self, name: str) -> bytes | None:
        """The part called ``name``, or None; shorter than it should be while another process writes it."""
        try:
            if not self._is_own(name.rpartition("/")[0]):
                return None
            with os.fdopen(os.open(f"{self.folder}/{name}", _READ), "rb", buffering=0) as file:
                data = file.read()
                with contextlib.suppress(OSError):
                    os.utime(file.fileno())  # used just now
                return data
        except OSError:
            return None

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Keep a part, if there is room for it at all."""
        if len(data) > self.limit_bytes // 2:
            return
        with contextlib.suppress(OSError):
            if self._mark() and self._is_own(name.rpartition("/")[0], make=True):
                self._make_room(len(data))
                _write(f"{self.folder}/{name}", data)

    def _mark(self) -> bool:
        """Make the marked folder, if it is missing; whether it is one of ours."""
        if "" in self._own_folders:
            return True
        tag = self.folder / "CACHEDIR.TAG"
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder.is_symlink():
            return False
        if {entry.name for entry in self.folder.iterdir()} <= {tag.name} and not tag.is_symlink():
            tag.write_text(_TAG)
        if tag.is_symlink() or not tag.is_file() or tag.read_text(errors="replace") != _TAG:
            return False
        self._own_folders.add("")
        return True

    def _is_own(self, folder: str, *, make: bool = False) -> bool:
        """Whether no link leads from the marked folder to ``folder`` within it."""
        if folder not in self._own_folders:
            within = Path(folder)
            for step in [*reversed(within.parents), within]:
                place = self.folder / step
                if make:
                    place.mkdir(exist_ok=True)
                if not stat.S_ISDIR(place.lstat().st_mode):
                    return False
            self._own_folders.add(folder)
        return True

    def _make_room(self, n_bytes: int) -> None:
        with self._lock:
            self._written += n_bytes
            if self._written < self.limit_bytes // _LOOKS:
                return
            self._written = 0
            self._remove_oldest(self.limit_bytes - self.limit_bytes // _LOOKS - n_bytes)

    def _remove_oldest(self, limit_bytes: int) -> None:
        """Where parts take more than ``limit_bytes``, remove those used longest ago, and a few more."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        if total <= limit_bytes:
            return
        for _, size, path in entries:
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108 (a name, not a path)
            total -= size
            if total <= _KEPT_OF_FULL * limit_bytes:
                return

    def _entries(self) -> Iterator[tuple[float, int, str]]:
        """Every part: when it was used, its bytes, its path."""
        waiting = [(str(self.folder), _STORE)]
        while waiting:
            folder, names = waiting.pop()
            with contextlib.suppress(OSError), os.scandir(folder) as present:
                for entry in present:
                    with contextlib.suppress(OSError):
                        if entry.is_dir(follow_symlinks=False):
                            if names.fullmatch(entry.name):
                                waiting.append((entry.path, _ANY))
                            continue
                        found = entry.stat(follow_symlinks=False)
                        if names is _ANY and _PART.fullmatch(entry.name) and stat.S_ISREG(found.st_mode):
                            yield found.st_mtime, found.st_size, entry.path


def _write(path: str, data: bytes | memoryview) -> None:
    """Write a new file; what does not fit on the disk is removed."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108 (a name, not a path): of another length, or changed
    n_written, file = 0, os.open(path, _CREATE, 0o600)
    try:
        n_written = os.write(file, data)
    finally:
        os.close(file)
        if n_written < len(data):
            os.unlink(path)  # noqa: PTH108 (a name, not a path)
