"""The ``stdlib`` corpus: the source of the Python standard library that runs posae.

Real text on every machine, with nothing to download: about 700 files, 11 MB. The files come in a
fixed order that follows from the hash of each path, so that any first part of the corpus is a
sample of the whole. A tenth is held out by the same hash, one file of each ten neighbours in size:
so it is a tenth of the text too, with as much of each kind. The demo model was trained on the rest.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

SPLITS = ("train", "held_out", "all")
"""Nine tenths, one tenth, and both."""

_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
}
_SHORTEST_CHARACTERS = 200


def _hash(path: str) -> bytes:
    return hashlib.sha256(path.encode()).digest()


def held_out_paths(sizes: dict[str, int]) -> set[str]:
    """Of each ten files that follow each other by size, the one whose path has the least hash.

    Args:
        sizes: bytes of each file, by its path relative to the library.
    """
    by_size = sorted(sizes, key=lambda path: (-sizes[path], path))
    return {min(by_size[i : i + 10], key=_hash) for i in range(0, len(by_size), 10)}


def stdlib_files(split: str = "all") -> list[tuple[str, str]]:
    """The files of one split in the corpus's order, as (path relative to the library, text).

    Left out: tests, installed packages, links, files that no import of the standard library
    reaches (they belong to the machine), generated documentation (``pydoc_data``), files that are
    not UTF-8 or shorter than 200 characters.

    Raises:
        ValueError: ``split`` is none of ``SPLITS``.
    """
    if split not in SPLITS:
        raise ValueError(f"stdlib has no split {split!r}; it has {', '.join(SPLITS)}")
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, str] = {}
    # Not root.rglob: thousands of installed files may lie below root too.
    modules = (root / name for name in sys.stdlib_module_names)
    packages = (module.rglob("*.py") for module in modules if not module.is_symlink())
    files = (root / f"{name}.py" for name in sys.stdlib_module_names)
    for file in chain(files, *packages):
        relative = file.relative_to(root)
        if _LEFT_OUT & set(relative.parts) or file.is_symlink() or not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) >= _SHORTEST_CHARACTERS:
            texts[relative.as_posix()] = text
    held_out = held_out_paths({path: len(text.encode()) for path, text in texts.items()})
    return [
        (path, texts[path])
        for path in sorted(texts, key=lambda path: _hash(path)[16:])  # not what held_out goes by
        if split == "all" or (path in held_out) == (split == "held_out")
    ]


def stdlib_documents(split: str = "all") -> Iterator[str]:
    """The texts of ``stdlib_files``, one document a file."""
    for _, text in stdlib_files(split):
        yield text


def stdlib_revision() -> str:
    """Python's version and a digest of every file's path and text: what these documents are."""
    digest = hashlib.sha256()
    for path, text in stdlib_files():
        for part in (path, text):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return f"python-{'.'.join(map(str, sys.version_info[:3]))}-{digest.hexdigest()[:16]}"
