"""Digests of files: their SHA-256, and the hub's record of files that it sent. About 1 s per GB."""

import hashlib
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from .progress import Progress

_BLOCK_BYTES = 2**22
_MANY_BYTES = 10**9

Advance = Callable[[int], None]
"""Called with the number of bytes read since the last call."""


@contextmanager
def reading(task: str, files: Iterable[Path], progress: Progress) -> Generator[Advance]:
    """Progress for ``sha256`` of all of ``files``; nothing is shown below 1 GB.

    Raises:
        OSError: a file is missing.
    """
    n_bytes = sum(file.stat().st_size for file in files)
    if n_bytes < _MANY_BYTES:
        yield lambda _: None
        return
    progress.begin(task, n_bytes, "bytes")
    yield progress.advance
    progress.end()


def sha256(file: Path, advance: Advance = lambda _: None) -> str:
    """The SHA-256 of a file, in hex.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def sha256_once(file: Path) -> str:
    """``sha256``, cached while the file's size and modification time stay the same.

    Raises:
        OSError: it cannot be read.
    """
    status = file.stat()
    return _sha256_of(file, status.st_size, status.st_mtime_ns)


@lru_cache(1024)
def _sha256_of(file: Path, _size: int, _modified: int) -> str:
    return sha256(file)


def commit_on_hub(file: Path) -> str | None:
    """The commit that a file was downloaded from, if it is unchanged since; else None.

    huggingface_hub records each file's commit and a digest, in its cache and in folders made by
    ``hf download --local-dir``: the SHA-256 of a large file, git's object name of a small one.

    Raises:
        OSError: it cannot be read.
    """
    if file.is_symlink() and file.parent.parent.name == "snapshots":
        commit, digest = file.parent.name, file.readlink().name
    else:
        kept = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        try:
            commit, digest = kept.read_text().splitlines()[:2]
        except (OSError, ValueError):
            return None
    now = sha256_once(file) if len(digest) == 64 else _name_in_git(file)
    return commit if now == digest else None


def _name_in_git(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
