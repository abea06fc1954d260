"""The layout of a store: names, shapes, chunks, shards. No reading, no writing.

Every array is split along its first axis only: ``chunk_rows`` rows per chunk (the unit of compression),
``shard_rows`` rows per shard (one file), by Zarr's sharding codec. The manifest determines every
``ArraySpec`` and so every array's ``zarr.json``; any other is foreign or hostile. Normative text:
docs/format.md.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .codecs import CODECS, Codec
from .errors import StoreFormatError

FORMAT = 1
CHUNK_CONTEXTS = 8
SHARD_CONTEXTS = 512
MAX_SHARDS = 8192
"""Shards grow by doubling until a layer has at most this many files."""

MAX_CHUNK_BYTES = 2**31 - 2**16
MAX_ROWS = 2**48
MAX_CHUNKS_PER_SHARD = 2**20

Json = dict[str, Any]

DATA_TYPES: dict[str, tuple[np.dtype[Any], Any]] = {
    "bfloat16": (np.dtype("<u2"), "NaN"),
    "int32": (np.dtype("<i4"), -1),
    "int64": (np.dtype("<i8"), -1),
    "float32": (np.dtype("<f4"), "NaN"),
    "float64": (np.dtype("<f8"), "NaN"),
    "uint8": (np.dtype("u1"), 0),
}
"""Zarr's name of each data type: the numpy dtype of its bits in memory, its fill value in JSON."""

BFLOAT16_NAN = np.uint16(0x7FC0)


def shard_contexts(n_contexts: int) -> int:
    """Contexts per shard of a store of ``n_contexts``.

    >>> shard_contexts(4096), shard_contexts(8_000_000)
    (512, 1024)
    """
    contexts = SHARD_CONTEXTS
    while -(-n_contexts // contexts) > MAX_SHARDS:
        contexts *= 2
    return contexts


def refuse_newer(version: object, written_by: object = None) -> None:
    """Refuse a format newer than this posae supports; invalid values are ignored here.

    Args:
        version: the format's number.
        written_by: version of posae that wrote it, if recorded.

    Raises:
        StoreFormatError: a later format; names the posae that reads it.
    """
    if type(version) is not int or version <= FORMAT:
        return
    # From a possibly hostile store: shown only if it is a version.
    is_version = isinstance(written_by, str) and re.fullmatch(r"[0-9][0-9A-Za-z.+-]{0,39}", written_by)
    reader = f"posae {written_by} or later" if is_version else "a later posae"
    raise StoreFormatError(
        f"this store has format {version} and this posae reads format {FORMAT}; {reader} reads it: "
        "pip install --upgrade posae"
    )


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array: the content of its ``zarr.json``."""

    path: str
    """Path below the store, e.g. ``layer_5`` or ``stats/layer_5/sums``."""

    shape: tuple[int, ...]

    data_type: str
    """Zarr's name; one of ``DATA_TYPES``."""

    chunk_rows: int
    """Entries of axis 0 in a chunk."""

    shard_rows: int
    """Entries of axis 0 in a shard; a multiple of ``chunk_rows``."""

    dimension_names: tuple[str, ...]

    codec: Codec = CODECS["small"]

    attributes: Json = field(default_factory=dict[str, Any])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the bits in memory: uint16 for bfloat16."""
        return DATA_TYPES[self.data_type][0]

    @property
    def fill(self) -> Any:
        """The value, as bits, of entries past the last row."""
        fill = DATA_TYPES[self.data_type][1]
        return BFLOAT16_NAN if self.data_type == "bfloat16" else self.dtype.type(fill)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of every chunk; the last one is padded to it."""
        return (self.chunk_rows, *self.shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """Decoded bytes of a chunk."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def chunks_per_shard(self) -> int:
        """Entries in a shard's index."""
        return self.shard_rows // self.chunk_rows

    @property
    def n_shards(self) -> int:
        """Files of the array."""
        return -(-self.shape[0] // self.shard_rows)

    @property
    def n_chunks(self) -> int:
        """Chunks that hold at least one row."""
        return -(-self.shape[0] // self.chunk_rows)

    def chunks_in(self, shard: int) -> int:
        """Chunks of ``shard`` that hold at least one row."""
        return min(self.chunks_per_shard, self.n_chunks - shard * self.chunks_per_shard)

    def shard_path(self, shard: int) -> str:
        """The file of ``shard``, below the store."""
        return f"{self.path}/c.{shard}{'.0' * (len(self.shape) - 1)}"

    @property
    def metadata_path(self) -> str:
        """The array's ``zarr.json``, below the store."""
        return f"{self.path}/zarr.json"

    def to_json(self) -> Json:
        """The array's ``zarr.json``: plain Zarr v3."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        values = {"name": "bytes"} if self.dtype.itemsize == 1 else little
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.data_type,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.shard_rows, *self.shape[1:]]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": DATA_TYPES[self.data_type][1],
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": list(self.chunk_shape),
                        "codecs": [values, *self.codec.to_json(self.dtype.itemsize), {"name": "crc32c"}],
                        "index_codecs": [little, {"name": "crc32c"}],
                        "index_location": "end",
                    },
                }
            ],
            "attributes": self.attributes,
            "dimension_names": list(self.dimension_names),
        }

    def check_bounds(self) -> None:
        """Refuse impossible sizes before anything is allocated for them.

        Raises:
            ValueError: out of bounds.
        """
        if not 1 <= len(self.shape) <= 3 or min(self.shape) < 0 or self.shape[0] > MAX_ROWS:
            raise ValueError("shape")
        if self.chunk_rows < 1 or self.shard_rows < 1 or self.shard_rows % self.chunk_rows:
            raise ValueError("chunks do not fill shards")
        if self.chunks_per_shard > MAX_CHUNKS_PER_SHARD or not 0 < self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise ValueError("chunk size")
