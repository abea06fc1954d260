"""The seal: what is parsed is what was written, and no other bytes are taken for a seal."""

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posae.store import ActivationStore
from posae.store.errors import StoreDamagedError, StoreFormatError, StoreWriteError
from posae.store.seal import (
    CORPUS_PATH,
    MAX_SEAL_BYTES,
    ROOT_PATH,
    SealedFile,
    parse_seal,
    seal_bytes,
)
from posae.store.writer import StoreWriter

if TYPE_CHECKING:
    from ..conftest import Made, MakeStore

parts = st.text("ab._-0 ~!:{}[],", min_size=1, max_size=6).filter(lambda part: part not in (".", ".."))
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)
entries = st.builds(
    SealedFile,
    st.integers(0, 10**18 - 1),
    st.binary(min_size=32, max_size=32).map(lambda digest: digest.hex()),
)
seals = st.dictionaries(paths, entries, max_size=12).flatmap(
    lambda files: st.fixed_dictionaries({**dict.fromkeys((ROOT_PATH, CORPUS_PATH), entries)}).map(
        lambda needed: files | needed
    )
)


@given(seals)
def test_what_was_sealed_is_what_is_read(sealed: dict[str, SealedFile]) -> None:
    found = parse_seal(seal_bytes(sealed))
    assert found.files == sealed
    assert list(found.files) == sorted(sealed)
    assert found.identity == hashlib.sha256(seal_bytes(sealed)).hexdigest()


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "a/", "/a", "a//b", ".", "..", "a/..", "../a", "./a", "a\\b", 'a"b'),
        "a\n",
        "\x7f",
        "é",
        "a" * 256,
    ],
)
def test_a_path_that_leads_elsewhere_or_is_not_printable_is_refused(path: str) -> None:
    needed = {path: SealedFile(1, "ab" * 32) for path in (ROOT_PATH, CORPUS_PATH)}
    assert parse_seal(seal_bytes(needed | {"a" * 255: SealedFile(1, "ab" * 32)})).files.keys() > needed.keys()
    with pytest.raises(StoreFormatError, match="not a seal that posae writes"):
        parse_seal(seal_bytes(needed | {path: SealedFile(1, "ab" * 32)}))


def in_full(data: bytes) -> dict[str, SealedFile] | None:
    """The slow way: parsed as JSON and written anew, byte for byte the same."""
    try:
        files: dict[str, Any] = json.loads(data.decode())["files"]
        sealed = {path: SealedFile(int(file["bytes"]), str(file["sha256"])) for path, file in files.items()}
        same = seal_bytes(sealed) == data and all(bytes.fromhex(file.sha256) for file in sealed.values())
        return sealed if same else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


@given(seals, st.data())
def test_a_changed_byte_is_refused_or_says_something_else(
    sealed: dict[str, SealedFile], data: st.DataObject
) -> None:
    changed = bytearray(seal_bytes(sealed))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = parse_seal(bytes(changed))
    except StoreFormatError:
        return
    # Such as another digit of a size: then files and identity differ.
    assert found.files == in_full(bytes(changed)) != sealed


def test_every_changed_byte_of_a_seal_is_refused_or_gives_another_identity(
    good_store: "Made",
) -> None:
    seal = parse_seal((good_store.root / "seal.json").read_bytes())
    some = [*list(seal.files)[:3], ROOT_PATH, CORPUS_PATH]
    data = seal_bytes({path: seal.files[path] for path in some})
    whole = parse_seal(data)
    refused = 0
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            try:
                found = parse_seal(bytes(changed))
            except StoreFormatError:
                refused += 1
                continue
            assert found.identity != whole.identity
            assert dict(found.files) == in_full(bytes(changed))
    assert refused > len(data)


FORMS = {
    "no comma": (b"},", b"}"),
    "a comma at the end": (b'},"format"', b',},"format"'),
    "a comma at the start": (b'{"files":{', b'{"files":{,'),
    "a newline": (b'"format":1}', b'"format":1}\n'),
    "a space": (b'{"files"', b' {"files"'),
    "cut short": (b'"format":1}', b'"format":1'),
    "more behind it": (b'"format":1}', b'"format":1}{}'),
    "another key": (b'"format":1}', b'"format":1,"more":1}'),
    "a leading zero": (b'"bytes":', b'"bytes":0'),
    "a negative size": (b'"bytes":', b'"bytes":-'),
    "a size past all disks": (b'"bytes":', b'"bytes":999999999999999999'),
    "a fraction": (b'"bytes":1', b'"bytes":1.0'),
    "capitals": (b"ab", b"AB"),
    "not sorted": (b'"zarr.json"', b'"a.json"'),
    "a path twice": (b'"zarr.json"', b'"tokens/c.0.0"'),
    "an escape": (b'"zarr.json"', b'"zarr\\u002ejson"'),
    "an escaped slash": (b'"stats/', b'"stats\\/'),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_seal_in_another_form_is_refused(form: str, tmp_path: Path) -> None:
    data = seal_bytes({path: SealedFile(1, "ab" * 32) for path in (ROOT_PATH, CORPUS_PATH, "tokens/c.0.0")})
    old, new = FORMS[form]
    assert old in data
    (tmp_path / "seal.json").write_bytes(data.replace(old, new, 1))
    with pytest.raises(StoreFormatError, match="not a seal that posae writes"):
        parse_seal((tmp_path / "seal.json").read_bytes())


def test_a_seal_that_no_reader_would_take_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = {"zarr.json": SealedFile(1, "ab" * 32)}
    size = len(seal_bytes(sealed))
    monkeypatch.setattr("posae.store.seal.MAX_SEAL_BYTES", size)
    assert len(seal_bytes(sealed)) == size
    monkeypatch.setattr("posae.store.seal.MAX_SEAL_BYTES", size - 1)
    with pytest.raises(StoreWriteError, match="another store"):
        seal_bytes(sealed)


def test_layers_that_no_seal_could_name_are_refused_before_they_are_begun(
    make_store: "MakeStore", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=64, shard_contexts=16, layers=(0,))
    writer = StoreWriter.begin(made.root, made.manifest)
    size = (made.root / "seal.json").stat().st_size
    monkeypatch.setattr("posae.store.seal.MAX_SEAL_BYTES", int(1.5 * size))
    before = sorted(made.root.rglob("*"))
    with pytest.raises(StoreWriteError, match="into another store"):
        StoreWriter.begin(made.root, made.manifest, (1,))
    with writer.lock(), pytest.raises(StoreWriteError, match="into another store"):
        writer.begin_layers((1,))
    assert sorted(made.root.rglob("*")) == before
    monkeypatch.setattr("posae.store.seal.MAX_SEAL_BYTES", 3 * size)
    with writer.lock():
        assert writer.begin_layers((1,)) == (1,)


@pytest.mark.parametrize("needed", [ROOT_PATH, CORPUS_PATH])
def test_a_seal_without_the_root_or_the_commit_record_is_refused(needed: str, tmp_path: Path) -> None:
    sealed = {path: SealedFile(1, "ab" * 32) for path in (ROOT_PATH, CORPUS_PATH) if path != needed}
    (tmp_path / "seal.json").write_bytes(seal_bytes(sealed))
    with pytest.raises(StoreFormatError, match="not a seal that posae writes"):
        parse_seal((tmp_path / "seal.json").read_bytes())


@pytest.mark.parametrize(
    "data", [b'{"format": 2}', b'{"a":{},"format":12}', b'{"files":{' + b"x" * (1 << 22) + b'},"format":2}']
)
def test_a_newer_seal_of_any_form_is_said_to_be_newer(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "seal.json").write_bytes(data)
    with pytest.raises(StoreFormatError, match="this store has format"):
        parse_seal((tmp_path / "seal.json").read_bytes())


def test_a_seal_of_more_files_than_its_store_can_have_is_refused_before_it_is_parsed(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    root = make_store(tmp_path / "a.zarr").root
    good, n = (root / "seal.json").read_bytes(), 20_000
    more = b"".join(b'"a/%07d":{"bytes":1,"sha256":"%064d"},' % (i, i) for i in range(n))
    (root / "seal.json").write_bytes(good.replace(b'{"files":{', b'{"files":{' + more))
    tracemalloc.start()
    with pytest.raises(StoreDamagedError, match=r"seal\.json: it names 20,\d+ files, but a store of this"):
        ActivationStore.open(root)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A buffer for the longest seal that may be, and the bytes themselves; not 600 an entry.
    assert peak < MAX_SEAL_BYTES + 2 * len(more)


def test_what_a_seal_costs_is_bounded_and_all_that_eight_layers_need_is_taken() -> None:
    n = 20_000
    sealed = {f"a/{i:07}": SealedFile(i, hashlib.sha256(b"%d" % i).hexdigest()) for i in range(n)}
    sealed |= {path: SealedFile(1, "ab" * 32) for path in (ROOT_PATH, CORPUS_PATH)}
    data = seal_bytes(sealed)
    tracemalloc.start()
    found = parse_seal(data)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.files[f"a/{n - 1:07}"] == sealed[f"a/{n - 1:07}"]
    assert kept < 500 * n
    assert peak < 1200 * n
    # Eight such layers of 8,192 shards and seven files.
    assert len(data) / n * 8 * 8192 * 7 < MAX_SEAL_BYTES
