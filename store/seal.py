"""The seal: the list of every file that belongs to a finished store, with its size and digest.

``seal.json`` is written last. A file that it names and that is missing or changed is damage; a file
that it does not name is no part of the store. Its own digest is the store's identity. As it is canonical
it is kept as it lies on the disk, with the place of each entry: 4 bytes more an entry, however
many a stranger's seal has. Parsing takes about 1 us an entry, a look-up some 5 us.
"""

import hashlib
import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from .errors import StoreDamagedError, StoreFormatError, StoreWriteError
from .files import PARTIAL
from .layout import FORMAT, Json, refuse_newer
from .readable import ReadableFiles

SEAL_PATH = "seal.json"
ROOT_PATH = "zarr.json"
CORPUS_PATH = "stats/zarr.json"
"""Holds the counts of the corpus; written last of the tokens, and so their commit record."""

CARD_PATH = "README.md"
"""The card. May be edited, and so is never sealed."""

COPY_PATH = f".copy{PARTIAL}"
"""In a folder that a copy was begun in, until it is sealed: the identity of the source."""

MAX_PATH = 255
MAX_METADATA_BYTES = 1 << 20
MAX_SEAL_BYTES = 1 << 26

_HEAD, _TAIL = b'{"files":{', b'},"format":%d}' % FORMAT
# Printable, as a damaged file's path is shown to people. No part of it is empty, "." or "..".
_PART = rb'(?!\.{1,2}[/"])[ !#-.0-\[\]-~]+'
_ENTRY = re.compile(
    rb'"(?=[^"]{1,%d}")(%b(?:/%b)*)":' % (MAX_PATH, _PART, _PART)
    + rb'\{"bytes":(0|[1-9][0-9]{0,17}),"sha256":"([0-9a-f]{64})"\}(?:,|\Z)|(?s:.)'
)
# Or else one byte, and no path: what is no entry is not searched for one.
_ANY_FORMAT = re.compile(rb'"format"\s*:\s*([0-9]{1,18})')


class SealedFile(NamedTuple):
    """What the seal says of one file."""

    n_bytes: int
    sha256: str


class SealedFiles(Mapping[str, SealedFile]):
    """The entries of a ``seal.json``, looked up in its own bytes."""

    def __init__(self, data: bytes) -> None:
        """Take the bytes of the file.

        Raises:
            ValueError: byte for byte not what ``seal_bytes`` makes, of whatever entries.
        """
        if not (data.startswith(_HEAD) and data.endswith(_TAIL)):
            raise ValueError("form")
        self._data = data
        self._starts = array("I")
        self._next = 0
        self._end = len(data) - len(_TAIL)
        at, before = len(_HEAD), b""
        for entry in _ENTRY.finditer(data, at, self._end):
            # Sorted, and so none twice.
            if not entry[1] or entry[1] <= before:
                raise ValueError("entry")
            self._starts.append(at)
            at, before = entry.end(), entry[1]
        if at != self._end or data[at - 1] == ord(","):
            raise ValueError("end")

    def _path_at(self, start: int) -> bytes:
        return self._data[start + 1 : self._data.index(b'"', start + 1)]

    def __len__(self) -> int:
        """How many files are sealed."""
        return len(self._starts)

    def __iter__(self) -> Iterator[str]:
        """Their paths, sorted."""
        return (self._path_at(start).decode() for start in self._starts)

    def __getitem__(self, path: str) -> SealedFile:
        """What the seal says of the file at ``path``."""
        wanted, index = path.encode(errors="surrogatepass"), self._next
        # Who goes through all of them asks for the next one.
        if not (index < len(self._starts) and self._path_at(self._starts[index]) == wanted):
            index = bisect_left(self._starts, wanted, key=self._path_at)
            if index == len(self._starts) or self._path_at(self._starts[index]) != wanted:
                raise KeyError(path)
        self._next = index + 1
        entry = cast("re.Match[bytes]", _ENTRY.match(self._data, self._starts[index], self._end))
        return SealedFile(int(entry[2]), entry[3].decode())


class Seal(NamedTuple):
    """A parsed ``seal.json``."""

    files: Mapping[str, SealedFile]
    identity: str
    """SHA-256 of ``seal.json`` itself, in hex."""


def canonical_json(value: Json) -> bytes:
    """JSON with sorted keys and no spare space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def pretty_json(value: Json) -> bytes:
    """JSON for a ``zarr.json``, which people read; equal values give equal bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_json(data: bytes, path: str) -> Json:
    """A JSON object, from anywhere.

    Raises:
        StoreFormatError: not JSON, not an object, a key twice, or too deep.
    """

    def once(pairs: list[tuple[str, Any]]) -> Json:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        # Decoded here, as json.loads would take UTF-16 and UTF-32 too.
        parsed: Any = json.loads(data.decode(), object_pairs_hook=once, parse_constant=refuse)
        if not isinstance(parsed, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(
            f"{path} is not the JSON of a store ({error}); restore it from a copy of the store"
        ) from None
    return cast("Json", parsed)


def sha256_of(files: ReadableFiles, path: str) -> SealedFile:
    """Size and digest of a file, read in pieces."""
    digest = hashlib.sha256()
    n_bytes = 0
    for piece in files.pieces(path):
        digest.update(piece)
        n_bytes += len(piece)
    return SealedFile(n_bytes, digest.hexdigest())


def seal_bytes(sealed: Mapping[str, SealedFile]) -> bytes:
    """The ``seal.json`` of these files.

    Raises:
        StoreWriteError: so many files that no reader would take it.
    """
    listed = {path: {"bytes": entry.n_bytes, "sha256": entry.sha256} for path, entry in sealed.items()}
    data = canonical_json({"format": FORMAT, "files": listed})
    if len(data) > MAX_SEAL_BYTES:
        raise StoreWriteError(
            f"{SEAL_PATH} of {len(listed):,} files would be longer than the {MAX_SEAL_BYTES:,} bytes that a "
            "store may have; harvest these layers into another store"
        )
    return data


def read_seal(files: ReadableFiles) -> Seal | None:
    """The store's seal, or None where it is not finished.

    Raises:
        StoreFormatError: a seal of another form, or of a newer format.
        StoreDamagedError: a link or device in its place, or larger than any seal.
    """
    try:
        return parse_seal(files.read(SEAL_PATH, MAX_SEAL_BYTES))
    except FileNotFoundError:
        return None


def parse_seal(data: bytes) -> Seal:
    """The seal in the bytes of a ``seal.json``.

    Raises:
        StoreFormatError: a seal of another form, or of a newer format.
    """
    try:
        sealed = SealedFiles(data)
        if not (ROOT_PATH in sealed and CORPUS_PATH in sealed):
            raise ValueError("files")
    except ValueError:
        # A newer seal may have any form; nothing more of it is looked at.
        if newer := _ANY_FORMAT.search(data):
            refuse_newer(int(newer[1]))
        raise StoreFormatError(
            f"{SEAL_PATH} is not a seal that posae writes; restore it from a copy of the store"
        ) from None
    return Seal(sealed, hashlib.sha256(data).hexdigest())


def check_sealed_bytes(seal: Seal | None, path: str, data: bytes) -> None:
    """Refuse a metadata file that is not the one that was sealed.

    Raises:
        StoreDamagedError: its bytes differ from the seal's.
    """
    if seal is None:
        return
    entry = seal.files.get(path)
    if entry is None:
        raise StoreDamagedError("the seal does not name it", array=path)
    if entry != SealedFile(len(data), hashlib.sha256(data).hexdigest()):
        raise StoreDamagedError("its bytes are not those that were sealed", array=path)
