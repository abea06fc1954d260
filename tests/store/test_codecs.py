"""A chunk comes back as it was, or is refused: no flipped bit, cut or lying header passes."""

import struct
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from numpy.typing import NDArray

from posae.store.codecs import CODECS, ChunkError, Codec

NBYTES, BLOCK, ENCODED = 4, 8, 12
LIES: dict[str, Callable[[int], int]] = {
    "one more": lambda size: size + 1,
    "one less": lambda size: size - 1,
    "nothing": lambda _: 0,
    "two gigabytes": lambda _: 2**31 - 1,
    "four gigabytes": lambda _: 2**32 - 1,
}
each_codec = pytest.mark.parametrize("name", CODECS)


def sealed(payload: bytes) -> memoryview:
    """A hostile author's chunk: whatever it holds, its checksum is right."""
    return memoryview(payload + struct.pack("<I", google_crc32c.value(payload)))


def decode(codec: Codec, data: memoryview, out: NDArray[Any]) -> None:
    codec.decode(codec.payload(data, out.nbytes), out)


def small_chunk() -> NDArray[np.uint16]:
    return np.arange(3 * 4 * 5, dtype=np.uint16).reshape(3, 4, 5)


@given(
    st.sampled_from([*CODECS]),
    nps.arrays(
        st.sampled_from(["<u2", "<i4", "<i8", "<f4", "<f8", "u1"]), nps.array_shapes(max_dims=3, max_side=40)
    ),
)
def test_a_chunk_comes_back_bit_for_bit(name: str, chunk: NDArray[Any]) -> None:
    out = np.full_like(chunk, 1)
    decode(CODECS[name], memoryview(CODECS[name].encode(chunk)), out)
    assert out.tobytes() == chunk.tobytes()


@each_codec
def test_every_flipped_bit_is_found(name: str) -> None:
    codec, out = CODECS[name], np.empty_like(small_chunk())
    good = codec.encode(small_chunk())
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ChunkError):
            decode(codec, memoryview(bad), out)


@each_codec
def test_every_cut_is_found(name: str) -> None:
    codec, out = CODECS[name], np.empty_like(small_chunk())
    good = codec.encode(small_chunk())
    for size in range(len(good)):
        for cut in (memoryview(good)[:size], sealed(good[:-4][: max(0, size - 4)])):
            with pytest.raises(ChunkError):
                decode(codec, cut, out)


@each_codec
@pytest.mark.parametrize("n_bytes", range(4))
def test_what_is_shorter_than_a_checksum_is_refused(name: str, n_bytes: int) -> None:
    with pytest.raises(ChunkError):
        decode(CODECS[name], memoryview(bytes(n_bytes)), np.empty(4, np.uint16))


@pytest.mark.parametrize("name", ["small", "fast"])
@pytest.mark.parametrize("field", [NBYTES, BLOCK, ENCODED])
@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_or_harmless(name: str, field: int, lie: str) -> None:
    chunk = np.random.default_rng(0).integers(0, 40, (64, 8), np.uint16)
    payload = bytearray(CODECS[name].encode(chunk)[:-4])
    size = struct.unpack_from("<I", payload, field)[0]
    struct.pack_into("<I", payload, field, LIES[lie](size))
    guarded = np.full((66, 8), 0xABCD, np.uint16)
    try:
        decode(CODECS[name], sealed(bytes(payload)), guarded[1:65])
    except ChunkError:
        pass
    else:
        assert field == BLOCK, "a wrong size was taken"
    assert (guarded[[0, 65]] == 0xABCD).all(), "written outside the chunk"


@pytest.mark.parametrize("name", ["small", "fast"])
def test_no_payload_with_a_right_checksum_writes_outside_the_chunk(name: str) -> None:
    rng = np.random.default_rng(0)
    payload = CODECS[name].encode(np.arange(512, dtype=np.uint16).reshape(64, 8) // 3)[:-4]
    guarded = np.full((66, 8), 0xABCD, np.uint16)
    refused = 0
    for _ in range(2000):
        bad = bytearray(payload)
        for place in rng.integers(0, len(bad), 3).tolist():
            bad[place] = int(rng.integers(256))
        try:
            decode(CODECS[name], sealed(bytes(bad)), guarded[1:65])
        except ChunkError:
            refused += 1
        assert (guarded[[0, 65]] == 0xABCD).all()
    assert refused > 100


def test_a_chunk_of_another_size_is_refused() -> None:
    for codec in CODECS.values():
        encoded = memoryview(codec.encode(small_chunk()))
        for size in (59, 61):
            with pytest.raises(ChunkError):
                decode(codec, encoded, np.empty(size, np.uint16))
