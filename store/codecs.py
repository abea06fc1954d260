"""What turns a chunk into bytes and back: three presets, each with a checksum over every chunk.

Costs on one core, d_model 2,304 (docs/benchmarks.md): ``small`` keeps 1.4-1.5 values' bytes in one and
decodes about 2 GB/s, ``fast`` encodes 2-3 times as fast for 1.2-1.3, ``raw`` costs a copy. Blosc's block
is set to 512 KiB because its automatic 32 KiB makes zstd find matches that are not there: 15 %
larger and 2.8 times slower to decode.
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from awscrt.checksums import crc32c
from numcodecs import blosc
from numpy.typing import NDArray

# A chunk is decoded by one thread and many chunks at once: threads inside Blosc would only compete.
blosc.use_threads = False

BLOCK_BYTES = 524288
CHECKSUM_BYTES = 4
HEADER_BYTES = 16
MOST_TO_ONE = 2**15
"""Blosc blocks of one value come to 12,500 bytes for one with zstd, to 251 with LZ4."""

_SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


class ChunkError(ValueError):
    """A chunk's bytes are not what a writer of posae leaves."""


def checksum(data: bytes | memoryview) -> bytes:
    """CRC-32C, little-endian, as it stands behind what it is of. Frees the GIL; 40 GB/s with AVX-512."""
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
        """What stands before a chunk's checksum, all checked that can be before decoding it.

        Args:
            data: the chunk as it lies in its file.
            n_bytes: its size when decoded.

        Raises:
            ChunkError: the checksum does not hold, or sizes are not those of this chunk.
        """
        if len(data) <= CHECKSUM_BYTES:
            raise ChunkError("it is cut short")
        payload = data[:-CHECKSUM_BYTES]
        # Sizes first: a hostile file may be sparse, and its checksum a walk through terabytes.
        if self.compressor is None:
            if len(payload) != n_bytes:
                raise ChunkError(f"{len(payload)} bytes where {n_bytes} belong")
        else:
            _check_header(payload, n_bytes)
        if checksum(payload) != bytes(data[-CHECKSUM_BYTES:]):
            raise ChunkError("its checksum does not hold")
        return payload

    def decode(self, payload: memoryview, out: NDArray[Any]) -> None:
        """Decode a checked ``payload`` into ``out``, C-contiguous and as large as the chunk.

        Raises:
            ChunkError: the compressor cannot make sense of it.
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
    # Blosc makes buffers of a block's size, and we write no larger ones.
    if n_decoded != n_bytes or n_encoded != len(payload) or not 0 < block <= BLOCK_BYTES:
        raise ChunkError("its Blosc header names other sizes than the array has")
    if n_bytes > MOST_TO_ONE * len(payload):
        raise ChunkError("its Blosc header names more bytes than it can decode to")


CODECS = {"small": Codec("zstd", 1), "fast": Codec("lz4", 5, "bitshuffle"), "raw": Codec(None)}
"""The presets by name; ``small`` is the default."""
