"""A RemoteFolder over a folder of this machine, that counts what is asked of it and breaks at will.

For what a real server would not do on demand; real servers are tried in ``test_servers.py``.
"""

import hashlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from posae.store.errors import StoreDamagedError, StoreRemoteError
from posae.store.remote.folder import ListedFile


class FolderOnDisk:
    """Files of ``root``.

    Attributes:
        asked: path, first and last byte of each read.
        spoilt: paths whose next so many reads give wrong bytes.
        refuse_after: so many writes are taken, then the server refuses.
        digests_listed: whether the listing has digests.
    """

    def __init__(self, root: Path, url: str = "s3://bucket/made.zarr") -> None:
        self.root, self.url = root, url
        self.asked: list[tuple[str, int, int]] = []
        self.spoilt: dict[str, int] = {}
        self.refuse_after: int | None = None
        self.written: list[str] = []
        self.digests_listed = False
        self._lock = threading.Lock()

    def read(self, path: str, start: int, stop: int, of: int) -> bytes:
        with self._lock:
            self.asked.append((path, start, stop))
            spoil = self.spoilt.get(path, 0)
            self.spoilt[path] = spoil - 1
        data = (self.root / path).read_bytes()
        if len(data) != of:
            raise StoreDamagedError("the file on the server has another size", array=path)
        part = data[start:stop]
        assert len(part) == stop - start > 0
        return bytes(byte ^ 255 for byte in part) if spoil > 0 else part

    def read_small(self, path: str, limit_bytes: int) -> bytes:
        data = (self.root / path).read_bytes()
        if len(data) > limit_bytes:
            raise StoreDamagedError("too long", array=path)
        return data

    def size_bytes(self, path: str) -> int | None:
        try:
            return (self.root / path).stat().st_size
        except FileNotFoundError:
            return None

    def pieces(self, path: str, of: int) -> Iterator[bytes]:
        for start in range(0, of, 2**22):
            yield self.read(path, start, min(of, start + 2**22), of)

    def list_files(self) -> dict[str, ListedFile] | None:
        return {
            p.relative_to(self.root).as_posix(): ListedFile(
                p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest() if self.digests_listed else None
            )
            for p in sorted(self.root.rglob("*"))
            if p.is_file()
        }

    def digests(self, source: Path) -> set[str]:
        return {hashlib.sha256(source.read_bytes()).hexdigest()}

    def write(self, path: str, source: Path | bytes, *, only_new: bool = False) -> None:
        with self._lock:
            if self.refuse_after is not None and len(self.written) >= self.refuse_after:
                raise StoreRemoteError(f"{self.url} has no more room")
            target = self.root / path
            if only_new and target.exists():
                raise FileExistsError(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                target.write_bytes(source)
            else:
                shutil.copyfile(source, target)
            self.written.append(path)
