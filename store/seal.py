"""The seal: the list of every file that belongs to a finished store, with its size and digest.

``seal.json`` is written last. A missing or changed file that it names is damage; a file that it does not name
is not part of the store. Its own digest is the store's identity. It has only one form: its content is
serialised again and compared. Costs about 5 us and 350 bytes of memory per file.
"""

import hashlib
import json
import re
from collections.abc import Mapping
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
"""In the folder of an unfinished copy: the identity of the source."""

MAX_PATH = 255
MAX_METADATA_BYTES = 1 << 20
MAX_SEAL_BYTES = 1 << 26

_HEAD, _TAIL = b'{"files":{', b'},"format":%d}' % FORMAT
# Printable, as paths of damaged files are shown. No part of it is empty, "." or "..".
_PART = r'(?!\.{1,2}[/"])[ !#-.0-\[\]-~]+'
_LINE = re.compile(
    rf'"(?=[^"]{{1,{MAX_PATH}}}"){_PART}(?:/{_PART})*":'
    r'\{"bytes":(?:0|[1-9][0-9]{0,17}),"sha256":"[0-9a-f]{64}"\}'
)
_ANY_FORMAT = re.compile(rb'"format"\s*:\s*([0-9]{1,18})')


class SealedFile(NamedTuple):
    """The entry of one file."""

    n_bytes: int
    sha256: str


class Seal(NamedTuple):
    """A parsed ``seal.json``."""

    files: Mapping[str, SealedFile]
    identity: str
    """SHA-256 of ``seal.json`` itself, in hex."""


def pretty_json(value: Json) -> bytes:
    """Readable JSON for a ``zarr.json``; equal values give equal bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_json(data: bytes, path: str) -> Json:
    """A JSON object from an untrusted source.

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
    """The ``seal.json`` of these files, with sorted keys and no white space: equal stores have equal seals.

    Raises:
        StoreWriteError: more files than a reader accepts.
    """
    listed = {path: {"bytes": entry.n_bytes, "sha256": entry.sha256} for path, entry in sealed.items()}
    seal = {"format": FORMAT, "files": listed}
    data = json.dumps(seal, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if len(data) > MAX_SEAL_BYTES:
        raise StoreWriteError(
            f"{SEAL_PATH} of {len(listed):,} files would be longer than the {MAX_SEAL_BYTES:,} bytes that a "
            "store may have; harvest these layers into another store"
        )
    return data


def parse_seal(data: bytes) -> Seal:
    """The seal in the bytes of a ``seal.json``.

    Raises:
        StoreFormatError: a seal of another form, or of a newer format.
    """
    try:
        files = _files_in(data)
        if not {ROOT_PATH, CORPUS_PATH} <= files.keys():
            raise ValueError("files")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        # A newer seal may have any form; only its format is searched for, at either end.
        if newer := _ANY_FORMAT.search(data[-256:]) or _ANY_FORMAT.search(data[:256]):
            refuse_newer(int(newer[1]))
        raise StoreFormatError(
            f"{SEAL_PATH} is not a seal that posae writes; restore it from a copy of the store"
        ) from None
    return Seal(files, hashlib.sha256(data).hexdigest())


def _files_in(data: bytes) -> dict[str, SealedFile]:
    """The entries of a seal, which must equal the output of ``seal_bytes``."""
    # Nothing in it is empty: the cheapest check of a long hostile file.
    if not (data.startswith(_HEAD) and data.endswith(_TAIL)) or b'""' in data:
        raise ValueError("form")
    listed: dict[str, Any] = json.loads(data.decode())["files"]
    files = {path: SealedFile(entry["bytes"], entry["sha256"]) for path, entry in listed.items()}
    # Fast, as a store may have hundreds of thousands of files.
    lines = [
        f'"{path}":{{"bytes":{n_bytes},"sha256":"{sha256}"}}' for path, (n_bytes, sha256) in files.items()
    ]
    if list(files) != sorted(files) or ",".join(lines).encode() != data[len(_HEAD) : -len(_TAIL)]:
        raise ValueError("form")
    if not all(map(_LINE.fullmatch, lines)):
        raise ValueError("entry")
    return files


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
