"""Parts of files that were fetched from a server, kept in a folder of bounded size.

An entry is one file, written under a temporary name and renamed, so processes may share the folder. What was
used longest ago goes first. Nothing depends on an entry: one that is gone, cut short or changed is fetched
again, and a disk that is full only means that nothing is kept. Costs a file of its own for each part: getting
one is a read of a file, some 10 us and a copy.
"""

import contextlib
import os
import re
import tempfile
import threading
from pathlib import Path

from ..errors import SettingsError

DEFAULT_BYTES = 50 * 10**9
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
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


class PartCache:
    """A folder of parts, by name. Safe to use from many threads and processes.

    Attributes:
        folder: where they lie; made when the first one is kept.
        limit_bytes: how much they may take.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        """Speak of ``folder``; by default the user's own, of 50 GB or ``$POSAE_CACHE_SIZE``.

        Raises:
            SettingsError: the environment names no size.
        """
        named = os.environ.get("POSAE_CACHE_SIZE")
        self.folder = folder or default_folder()
        self.limit_bytes = limit_bytes or (parse_size(named) if named else DEFAULT_BYTES)
        self._written = self.limit_bytes  # so that the first to be kept looks
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """The part called ``name``, or None."""
        try:
            with open(self.folder / name, "rb", buffering=0) as file:  # noqa: PTH123 (no buffer)
                data = file.read()
                with contextlib.suppress(OSError):
                    os.utime(file.fileno())  # used just now
                return data
        except OSError:
            return None

    def put(self, name: str, data: bytes) -> None:
        """Keep a part, if there is room for it at all."""
        path = self.folder / name
        if len(data) > self.limit_bytes // 2:
            return
        self._make_room(len(data))
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
            try:
                with os.fdopen(handle, "wb", buffering=0) as file:
                    if file.write(data) < len(data):  # the disk is full
                        raise OSError
                os.replace(partial, path)  # noqa: PTH105 (a name, not a path)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(partial)  # noqa: PTH108 (a name, not a path)

    def forget(self, name: str) -> None:
        """Remove a part, if it is there."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def _make_room(self, n_bytes: int) -> None:
        with self._lock:
            self._written += n_bytes
            if self._written < self.limit_bytes // _LOOKS:
                return
            self._written = 0
            self._remove_oldest(self.limit_bytes - self.limit_bytes // _LOOKS - n_bytes)

    def _remove_oldest(self, limit_bytes: int) -> None:
        """Where parts take more than ``limit_bytes``, remove those used longest ago, and a few more."""
        entries: list[tuple[float, int, str]] = []
        waiting = [str(self.folder)]
        while waiting:
            with contextlib.suppress(OSError), os.scandir(waiting.pop()) as found:
                for entry in found:
                    with contextlib.suppress(OSError):
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
                        else:
                            there = entry.stat(follow_symlinks=False)
                            entries.append((there.st_mtime, there.st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        if total <= limit_bytes:
            return
        for _, size, path in sorted(entries):
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108 (a name, not a path)
            total -= size
            if total <= _KEPT_OF_FULL * limit_bytes:
                return
