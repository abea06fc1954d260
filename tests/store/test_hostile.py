"""A store from a stranger: whatever is done to it, there is one clear error, no hang, no flood of memory.

Each case damages a good store in one way. ``sealed`` leaves the old seal, ``resealed`` has the hostile
author seal it anew, truthfully, and ``unsealed`` has no seal. Each is opened and read, verified and given to
``posae train``, each in a process of its own that may take 2 s of CPU time and 256 MB: about 0.1 s a store.
"""

import hashlib
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import google_crc32c
import numpy as np
import pytest
from numpy.typing import NDArray

from posae.store import ActivationStore
from posae.store.codecs import CODECS
from posae.store.files import StoreFiles
from posae.store.layout import ArraySpec
from posae.store.manifest import Manifest, group_json, layer_spec, token_specs
from posae.store.shard_writer import write_array, write_shard
from posae.store.stats import stats_specs

if TYPE_CHECKING:
    from ..conftest import Made, MakeStore

SECONDS = 2  # of CPU time, on top of what the good store costs on this machine
BYTES = 212 * 10**6  # likewise: 256 MB in all, of train more, as its options need torch
REACHED_TRAINING = 99
LAYERS = (0,)

Damage = Callable[[Path], object]
SEALED, RESEALED, UNSEALED = "sealed", "resealed", "unsealed"
ANY = (RESEALED, UNSEALED)
CASES: list[tuple[str, str, Damage]] = []


def hostile(*variants: str) -> Callable[[Damage], Damage]:
    def register(damage: Damage) -> Damage:
        CASES.extend((damage.__name__, variant, damage) for variant in variants or ANY)
        return damage

    return register


def case(name: str, damage: Damage, *variants: str) -> None:
    CASES.extend((name, variant, damage) for variant in variants or ANY)


def seal_json(root: Path) -> dict[str, Any]:
    """What a truthful seal of the regular files below ``root`` says."""
    files: dict[str, Any] = {}
    for file in sorted(root.rglob("*")):
        if stat.S_ISREG(file.lstat().st_mode) and file.name not in ("seal.json", ".lock"):
            data = file.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            files[file.relative_to(root).as_posix()] = {"bytes": len(data), "sha256": digest}
    return {"files": files, "format": 1}


def write_seal(root: Path, seal: Any) -> None:
    (root / "seal.json").write_text(
        json.dumps(seal, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    )


def change_json(file: Path, *place: Any, to: Any) -> None:
    found: Any = json.loads(file.read_text())
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = to
    file.write_text(json.dumps(found))


def change_manifest(root: Path, **changes: Any) -> None:
    """A manifest that says otherwise, and metadata of all arrays that agrees with it."""
    file = root / "zarr.json"
    old: dict[str, Any] = json.loads(file.read_text())["attributes"]["posae"]
    file.write_text(json.dumps(group_json({"posae": old | changes})))
    manifest = Manifest.model_construct(**old | changes)
    try:
        specs = [*token_specs(manifest).values()]
        for layer in LAYERS:
            specs += [layer_spec(manifest, layer), *stats_specs(manifest, layer).values()]
    except (TypeError, KeyError, ArithmeticError):
        return
    for spec in specs:
        (root / spec.metadata_path).write_text(json.dumps(spec.to_json()))


def change_index(file: Path, n_chunks: int, change: Callable[[list[int]], object]) -> None:
    """Entries (offset, size, offset, size, …) that say otherwise, with a checksum that holds."""
    data = file.read_bytes()
    body, index = data[: -16 * n_chunks - 4], data[-16 * n_chunks - 4 : -4]
    entries = list(struct.unpack(f"<{2 * n_chunks}Q", index))
    change(entries)
    index = struct.pack(f"<{2 * n_chunks}Q", *entries)
    file.write_bytes(body + index + struct.pack("<I", google_crc32c.value(index)))


def change_chunk(file: Path, change: Callable[[bytearray], object]) -> None:
    """A first chunk that says otherwise, with checksums that hold."""
    data = bytearray(file.read_bytes())
    size = struct.unpack("<Q", data[-4 - 32 + 8 : -4 - 32 + 16])[0]
    payload = data[: size - 4]
    change(payload)
    data[:size] = payload + struct.pack("<I", google_crc32c.value(bytes(payload)))
    file.write_bytes(data)


def spec_of(root: Path, path: str) -> ArraySpec:
    """What an array's file says, true or not."""
    found = json.loads((root / path / "zarr.json").read_text())
    inner = found["codecs"][0]["configuration"]
    cname = next((c["configuration"]["cname"] for c in inner["codecs"] if c["name"] == "blosc"), None)
    return ArraySpec(
        path=path,
        shape=tuple(found["shape"]),
        data_type=found["data_type"],
        chunk_rows=inner["chunk_shape"][0],
        shard_rows=found["chunk_grid"]["configuration"]["chunk_shape"][0],
        dimension_names=tuple(found["dimension_names"]),
        codec=next(codec for codec in CODECS.values() if codec.compressor == cname),
        attributes=found["attributes"],
    )


# --- metadata -----------------------------------------------------------------------------------------

METADATA: dict[str, Any] = {
    "zarr_v2": {"zarr_format": 2, "shape": [23, 6, 16], "dtype": "|O", "filters": [{"id": "pickle"}]},
    "empty": {},
    "a_list": [],
    "a_number": 1,
    "group_for_array": group_json({}),
}
for _name, _value in METADATA.items():
    case(
        f"layer_is_{_name}", lambda r, v=_value: (r / "layer_0/zarr.json").write_text(json.dumps(v)), RESEALED
    )
    case(f"root_is_{_name}", lambda r, v=_value: (r / "zarr.json").write_text(json.dumps(v)), UNSEALED)

INNER = ("codecs", 0, "configuration", "codecs")
CHANGES: dict[str, tuple[tuple[Any, ...], Any]] = {
    "pickle_codec": ((*INNER, 1), {"name": "numcodecs.pickle", "configuration": {}}),
    "codec_of_unknown_name": ((*INNER, 1, "name"), "zip"),
    "huge_block": ((*INNER, 1, "configuration", "blocksize"), 2**40),
    "object_type": (("data_type",), "object"),
    "structured_type": (("data_type",), {"name": "structured", "configuration": {"fields": []}}),
    "string_type": (("data_type",), "variable_length_utf8"),
    "huge_shape": (("shape",), [2**47, 2**20, 2**20]),
    "overflowing_shape": (("shape",), [2**63, 2**63, 2**63]),
    "negative_shape": (("shape",), [-23, 6, 16]),
    "many_axes": (("shape",), [1] * 100_000),
    "other_shape": (("shape",), [23, 6, 17]),
    "huge_chunk": (("codecs", 0, "configuration", "chunk_shape"), [2**40, 6, 16]),
    "chunk_of_nothing": (("codecs", 0, "configuration", "chunk_shape"), [0, 6, 16]),
    "storage_transformer": (("storage_transformers",), [{"name": "evil"}]),
    "hook_of_another": (("attributes", "hook_point"), "mlp_out"),
}
for _name, (_place, _value) in CHANGES.items():
    case(
        f"layer_has_{_name}",
        lambda r, p=_place, v=_value: change_json(r / "layer_0/zarr.json", *p, to=v),
        RESEALED,
    )
case("tokens_have_object_type", lambda r: change_json(r / "tokens/zarr.json", "data_type", to="object"))
case(
    "statistics_have_huge_shape",
    lambda r: change_json(r / "stats/layer_0/sums/zarr.json", "shape", 2, to=2**40),
)

TEXTS: dict[str, bytes] = {
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep_list": b"[" * 900_000,
    "key_twice": b'{"zarr_format": 3, "zarr_format": 3}',
    "nan": b'{"zarr_format": NaN}',
    "infinity": b'{"zarr_format": -Infinity}',
    "utf_16": '{"zarr_format": 3}'.encode("utf-16"),
    "byte_order_mark": b'\xef\xbb\xbf{"zarr_format": 3}',
    "not_text": bytes(range(128, 256)),
    "nothing": b"",
    "long_number": b'{"zarr_format": ' + b"9" * 10_000 + b"}",
    "half_surrogate": b'{"zarr_format": "\\ud800"}',
    "cut_short": b'{"zarr_format": 3',
}
for _name, _text in TEXTS.items():
    for _file, _variant in (
        ("zarr.json", UNSEALED),
        ("layer_0/zarr.json", RESEALED),
        ("stats/zarr.json", RESEALED),
    ):
        case(f"{_name}_in_{_file}", lambda r, f=_file, t=_text: (r / f).write_bytes(t), _variant)
    case(f"{_name}_in_seal.json", lambda r, t=_text: (r / "seal.json").write_bytes(t), SEALED)

for _file, _variants in (("zarr.json", ANY), ("layer_0/zarr.json", ANY), ("seal.json", (SEALED,))):
    for _size in (2**40, 2**28, 2**20 - 1):

        def grow(root: Path, file: str = _file, size: int = _size) -> None:
            with (root / file).open("r+b") as opened:
                opened.truncate(size)

        # Sealing anew would read it all.
        case(f"{_file}_of_{_size}_bytes", grow, *(v for v in _variants if v != RESEALED))

# --- the manifest -------------------------------------------------------------------------------------

KEYS: dict[str, list[Any]] = {
    "format": [True, "1", 0, -1, None, 1.5],
    "model": [1, None, "x" * 5000, ["a"], "\ud800"],
    "model_layers": [2**40, -1, 0, "26"],
    "d_model": [0, 2**23, 2**40, "16", 16.5],
    "dtype": ["float64", None],
    "hook_point": ["mlp_out"],
    "n_contexts": [0, -1, 2**47, 2**63, "23", True, 1e300],
    "context_length": [1, 2**23, None],
    "held_out": [[0, 23], [23, 16], [16], [16, 24], "16:23", [16, 23, 23], None],
    "special_token_ids": [[-1], [2**31], 5, [[1]], [0] * 70_000],
    "vocabulary_size": [0, 2**40, None],
    "codec": ["pickle", None],
    "chunk_contexts": [0, 3, 2**19, -8],
    "shard_contexts": [0, 8, 24, 2**29],
    "versions": [[], {"a": 1}, {"\x1b[2J\n": 1}, {str(n): "1" for n in range(100)}],
}
for _key, _values in KEYS.items():
    for _n, _value in enumerate(_values):
        case(
            f"manifest_{_key}_{_n}",
            lambda r, k=_key, v=_value: change_manifest(r, **{k: v}),
            "unsealed",
            "resealed",
        )


@hostile(UNSEALED, RESEALED)
def manifest_lacks_a_key(root: Path) -> None:
    found: Any = json.loads((root / "zarr.json").read_text())
    del found["attributes"]["posae"]["held_out"]
    (root / "zarr.json").write_text(json.dumps(found))


@hostile(UNSEALED, RESEALED)
def a_store_so_large_that_listing_it_takes_for_ever(root: Path) -> None:
    n = 2**40
    change_manifest(root, n_contexts=n, held_out=[n - 8, n], chunk_contexts=1, shard_contexts=1)


@hostile(RESEALED)
def a_store_as_large_as_may_be(root: Path) -> None:
    n = 2**40
    change_manifest(root, n_contexts=n, held_out=[n - 8, n], chunk_contexts=2**10, shard_contexts=2**29)


@hostile(SEALED)
def seal_of_half_a_million_files(root: Path) -> None:
    more = "".join(f'"y/{n:06}":{{"bytes":1,"sha256":"{0:064}"}},' for n in range(500_000))
    seal = (root / "seal.json").read_text()
    (root / "seal.json").write_text(seal.replace('"zarr.json":{', more + '"zarr.json":{'))


@hostile(SEALED)
def seal_of_more_layers_than_there_are(root: Path) -> None:
    files = seal_json(root)["files"] | {f"layer_{n}/zarr.json": ENTRY for n in range(1, 26)}
    write_seal(root, {"files": files, "format": 1})


@hostile(SEALED)
def seal_as_long_as_may_be_and_of_one_path(root: Path) -> None:
    (root / "seal.json").write_bytes(b'{"files":{"' + b"a/" * (2**25 - 64) + b'"')


@hostile(SEALED)
def seal_of_quotation_marks(root: Path) -> None:
    (root / "seal.json").write_bytes(b'{"files":{' + b'"' * (2**26 - 32) + b'},"format":1}')


@hostile(UNSEALED, RESEALED)
def layers_without_end(root: Path) -> None:
    change_manifest(root, model_layers=2**16)
    for layer in range(1, 200):
        (root / f"layer_{layer}").mkdir()
        (root / f"layer_{layer}/zarr.json").write_text("{}")


@hostile()
def wide_activations_of_800_megabytes_a_chunk(root: Path) -> None:
    change_manifest(root, d_model=2**23)


@hostile()
def long_contexts_of_gigabytes_of_counts(root: Path) -> None:
    change_manifest(root, context_length=2**20)


ENTRY = {"bytes": 1, "sha256": "0" * 64}

# --- shards -------------------------------------------------------------------------------------------

HUGE = 2**64 - 1
INDEXES: dict[str, Callable[[list[int]], object]] = {
    "out_of_range": lambda e: e.__setitem__(2, 2**40),
    "negative": lambda e: e.__setitem__(0, HUGE - 8),
    "wrapping_around": lambda e: (e.__setitem__(1, 2**63 + e[1]), e.__setitem__(3, 2**63 + e[3])),
    "overlapping": lambda e: e.__setitem__(slice(2, 4), e[0:2]),
    "swapped": lambda e: e.__setitem__(slice(0, 4), e[2:4] + e[0:2]),
    "of_size_0": lambda e: (e.__setitem__(3, e[1] + e[3]), e.__setitem__(slice(0, 3), [0, 0, 0])),
    "of_size_3": lambda e: (e.__setitem__(3, e[1] + e[3] - 3), e.__setitem__(slice(0, 3), [0, 3, 3])),
    "absent": lambda e: e.__setitem__(slice(0, 2), [HUGE, HUGE]),
    "all_absent": lambda e: e.__setitem__(slice(0, 4), [HUGE] * 4),
}
for _name, _change in INDEXES.items():
    for _file, _variant in (("layer_0/c.0.0.0", RESEALED), ("tokens/c.0.0", UNSEALED)):
        case(f"index_{_name}_in_{_file}", lambda r, f=_file, c=_change: change_index(r / f, 2, c), _variant)


def write_index(file: Path, entries: NDArray[np.uint64]) -> None:
    """A file whose index says ``entries`` and whose chunks are a hole as large as they say."""
    index = entries.astype("<u8").tobytes()
    with file.open("wb") as opened:
        opened.seek(int(entries[:, 1].sum()))
        opened.write(index + struct.pack("<I", google_crc32c.value(index)))


def seal_size_of(root: Path, path: str) -> None:
    """A seal that names the size that a file has, without reading it."""
    seal = json.loads((root / "seal.json").read_text())
    seal["files"][path]["bytes"] = (root / path).stat().st_size
    write_seal(root, seal)


def shard_of_equal_chunks(root: Path, n_chunks: int, size: int) -> None:
    sizes = np.full(n_chunks, size, np.uint64)
    entries = np.stack([np.arange(n_chunks, dtype=np.uint64) * np.uint64(size), sizes], axis=1)
    write_index(root / "layer_0/c.0.0.0", entries)
    if (root / "seal.json").exists():
        seal_size_of(root, "layer_0/c.0.0.0")


case("sparse_shard_of_a_terabyte", lambda r: shard_of_equal_chunks(r, 2, 2**39), SEALED)
case("sparse_shard_of_4_gigabytes", lambda r: shard_of_equal_chunks(r, 2, 2**31), SEALED)


def shard_of_a_million_chunks(root: Path, size: int) -> None:
    n = 2**20
    change_manifest(
        root, n_contexts=n, held_out=[n - 8, n], chunk_contexts=1, shard_contexts=n, vocabulary_size=1000
    )
    write_seal(root, seal_json(root))
    shard_of_equal_chunks(root, n, size)


for _size in (0, 4, 5, 20, 200):
    case(
        f"shard_of_a_million_chunks_of_{_size}_bytes",
        lambda r, s=_size: shard_of_a_million_chunks(r, s),
        SEALED,
    )


@hostile(SEALED)
def shards_by_the_thousand_that_are_not_there(root: Path) -> None:
    n = 8192 * 16
    change_manifest(root, n_contexts=n, held_out=[n - 8, n])
    files = seal_json(root)["files"]
    for path in [name for name in files if "/c." in name and name != "position/c.0"]:
        array, _, rest = path.partition("/c.")
        files |= {f"{array}/c.{shard}{'.0' * rest.count('.')}": ENTRY for shard in range(8192)}
    write_seal(root, {"files": files, "format": 1})


@hostile(RESEALED)
def header_of_800_megabytes(root: Path) -> None:
    change_manifest(root, d_model=2**23)
    change_chunk(root / "layer_0/c.0.0.0", lambda p: struct.pack_into("<II", p, 4, 8 * 6 * 2**24, 2**19))


BITS = {"nan": 0x7FC0, "infinite": 0xFF80, "signalling_nan": 0x7F81}
for _name, _bits in BITS.items():

    def change_bits(root: Path, bits: int = _bits) -> None:
        rows = np.zeros((16, 6, 16), np.uint16)
        rows[3, 2, 1] = bits
        file = root / "layer_0/c.0.0.0"
        write_shard(StoreFiles(root), spec_of(root, "layer_0"), 0, rows)
        digests = ActivationStore(root).array("stats/layer_0/sha256").read_rows(np.arange(2))
        digests[0] = np.frombuffer(hashlib.sha256(file.read_bytes()).digest(), np.uint8)
        write_array(StoreFiles(root), spec_of(root, "stats/layer_0/sha256"), digests)

    case(f"activations_that_are_{_name}", change_bits)


@hostile(RESEALED)
def index_that_has_chunks_past_the_end(root: Path) -> None:
    change_index(root / "layer_0/c.1.0.0", 2, lambda e: e.__setitem__(slice(2, 4), [0, 0]))


@hostile(RESEALED, UNSEALED)
def bytes_before_the_index(root: Path) -> None:
    file, index_bytes = root / "tokens/c.0.0", 2 * 16 + 4
    data = file.read_bytes()
    file.write_bytes(data[:-index_bytes] + b"more" + data[-index_bytes:])


HEADERS: dict[str, Callable[[bytearray], object]] = {
    "four_gigabytes": lambda p: struct.pack_into("<I", p, 4, 2**32 - 1),
    "four_gigabytes_encoded": lambda p: struct.pack_into("<I", p, 12, 2**32 - 1),
    "huge_block": lambda p: struct.pack_into("<I", p, 8, 2**32 - 1),
    "large_block": lambda p: struct.pack_into("<I", p, 8, 2**31),
    "block_of_a_megabyte": lambda p: struct.pack_into("<I", p, 8, 2**20),
    "no_block": lambda p: struct.pack_into("<I", p, 8, 0),
    "other_version": lambda p: p.__setitem__(0, 255),
    "other_compressor": lambda p: p.__setitem__(2, 0xE1),
    "garbage": lambda p: p.__setitem__(slice(16, None), b"\xff" * (len(p) - 16)),
}
for _name, _change in HEADERS.items():
    for _file, _variant in (("layer_0/c.0.0.0", RESEALED), ("tokens/c.0.0", UNSEALED)):
        case(f"blosc_{_name}_in_{_file}", lambda r, f=_file, c=_change: change_chunk(r / f, c), _variant)

TOKENS: dict[str, int] = {
    "past_the_vocabulary": 1000,
    "negative": -1,
    "least": -(2**31),
    "greatest": 2**31 - 1,
}
for _name, _token in TOKENS.items():

    def change_token(root: Path, token: int = _token) -> None:
        tokens = ActivationStore(root).tokens().copy()
        tokens[3, 2] = token
        write_array(StoreFiles(root), spec_of(root, "tokens"), tokens)

    case(f"token_{_name}", change_token)


@hostile()
def positions_of_nan_bits(root: Path) -> None:
    nan = np.full(6, np.nan, np.float32).view(np.int32)
    write_array(StoreFiles(root), spec_of(root, "position"), nan)


@hostile()
def positions_filled_with_nan(root: Path) -> None:
    file = root / "position/zarr.json"
    change_json(file, "data_type", to="float32")
    change_json(file, "fill_value", to="NaN")
    write_array(StoreFiles(root), spec_of(root, "position"), np.full(6, np.nan, np.float32))


for _name in ("sums", "squares", "norm_sums"):

    def fill_with_nan(root: Path, name: str = _name) -> None:
        spec = spec_of(root, f"stats/layer_0/{name}")
        write_array(StoreFiles(root), spec, np.full(spec.shape, np.nan, spec.dtype))

    case(f"{_name}_filled_with_nan", fill_with_nan)


@hostile()
def positions_that_lie(root: Path) -> None:
    write_array(StoreFiles(root), spec_of(root, "position"), np.arange(6, dtype=np.int32)[::-1])


@hostile(SEALED, UNSEALED)
def activations_that_are_not_those_written(root: Path) -> None:
    write_shard(StoreFiles(root), spec_of(root, "layer_0"), 0, np.zeros((16, 6, 16), np.uint16))


COUNTS: dict[str, tuple[str, int]] = {
    "negative_norm_counts": ("norm_counts", -1),
    "overflowing_norm_counts": ("norm_counts", 2**63 - 1),
    "no_norm_counts": ("norm_counts", 0),
    "negative_counts": ("counts", -5),
    "overflowing_counts": ("counts", 2**62),
}
for _name, (_array, _count) in COUNTS.items():

    def change_counts(root: Path, array: str = _array, count: int = _count) -> None:
        spec = spec_of(root, f"stats/layer_0/{array}")
        write_array(StoreFiles(root), spec, np.full(spec.shape, count, np.int64))

    case(_name, change_counts)

COUNTED: dict[str, Any] = {"documents": 1, "documents_left_out": 0, "duplicate_contexts": 0}
CORPORA: dict[str, Any] = {
    "what_a_terminal_obeys": {"posae": COUNTED | {"special_tokens": {"\x1b[2J": 1}}},
    "tokens_by_name": {"posae": COUNTED | {"special_tokens": {"<eos>": 1}}},
    "a_count_of_4000_digits": {"posae": COUNTED | {"special_tokens": {}, "documents": 10**4000}},
    "a_list": [],
    "no_object": {"posae": [1]},
    "text": {"posae": "many"},
    "no_counts": {"posae": {"documents": 1}},
    "counts_of_text": {
        "posae": {"documents": "1", "documents_left_out": 0, "duplicate_contexts": 0, "special_tokens": {}}
    },
    "special_tokens_of_text": {
        "posae": {
            "documents": 1,
            "documents_left_out": 0,
            "duplicate_contexts": 0,
            "special_tokens": {"2": "x"},
        }
    },
}
for _name, _value in CORPORA.items():
    case(
        f"corpus_is_{_name}",
        lambda r, v=_value: change_json(r / "stats/zarr.json", "attributes", to=v),
        RESEALED,
    )

# --- files that are no files --------------------------------------------------------------------------

FILES = {
    SEALED: ("layer_0/zarr.json", "layer_0/c.0.0.0", "stats/layer_0/sums/c.0.0.0", "seal.json"),
    RESEALED: ("layer_0/c.1.0.0",),
    UNSEALED: ("zarr.json", "tokens/c.0.0", "stats/layer_0/zarr.json"),
}


def moved(root: Path, path: str) -> tuple[Path, Path]:
    elsewhere = root.parent / "elsewhere"
    return (root / path), (root / path).rename(elsewhere)


def link(root: Path, path: str) -> None:
    here, elsewhere = moved(root, path)
    here.symlink_to(elsewhere)


def link_nowhere(root: Path, path: str) -> None:
    (root / path).unlink()
    (root / path).symlink_to("/no/such/file")


def link_to_itself(root: Path, path: str) -> None:
    (root / path).unlink()
    (root / path).symlink_to(root / path)


def pipe(root: Path, path: str) -> None:
    (root / path).unlink()
    os.mkfifo(root / path)


def folder(root: Path, path: str) -> None:
    (root / path).unlink()
    (root / path).mkdir()


def endless_device(root: Path, path: str) -> None:
    (root / path).unlink()
    if os.geteuid() == 0:
        os.mknod(root / path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    else:
        (root / path).symlink_to("/dev/zero")


def missing(root: Path, path: str) -> None:
    (root / path).unlink()


for _damage in (link, link_nowhere, link_to_itself, pipe, folder, endless_device, missing):
    for _variant, _files in FILES.items():
        for _file in _files:
            if (_damage, _file) != (missing, "seal.json"):
                case(f"{_damage.__name__}_at_{_file}", lambda r, d=_damage, f=_file: d(r, f), _variant)
for _folder in ("layer_0", "tokens", "stats", "stats/layer_0", "stats/layer_0/sums"):
    case(f"link_at_{_folder}", lambda r, f=_folder: link(r, f), UNSEALED)


@hostile(SEALED)
def folders_deeper_than_any_path(root: Path) -> None:
    (root / "layer_0/c.0.0.0").write_bytes(b"")
    here = Path.cwd()
    os.chdir(root)
    try:
        for _ in range(60):
            Path("x" * 100).mkdir()
            os.chdir("x" * 100)
        Path("file").touch()
    finally:
        os.chdir(here)


@hostile(SEALED)
def names_that_a_terminal_would_obey(root: Path) -> None:
    (root / "layer_0/c.0.0.0").write_bytes(b"")
    for name in (b"\x1b[2J", b"a\nb", b"\xff\xfe", "\u202eevil".encode()):
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).touch()


# --- the seal -----------------------------------------------------------------------------------------

PATHS = [
    "../zarr.json",
    "/etc/passwd",
    "layer_0/../zarr.json",
    "a//b",
    "./zarr.json",
    "a\\b",
    "",
    "a\0b",
    "/",
    "x" * 256,
    "x" * 255,
    "\x1b[2J",
    "ünïcode",
    "y/" * 3000 + "z",
    "no/such/file",
    "layer_0/zarr.json/c",
]
for _n, _path in enumerate(PATHS):

    def name_in_seal(root: Path, path: str = _path) -> None:
        seal = seal_json(root)
        seal["files"][path] = ENTRY
        write_seal(root, seal)

    case(f"seal_names_path_{_n}", name_in_seal, SEALED)

ENTRIES: list[Any] = [
    None,
    [],
    "x",
    {"bytes": 1},
    {"sha256": "0" * 64},
    ENTRY | {"bytes": -1},
    ENTRY | {"bytes": True},
    ENTRY | {"bytes": 1.0},
    ENTRY | {"bytes": 2**70},
    ENTRY | {"bytes": "1"},
    ENTRY | {"sha256": "0" * 63},
    ENTRY | {"sha256": "g" * 64},
    ENTRY | {"sha256": "A" * 64},
    ENTRY | {"sha256": 5},
    ENTRY | {"more": 1},
]
for _n, _entry in enumerate(ENTRIES):

    def change_entry(root: Path, entry: Any = _entry) -> None:
        seal = seal_json(root)
        seal["files"]["layer_0/c.0.0.0"] = entry
        write_seal(root, seal)

    case(f"seal_has_entry_{_n}", change_entry, SEALED)

SEALS: list[Any] = [
    {},
    {"files": {}},
    {"files": {}, "format": 1},
    {"files": [], "format": 1},
    {"files": None, "format": 1},
]
for _n, _seal in enumerate(SEALS):
    case(f"seal_is_{_n}", lambda r, s=_seal: write_seal(r, s), SEALED)
for _n, _more in enumerate([{"format": 0}, {"format": True}, {"format": "1"}, {"more": 1}]):
    case(f"seal_says_{_n}", lambda r, m=_more: write_seal(r, seal_json(r) | m), SEALED)
case("seal_with_spaces", lambda r: (r / "seal.json").write_text(json.dumps(seal_json(r))), SEALED)

for _file in (
    "layer_0/c.1.0.0",
    "tokens/c.1.0",
    "stats/layer_0/norm_sums/c.0.0",
    "tokens/zarr.json",
    "zarr.json",
    "stats/zarr.json",
):

    def leave_out(root: Path, path: str = _file) -> None:
        seal = seal_json(root)
        del seal["files"][path]
        write_seal(root, seal)

    case(f"seal_leaves_out_{_file}", leave_out, SEALED)


# --- the check ----------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What one task on one store came to."""

    code: int
    seconds: float
    n_bytes: int
    said: str


class Commands:
    """The processes that do the tasks, one of them with torch; see ``serve_commands``."""

    def __init__(self) -> None:
        server = [sys.executable, str(Path(__file__).with_name("serve_commands.py"))]
        self.plain, self.train = (
            subprocess.Popen([*server, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for words in ([], ["train"])
        )

    def __call__(self, what: str, root: Path) -> Outcome:
        process = self.train if what == "train" else self.plain
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps({"what": what, "root": str(root)}) + "\n")
        process.stdin.flush()
        return Outcome(**json.loads(process.stdout.readline()))

    def close(self) -> None:
        for process in (self.plain, self.train):
            process.communicate()


@pytest.fixture(scope="module")
def run() -> Generator[Commands]:
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def victim(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> "Made":
    """A good store of one layer and two shards, small as each case copies it."""
    root = tmp_path_factory.mktemp("victim") / "a.zarr"
    return make_store(root, n_contexts=23, layers=LAYERS, held_out=7, shard_contexts=16)


@pytest.fixture(scope="module")
def good(run: Commands, victim: "Made") -> Outcome:
    """What verifying the good store costs."""
    return run("verify", victim.root)


@pytest.fixture(scope="module")
def good_train(run: Commands, victim: "Made") -> Outcome:
    """What training on the good store costs until a run is prepared."""
    return run("train", victim.root)


def damaged_copy(victim: "Made", folder: Path, variant: str, damage: Damage) -> Path:
    root = shutil.copytree(victim.root, folder / "a.zarr")
    if variant == UNSEALED:
        (root / "seal.json").unlink()
    damage(root)
    if variant == RESEALED:
        write_seal(root, seal_json(root))
    return root


def is_one_clear_error(said: str) -> bool:
    """One line of error, or of each damaged part a line; nothing that a terminal would obey."""
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    damaged = [line for line in lines if line.startswith("damaged: ")]
    return (
        (len(errors) == len(lines) == 1 or (not errors and len(damaged) > 0))
        and all(line.isprintable() for line in lines)
        and all(len(line) < 800 for line in [*errors, *damaged])
        and "Traceback" not in said
    )


def is_cheap(outcome: Outcome, good: Outcome) -> bool:
    return outcome.seconds < SECONDS + good.seconds and outcome.n_bytes < BYTES + good.n_bytes


def beside(root: Path) -> dict[str, tuple[int, bytes]]:
    """All regular files beside the store, and when each was last read."""
    others = [place for place in root.parent.iterdir() if place != root]
    found = [file for place in others for file in (place, *place.rglob("*"))]
    regular = [file for file in found if stat.S_ISREG(file.lstat().st_mode)]
    return {str(file): (file.stat().st_atime_ns, file.read_bytes()) for file in regular}


@pytest.mark.parametrize(
    ("name", "variant", "damage"), CASES, ids=[f"{name}-{variant}" for name, variant, _ in CASES]
)
def test_a_hostile_store_gives_one_clear_error(
    run: Commands,
    good: Outcome,
    good_train: Outcome,
    victim: "Made",
    tmp_path: Path,
    name: str,
    variant: str,
    damage: Damage,
) -> None:
    root = damaged_copy(victim, tmp_path, variant, damage)
    before = beside(root)
    for file in before:
        os.utime(file, (0, 0))
    used, verified, trained = (run(what, root) for what in ("use", "verify", "train"))
    # What a link leads to was neither read nor changed.
    assert beside(root) == {file: (0, data) for file, (_, data) in before.items()}
    stage, _, error = used.said.partition("\n")
    assert used.code == 0, used.said
    assert verified.code == 1, verified.said
    assert is_one_clear_error(verified.said), verified.said
    assert all(is_cheap(outcome, good) for outcome in (used, verified)), (used, verified)
    assert is_cheap(trained, good_train), trained
    if stage in ("nothing", "opened"):
        assert trained.code == 1, trained
        assert trained.said == f"error: {error}\n"
    else:
        assert trained.code == REACHED_TRAINING, trained


BY_THE_REAL_COMMANDS = (
    "layer_has_pickle_codec-resealed",
    "layer_has_huge_shape-resealed",
    "deep_in_zarr.json-unsealed",
    "seal.json_of_1099511627776_bytes-sealed",
    "index_overlapping_in_layer_0/c.0.0.0-resealed",
    "link_at_stats-unsealed",
    "pipe_at_layer_0/c.0.0.0-sealed",
    "blosc_four_gigabytes_in_layer_0/c.0.0.0-resealed",
    "blosc_garbage_in_layer_0/c.0.0.0-resealed",
    "token_past_the_vocabulary-resealed",
)


@pytest.mark.parametrize("named", BY_THE_REAL_COMMANDS)
def test_the_real_commands_say_the_same(
    run: Commands, good: Outcome, victim: "Made", tmp_path: Path, named: str
) -> None:
    case = next((variant, damage) for name, variant, damage in CASES if f"{name}-{variant}" == named)
    root = damaged_copy(victim, tmp_path, *case)
    verified, here = run("verify anew", root), run("verify", root)
    assert verified.code == 1
    assert is_one_clear_error(verified.said)
    assert verified.said.splitlines()[-1] == here.said.splitlines()[-1]
    assert is_cheap(verified, good)
    assert abs(verified.n_bytes - here.n_bytes) < 30 * 10**6
    trained = run("train anew", root)
    assert trained.code == 1
    # What only the chunks show ends it as well, after training began.
    assert trained.said.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in trained.said
    if run("train", root).code != REACHED_TRAINING:
        assert is_one_clear_error(trained.said)
        assert is_cheap(trained, run("help of train anew", root))


@pytest.mark.parametrize("variant", [SEALED, RESEALED, UNSEALED])
def test_the_undamaged_store_gives_none(run: Commands, victim: "Made", tmp_path: Path, variant: str) -> None:
    root = shutil.copytree(victim.root, tmp_path / "a.zarr")
    assert seal_json(root) == json.loads((root / "seal.json").read_bytes())
    if variant == RESEALED:
        write_seal(root, seal_json(root))
    if variant == UNSEALED:
        (root / "seal.json").unlink()
    assert run("use", root).said == "read"
    verified = run("verify", root)
    assert verified.code == 0, verified.said
    assert "verified: all files are unchanged since they were written" in verified.said
    assert run("train", root).code == REACHED_TRAINING


@pytest.mark.parametrize("at", ["zarr.json", "seal.json"])
def test_a_newer_format_is_said_to_be_newer(run: Commands, victim: "Made", tmp_path: Path, at: str) -> None:
    root = shutil.copytree(victim.root, tmp_path / "a.zarr")
    if at == "seal.json":
        write_seal(root, {"format": 2, "something": "new"})
    else:
        (root / "seal.json").unlink()
        change_manifest(root, format=2, new_key={}, dtype="float8", codec="newer")
    for said in (run(what, root).said for what in ("use", "verify", "train")):
        assert "this store has format 2 and this posae reads format 1" in said
        assert "pip install --upgrade posae" in said


NO_STORES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda _: None, "there is no store"),
    "an_empty_folder": (lambda p: p.mkdir(), "there is no store"),
    "a_link_to_nothing": (lambda p: p.symlink_to("/no/such"), "there is no store"),
    "a_folder_of_something_else": (lambda p: (p.mkdir(), (p / "a.txt").write_text("a")), "is not a store"),
    "a_file": (lambda p: p.write_text("a"), "is a file"),
    "a_pipe": (os.mkfifo, "is a file"),
    "a_link_to_itself": (lambda p: p.symlink_to(p), "cannot be read"),
    "plain_zarr": (
        lambda p: (p.mkdir(), (p / "zarr.json").write_text(json.dumps(group_json({"by": "another"})))),
        "not a store of posae",
    ),
}


@pytest.mark.parametrize("name", NO_STORES)
def test_what_is_no_store_is_said_to_be_none(run: Commands, tmp_path: Path, name: str) -> None:
    make, message = NO_STORES[name]
    root = tmp_path / "a.zarr"
    make(root)
    for what in ("verify", "train"):
        outcome = run(what, root)
        assert outcome.code == 1
        assert message in outcome.said
        assert is_one_clear_error(outcome.said)
    assert message in run("use", root).said


def test_a_name_too_long_for_any_folder_is_one_error(run: Commands, tmp_path: Path) -> None:
    for what in ("verify", "train"):
        outcome = run(what, tmp_path / ("x" * 300))
        assert outcome.code == 1
        assert is_one_clear_error(outcome.said)
