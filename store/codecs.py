"""The codecs of chunks: three presets, each with a checksum over every chunk.

On one core, d_model 2,304 (docs/benchmarks.md): ``small`` compresses 1.4-1.5 to 1 and decodes about 2 GB/s,
``fast`` encodes 2-3 times as fast at 1.2-1.3 to 1, ``raw`` costs a copy. Blosc's blocks are 512 KiB, as with
its automatic 32 KiB zstd gives 15 % larger chunks that take 2.8 times as long to decode.
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from awscrt.checksums import crc32c
from numcodecs import blosc
from numpy.typing import NDArray

# Many threads decode one chunk each, so threads inside Blosc would only compete.
blosc.use_threads = False

BLOCK_BYTES = 524288
CHECKSUM_BYTES = 4
HEADER_BYTES = 16
MOST_TO_ONE = 2**15
"""Maximum ratios of Blosc blocks of equal values: 12,500 with zstd, 251 with LZ4."""

_SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


class ChunkError(ValueError):
    """A chunk's bytes were not written by posae."""


def checksum(data: bytes | memoryview) -> bytes:
    """CRC-32C, little-endian, as appended to the data. Frees the GIL; 40 GB/s with AVX-512."""
    return struct.pack("<I", crc32c(data))


@dataclass(frozen=True)
class Codec:
    """One preset: Blosc with a compressor, or none."""

    compressor: str | None
    level: int = 0
    shuffle: str = "shuffle"

    def to_json(self, typesize: int) -> list[dict[str, Any]]:
        """The codecs between ``bytes`` and ``crc32c`` in a ``zarr.json``."""
        if self.compressor is None:
            return []
        return [
            {
                "name": "blosc",
                "configuration": {
                    "typesize": typesize,
                    "cname": self.compressor,
                    "clevel": self.level,
                    "shuffle": self.shuffle,
                    "blocksize": BLOCK_BYTES,
                },
            }
        ]

    def encode(self, chunk: NDArray[Any]) -> bytes:
        """A C-contiguous chunk as bytes, its checksum last. Blosc frees the GIL."""
        if self.compressor is None:
            payload = chunk.tobytes()
        else:
            payload = blosc.compress(
                chunk, self.compressor.encode(), self.level, _SHUFFLES[self.shuffle], BLOCK_BYTES
            )
        return payload + checksum(payload)

    def payload(self, data: memoryview, n_bytes: int) -> memoryview:
        """The bytes before a chunk's checksum, after all checks that are possible without decoding.

        Args:
            data: the chunk as stored.
            n_bytes: its decoded size.

        Raises:
            ChunkError: a wrong checksum, or sizes other than this chunk's.
        """
        if len(data) <= CHECKSUM_BYTES:
            raise ChunkError("it is cut short")
        payload = data[:-CHECKSUM_BYTES]
        # Sizes first: a hostile file may be sparse, and its checksum would read terabytes.
        if self.compressor is None:
            if len(payload) != n_bytes:
                raise ChunkError(f"{len(payload)} bytes where {n_bytes} belong")
        else:
            _check_header(payload, n_bytes)
        if checksum(payload) != bytes(data[-CHECKSUM_BYTES:]):
            raise ChunkError("its checksum is wrong")
        return payload

    def decode(self, payload: memoryview, out: NDArray[Any]) -> None:
        """Decode a checked ``payload`` into ``out``, C-contiguous and of the chunk's size.

        Raises:
            ChunkError: the compressor cannot decode it.
        """
        if self.compressor is None:
            np.copyto(out, np.frombuffer(payload, out.dtype).reshape(out.shape))
            return
        try:
            blosc.decompress(payload, out)
        except (RuntimeError, ValueError) as error:
            raise ChunkError(f"Blosc cannot decode it ({error})") from None


def _check_header(payload: memoryview, n_bytes: int) -> None:
    if len(payload) < HEADER_BYTES:
        raise ChunkError("shorter than a Blosc header")
    n_decoded, block, n_encoded = struct.unpack("<III", payload[4:HEADER_BYTES])
    # Blosc allocates buffers of a block's size, and we write no larger ones.
    if n_decoded != n_bytes or n_encoded != len(payload) or not 0 < block <= BLOCK_BYTES:
        raise ChunkError("its Blosc header names other sizes than the array has")
    if n_bytes > MOST_TO_ONE * len(payload):
        raise ChunkError("its Blosc header names more bytes than it can decode to")


CODECS = {"small": Codec("zstd", 1), "fast": Codec("lz4", 5, "bitshuffle"), "raw": Codec(None)}
"""The presets by name; ``small`` is the default."""
