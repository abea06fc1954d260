"""Coverage-guided fuzz of all that parses a stranger's bytes: ``make fuzz``.

Indexes, chunks, manifests, metadata of arrays, counts of a corpus, seals. Inputs begin with those of the
golden store. A checksum stops nearly all that is changed at random, so every second index or chunk gets one
that holds; every second JSON is a good one changed in one place. A finding is any exception but the
documented ones, a byte read or written beside a buffer (memory that faults lies behind it), a gigabyte
allocated, 5 s on one input, or a parsed value that is not what stands in the bytes.
"""

import ctypes
import json
import mmap
import re
import resource
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import atheris

with atheris.instrument_imports(include=["posae"]):
    from posae.store.codecs import CHECKSUM_BYTES, CODECS, ChunkError, checksum
    from posae.store.errors import PosaeError
    from posae.store.layout import Json
    from posae.store.manifest import layer_spec, parse_corpus, parse_manifest, token_specs
    from posae.store.reader import ActivationStore
    from posae.store.seal import CORPUS_PATH, ROOT_PATH, SealedFile, parse_json, parse_seal, seal_bytes
    from posae.store.shards import parse_index
    from posae.store.stats import stats_specs

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "golden" / "format-1.zarr"
MORE_MEMORY = 1 << 30
VALUES: list[Any] = [
    None,
    True,
    0,
    1,
    -1,
    2**31,
    2**63,
    10**30,
    1e300,
    0.5,
    "",
    "x",
    "\ud800",
    [],
    {},
    [1],
    {"a": 1},
]

STORE = ActivationStore.open(GOLDEN)
# Four chunks to a shard, the last absent: a short index is changed in every place.
LAYER = replace(layer_spec(STORE.manifest, STORE.layers[0]), shape=(23, 6, 16), chunk_rows=8, shard_rows=32)
SEAL = seal_bytes({path: SealedFile(10, "0a" * 32) for path in (ROOT_PATH, CORPUS_PATH, "tokens/c.0.0")})
MARKS = [b"", *(bytes([byte]) for byte in b'{}[],:"/.\\ 0a9-\x7f'), b"..", b"},", b'{"bytes":1']
libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Memory that ends where a page ends, before a page that may not be touched."""

    def __init__(self, pages: int) -> None:
        self.size = pages * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.size + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        if libc.mprotect(ctypes.c_void_p(start + self.size), ctypes.c_size_t(mmap.PAGESIZE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")

    def last(self, n_bytes: int) -> memoryview:
        """Its last bytes."""
        return memoryview(self.memory)[self.size - n_bytes : self.size]

    def holding(self, data: bytes) -> memoryview:
        """A copy of ``data`` at its end."""
        view = self.last(len(data))
        view[:] = data
        return view


ENCODED, DECODED = Guarded(64), Guarded(64)


def mended(data: bytes, mend: int) -> bytes:
    """``data`` with a checksum at its end that holds, if ``mend`` is odd."""
    return data[:-CHECKSUM_BYTES] + checksum(data[:-CHECKSUM_BYTES]) if mend % 2 else data


def fuzz_index(data: bytes) -> None:
    """The file's size, whether to mend, then the index."""
    size, index = int.from_bytes(data[:4], "little"), mended(data[5:], *data[4:5] or [0])
    for shard in range(LAYER.n_shards):
        with suppress(PosaeError):
            chunks = parse_index(LAYER, shard, ENCODED.holding(index[-ENCODED.size :]), size)
            assert len(chunks) == LAYER.chunks_in(shard)
            ends = [int(offset) + int(n_bytes) for offset, n_bytes in chunks]
            assert [int(offset) for offset, _ in chunks] == [0, *ends[:-1]]
            assert ends[-1] + len(index) == size


def fuzz_chunk(data: bytes) -> None:
    """Which codec, whether to mend, then the chunk."""
    if len(data) < 2:
        return
    codec, chunk = list(CODECS.values())[data[0] % len(CODECS)], mended(data[2 : ENCODED.size], data[1])
    out: NDArray[Any] = np.frombuffer(DECODED.last(LAYER.chunk_bytes), LAYER.dtype).reshape(LAYER.chunk_shape)
    with suppress(ChunkError):
        payload = codec.payload(ENCODED.holding(chunk), LAYER.chunk_bytes)
        codec.decode(payload, out)


def fuzz_manifest(found: Json) -> None:
    with suppress(PosaeError):
        manifest = parse_manifest(found)
        specs = [layer_spec(manifest, 0), *token_specs(manifest).values(), *stats_specs(manifest, 0).values()]
        for spec in specs:
            with suppress(ValueError):
                spec.check_bounds()
                assert 0 < spec.chunk_bytes < 2**31
                assert json.loads(json.dumps(spec.to_json())) == spec.to_json()


def fuzz_corpus(found: Json) -> None:
    with suppress(PosaeError):
        parse_corpus(found)


def fuzz_seal(data: bytes) -> None:
    """A seal, or what is put where in a good one, in place of how many bytes; so up to four times."""
    if data[:1] >= b"\x80":
        changed = SEAL
        for place, n_replaced, mark in struct.iter_unpack("<HBB", data[1:17][: len(data[1:17]) // 4 * 4]):
            place %= len(changed)
            changed = changed[:place] + MARKS[mark % len(MARKS)] + changed[place + n_replaced % 4 :]
        data = changed
    with suppress(PosaeError):
        seal = parse_seal(data)
        assert seal_bytes(dict(seal.files)) == data
        assert all(seal.files[path] == entry for path, entry in seal.files.items())


def holds_values(value: object) -> bool:
    return isinstance(value, (dict, list)) and bool(cast("Any", value))


def change_one(place: Any, provider: atheris.FuzzedDataProvider) -> None:
    """Change one value somewhere within ``place``."""
    keys: Any = list(place) if hasattr(place, "keys") else range(len(place))
    key = keys[provider.ConsumeIntInRange(0, len(keys) - 1)]
    if holds_values(place[key]) and provider.ConsumeBool():
        change_one(place[key], provider)
    elif provider.ConsumeBool():
        place[key] = provider.ConsumeInt(8)
    elif provider.ConsumeBool():
        place[key] = provider.ConsumeUnicode(64)
    else:
        place[key] = VALUES[provider.ConsumeIntInRange(0, len(VALUES) - 1)]


def as_json(fuzz: Callable[[Json], None], good: list[Json]) -> Callable[[bytes], None]:
    """A target of JSON: an input is text, or says where a good value is changed, and to what."""

    def target(data: bytes) -> None:
        if data[:1] < b"\x80":
            with suppress(PosaeError):
                fuzz(parse_json(data[1:], "zarr.json"))
            return
        provider = atheris.FuzzedDataProvider(data[1:])
        found: Any = json.loads(json.dumps(good[provider.ConsumeIntInRange(0, len(good) - 1)]))
        change_one(found, provider)
        fuzz(found)

    return target


def read_json(*paths: str) -> list[Json]:
    return [json.loads((GOLDEN / path).read_bytes()) for path in paths]


TARGETS: list[Callable[[bytes], None]] = [
    fuzz_index,
    fuzz_chunk,
    as_json(fuzz_manifest, read_json("zarr.json")),
    as_json(fuzz_corpus, read_json("stats/zarr.json")),
    fuzz_seal,
]


def one_input(data: bytes) -> None:
    """Byte 0 names the target."""
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def seeds() -> list[bytes]:
    """Good inputs of every target."""
    found: list[bytes] = []
    bits = np.arange(LAYER.chunk_bytes // 2, dtype=LAYER.dtype).reshape(LAYER.chunk_shape)
    for number, codec in enumerate(CODECS.values()):
        for values in (bits, bits * np.uint16(0)):
            found += [bytes([1, number, mend]) + codec.encode(values) for mend in (0, 1)]
    index = np.full((4, 2), 2**64 - 1, "<u8")
    index[:3] = [(0, 50), (50, 60), (110, 70)]
    data = index.tobytes() + checksum(index.tobytes())
    found += [b"\0" + struct.pack("<IB", 180 + len(data), mend) + data for mend in (0, 1)]
    for kind, paths in ((2, ["zarr.json"]), (3, ["stats/zarr.json"])):
        found += [bytes([kind, 0]) + (GOLDEN / path).read_bytes() for path in paths]
        found += [bytes([kind, 128, turn]) + bytes(range(turn, turn + 40)) for turn in range(0, 200, 7)]
    found += [b"\4\x80" + struct.pack("<HBB", place, 0, place % 251) for place in range(0, len(SEAL), 4)]
    return [*found, b"\4" + (GOLDEN / "seal.json").read_bytes(), b"\4" + SEAL]


def words() -> list[str]:
    """What JSON and the golden store's metadata are made of, as libFuzzer's dictionary."""
    text = "".join(
        (GOLDEN / path).read_text() for path in ("zarr.json", "layer_0/zarr.json", "stats/zarr.json")
    )
    keys = {f'"{word}"' for word in re.findall(r'"(\w+)"', text)}
    marks = {
        *"{}[],:",
        "},",
        '":{',
        '"bytes":',
        '"sha256":',
        '"format":',
        "null",
        "true",
        "NaN",
        "-1",
        "..",
        "//",
    }
    return [json.dumps(word) for word in sorted(keys | marks)]


def main() -> None:
    """Fuzz with the options of libFuzzer; the first argument is the folder of inputs, which is kept."""
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
        one_input(seed)
    dictionary = corpus.parent / "words"
    dictionary.write_text("\n".join(words()))
    here = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (here + MORE_MEMORY, here + MORE_MEMORY))
    atheris.Setup([*sys.argv, f"-artifact_prefix={corpus.parent}/", f"-dict={dictionary}"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
