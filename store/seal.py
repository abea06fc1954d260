"""The seal: the list of every file that belongs to a finished store, with its size and digest.

``seal.json`` is written last. A file that it names and that is missing or changed is damage; a file
that it does not name is no part of the store. Its own digest is the store's identity.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from .errors import StoreDamagedError, StoreFormatError
from .files import StoreFiles
from .layout import FORMAT, Json, refuse_newer

SEAL_PATH = "seal.json"
ROOT_PATH = "zarr.json"
CORPUS_PATH = "stats/zarr.json"
"""Holds the counts of the corpus; written last of the tokens, and so their commit record."""

MAX_PATH = 255
MAX_METADATA_BYTES = 1 << 20
MAX_SEAL_BYTES = 1 << 28


class SealedFile(NamedTuple):
    """What the seal says of one file."""

    n_bytes: int
    sha256: str


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


def sha256_of(files: StoreFiles, path: str) -> SealedFile:
    """Size and digest of a file, read in pieces."""
    digest = hashlib.sha256()
    n_bytes = 0
    with open(files.open(path), "rb", buffering=0) as file:  # noqa: PTH123 (a descriptor)
        while piece := file.read(1 << 20):
            digest.update(piece)
            n_bytes += len(piece)
    return SealedFile(n_bytes, digest.hexdigest())


def seal_bytes(sealed: Mapping[str, SealedFile]) -> bytes:
    """The ``seal.json`` of these files."""
    listed = {path: {"bytes": entry.n_bytes, "sha256": entry.sha256} for path, entry in sealed.items()}
    return canonical_json({"format": FORMAT, "files": listed})


def read_seal(files: StoreFiles) -> Seal | None:
    """The store's seal, or None where it is not finished.

    Raises:
        StoreFormatError: a seal of another form, or of a newer format.
        StoreDamagedError: a link or device in its place, or larger than any seal.
    """
    try:
        data = files.read(SEAL_PATH, MAX_SEAL_BYTES)
    except FileNotFoundError:
        return None
    found = parse_json(data, SEAL_PATH)
    refuse_newer(found.get("format"))
    try:
        listed: dict[str, Any] = found["files"]
        sealed = {
            path: SealedFile(_count(entry["bytes"]), _hex(entry["sha256"]))
            for path, entry in listed.items()
            if _is_plain(path)
        }
        needed = {ROOT_PATH, CORPUS_PATH}
        if found["format"] != FORMAT or len(sealed) != len(listed) or not needed <= sealed.keys():
            raise ValueError("files")
        # Byte for byte what we would write: so a flipped bit anywhere in it is found.
        if seal_bytes(sealed) != data:
            raise ValueError("form")
    except (KeyError, TypeError, ValueError, AttributeError):
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


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("not a size")
    return value


def _hex(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64:
        raise ValueError("not a digest")
    return bytes.fromhex(value).hex()


def _is_plain(path: str) -> bool:
    # Printable, as a damaged file's path is shown to people.
    if not (path.isascii() and path.isprintable()) or "\\" in path or len(path) > MAX_PATH:
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))
