"""A store of pieces holds what they held, in the bytes that encoding all of it anew would give."""

import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast
from unittest.mock import Mock, patch

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import posae.store
from posae.pipeline.harvest.corpus import count_duplicates
from posae.pipeline.stores.assembling import Assembly, Piece, assembled_manifest
from posae.store import ActivationStore
from posae.store.errors import (
    SettingsError,
    StoreDamagedError,
    StoreFormatError,
    StoreIncompleteError,
    StoreMismatchError,
)
from posae.store.files import StoreFiles
from posae.store.manifest import parse_manifest
from posae.store.seal import CARD_PATH, SealedFile, seal_bytes
from posae.store.shard_writer import ShardWriter, write_shard
from posae.store.stats import stats_specs
from posae.store.verify import verify

if TYPE_CHECKING:
    from ...conftest import Made, MakeStore

posae.store.register_bfloat16()
open_array: Any = cast("Any", zarr).open_array

LAYERS = (0, 3)


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    with patch("os.fsync"):
        yield


@pytest.fixture(scope="module")
def sources(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> list["Made"]:
    """Two harvests of one corpus: the second's last chunk is not full, and neither's last shard."""
    folder = tmp_path_factory.mktemp("sources")

    def make(name: str, n_contexts: int, held_out: int, seed: int, **manifest: Any) -> "Made":
        return make_store(
            folder / f"{name}.zarr",
            n_contexts=n_contexts,
            held_out=held_out,
            seed=seed,
            layers=LAYERS,
            context_length=3,
            d_model=5,
            chunk_contexts=4,
            shard_contexts=8,
            **manifest,
        )

    return [make("a", 28, 4, 0), make("b", 31, 7, 1, skip_contexts=28)]


def pieces_of(sources: Sequence["Made"], *parts: tuple[int, int, int]) -> list[Piece]:
    stores = [ActivationStore.open(made.root) for made in sources]
    return [Piece(stores[source], start, stop) for source, start, stop in parts]


def assemble(
    root: Path, pieces: Sequence[Piece], layers: Sequence[int] = LAYERS, codec: str | None = None
) -> ActivationStore:
    assembly = Assembly(root, pieces, assembled_manifest(pieces, codec))
    n_told = 0

    def count(n_contexts: int) -> None:
        nonlocal n_told
        n_told += n_contexts

    missing = assembly.begin(layers)
    assembly.fill(count)
    assert n_told == missing
    return assembly.finish()


def tree(root: Path) -> dict[str, bytes]:
    """All files but the card, which stores that were made up have none of."""
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.name not in (CARD_PATH, ".lock")]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def n_links(root: Path) -> list[int]:
    """How many names each shard of the layers has."""
    return [p.stat().st_nlink for p in sorted(root.glob("layer_*/c.*"))]


@st.composite
def some_pieces(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Cuts of both sources' training parts (24 contexts each), in any order, then of what is held out."""

    def cuts(source: int, first: int, last: int) -> list[tuple[int, int, int]]:
        edge = st.integers(first, last) | st.sampled_from(range(first, last + 1, 4))
        edges = sorted(draw(st.lists(edge, max_size=4)))
        return [(source, *pair) for pair in zip(edges[::2], edges[1::2], strict=False) if pair[0] < pair[1]]

    training = draw(st.permutations(cuts(0, 0, 24) + cuts(1, 0, 24)))
    return [*(training or [(0, 0, 8)]), *cuts(0, 24, 28), *cuts(1, 24, 31)]


@settings(max_examples=30, deadline=None)
@given(parts=some_pieces(), codec=st.sampled_from([None, "small", "fast", "raw"]))
def test_a_store_of_any_pieces_has_the_bytes_of_one_written_anew(
    sources: list["Made"], parts: list[tuple[int, int, int]], codec: str | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = assemble(Path(folder) / "new.zarr", pieces_of(sources, *parts), (3,), codec)
        rows = [(sources[source], slice(start, stop)) for source, start, stop in parts]
        activations = np.concatenate([made.activations[3][some] for made, some in rows])
        np.testing.assert_array_equal(store.read(3), activations)
        tokens = np.concatenate([made.tokens[some] for made, some in rows])
        np.testing.assert_array_equal(store.tokens(), tokens)
        documents = np.concatenate([made.documents[some] for made, some in rows])
        np.testing.assert_array_equal(store.documents(), documents)
        n_held_out = sum(max(0, some.stop - max(some.start, 24)) for _, some in rows)
        assert store.manifest.held_out == (len(tokens) - n_held_out, len(tokens))
        assert verify(store)[:2] == ([], [])
        # As a harvest of these activations would write it: every chunk encoded, all summed up.
        anew = Path(folder) / "anew.zarr"
        replace(
            sources[0],
            root=anew,
            manifest=store.manifest,
            tokens=tokens,
            documents=documents,
            activations={3: activations},
            corpus=store.corpus,
        ).write((3,))
        assert tree(Path(store.root)) == tree(anew)


def test_whole_shards_get_one_more_name_and_outlive_the_others(sources: list["Made"], tmp_path: Path) -> None:
    own = tmp_path / "own.zarr"
    shutil.copytree(sources[0].root, own)
    store = assemble(tmp_path / "new.zarr", [Piece(ActivationStore.open(own), 0, 28)])
    assert n_links(Path(store.root)) == [2] * 8
    assert not any(path.is_symlink() for path in Path(store.root).rglob("*"))
    shutil.rmtree(own)
    assert n_links(Path(store.root)) == [1] * 8
    assert verify(ActivationStore.open(store.root))[:2] == ([], [])


def test_layers_alone_leave_every_other_file_as_it_is(sources: list["Made"], tmp_path: Path) -> None:
    source = ActivationStore.open(sources[1].root)
    store = assemble(tmp_path / "new.zarr", [Piece(source, 0, 31)], layers=(3,))
    before, after = tree(sources[1].root), tree(Path(store.root))
    assert {name for name in before if "layer_0" in name} == before.keys() - after.keys()
    assert {name for name in after if before[name] != after[name]} == {"zarr.json", "seal.json"}
    assert store.digests(3) == source.digests(3)
    assert assemble(tmp_path / "new.zarr", [Piece(source, 0, 31)], layers=(0,)).layers == (0, 3)
    assert tree(Path(store.root)).keys() == before.keys()


def kill_this_process(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(*_: object, **__: object) -> NoReturn:
    raise OSError


@pytest.mark.parametrize("way", ["linked", "copied", "encoded"])
def test_each_way_gives_the_same_bytes(sources: list["Made"], tmp_path: Path, way: str) -> None:
    parts = [(0, 0, 16), (1, 0, 24), (0, 16, 24), (0, 24, 28), (1, 24, 31)]
    whole = tree(Path(assemble(tmp_path / "whole.zarr", pieces_of(sources, *parts)).root))
    with pytest.MonkeyPatch.context() as monkeypatch:
        if way != "linked":
            monkeypatch.setattr(os, "link", refuse)
        if way == "encoded":
            monkeypatch.setattr(Assembly, "_whole_shard", Mock(return_value=None))
        store = assemble(tmp_path / "new.zarr", pieces_of(sources, *parts))
    # Shards of 8: all of the training parts are whole ones of a source; of the 11 held out, none.
    is_linked = [n > 1 for n in n_links(Path(store.root))]
    assert is_linked == [way == "linked"] * 6 + [False] * 2 + [way == "linked"] * 6 + [False] * 2
    assert tree(Path(store.root)) == whole


def test_statistics_are_those_of_what_the_store_holds(sources: list["Made"], tmp_path: Path) -> None:
    parts = [(0, 3, 24), (1, 8, 24), (0, 24, 28)]
    store = assemble(tmp_path / "new.zarr", pieces_of(sources, *parts))
    values = store.read(3, dtype="float32").astype(np.float64)
    ordinary = ~np.isin(store.tokens(), store.manifest.special_token_ids)
    ordinary[37:] = False
    stats = store.stats(3)
    np.testing.assert_array_equal(stats.counts, ordinary.sum(axis=0))
    np.testing.assert_allclose(stats.sums, np.where(ordinary[..., None], values, 0).sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats.squares, np.square(values[ordinary]).sum(axis=0))
    np.testing.assert_allclose(store.norms(3).mean, np.linalg.norm(values, axis=2).mean(axis=0))
    assert store.corpus["duplicate_contexts"] == count_duplicates(store.tokens())
    ids, counts = np.unique(store.tokens(), return_counts=True)
    found = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    assert store.corpus["special_tokens"] == {str(i): found[i] for i in (1, 2)}


def test_zarr_python_reads_it(sources: list["Made"], tmp_path: Path) -> None:
    store = assemble(tmp_path / "new.zarr", pieces_of(sources, (1, 0, 16), (0, 1, 5)))
    for name in ("layer_0", "layer_3", "tokens", "document"):
        array: NDArray[Any] = open_array(Path(store.root) / name, mode="r")[:]
        np.testing.assert_array_equal(array, store.array(name).read_rows(np.arange(20)))


def test_errors_of_rounding_add_up_to_those_of_the_sources(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(
        tmp_path / "a.zarr", n_contexts=44, held_out=12, chunk_contexts=4, shard_contexts=16, mantissa_bits=3
    )
    source = ActivationStore.open(made.root)

    def errors(store: ActivationStore) -> NDArray[np.float64]:
        spec = stats_specs(store.manifest, 1)["rounding"]
        return store.array(spec.path).read_rows(np.arange(store.manifest.n_shards)).sum(axis=0)

    shifted = assemble(
        tmp_path / "b.zarr", [Piece(source, 5, 32), Piece(source, 0, 5), Piece(source, 32, 44)], (1,)
    )
    np.testing.assert_allclose(errors(shifted), errors(source))
    assert errors(source)[:, 1:].min() > 0  # position 0 is BOS, which is special
    assert verify(shifted).damaged == []
    found, wanted = shifted.rounding_error(1), source.rounding_error(1)
    assert found is not None
    assert wanted is not None
    assert found.relative == pytest.approx(wanted.relative)
    part = assemble(tmp_path / "c.zarr", [Piece(source, 0, 16)], (1,), "raw").rounding_error(1)
    linked = assemble(tmp_path / "d.zarr", [Piece(source, 0, 16)], (1,)).rounding_error(1)
    assert part == linked


def test_origin_names_the_pieces_and_the_corpus(sources: list["Made"], tmp_path: Path) -> None:
    pieces = pieces_of(sources, (1, 0, 8), (0, 4, 9))
    store = assemble(tmp_path / "new.zarr", pieces)
    origin = store.manifest.origin
    assert origin is not None
    assert origin.stores == tuple(piece.store.identity for piece in pieces)
    assert origin.contexts == ("0:8", "4:9")
    assert origin.corpus == ("0:59",)
    assert store.manifest.corpus_contexts == [range(59)]
    again = assembled_manifest([Piece(store, 2, 4)])
    assert again.corpus_contexts == [range(59)]
    with pytest.raises(StoreMismatchError, match=r"origin contexts was \('0:8', '4:9'\) and is now"):
        assemble(tmp_path / "new.zarr", pieces[:1])


def test_what_cannot_be_is_refused(sources: list["Made"], make_store: "MakeStore", tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="all 3 contexts are held out"):
        assembled_manifest(pieces_of(sources, (0, 24, 27)))
    with pytest.raises(ValueError, match="training parts come first"):
        assembled_manifest(pieces_of(sources, (0, 20, 25), (1, 0, 4)))
    unsealed = make_store(tmp_path / "u.zarr", seal=False)
    with pytest.raises(StoreIncompleteError, match="unfinished"):
        assembled_manifest([Piece(ActivationStore.open(unsealed.root), 0, 8)])
    with pytest.raises(StoreIncompleteError, match="no layer 5"):
        assemble(tmp_path / "new.zarr", pieces_of(sources, (0, 0, 8)), layers=(5,))
    assert not (tmp_path / "new.zarr").exists()


@pytest.mark.parametrize("name", ["layer_3/c.1.0.0", "tokens/c.1.0", "stats/layer_0/sums/c.1.0.0"])
@pytest.mark.parametrize("start", [0, 4, 3], ids=["whole shards", "whole chunks", "neither"])
def test_damage_is_told_with_the_name_of_its_store(
    sources: list["Made"], tmp_path: Path, name: str, start: int
) -> None:
    own = tmp_path / "own.zarr"
    shutil.copytree(sources[0].root, own)
    data = bytearray((own / name).read_bytes())
    data[20] ^= 1
    (own / name).write_bytes(data)
    pieces = [Piece(ActivationStore.open(own), start, 24)]
    if start and name.startswith("stats"):
        assert (
            assemble(tmp_path / "new.zarr", pieces).n_contexts == 24 - start
        )  # not asked for its statistics
        return
    with (
        patch("os.link", refuse),
        pytest.raises(StoreDamagedError, match=rf"{own}/{name.split('/c.')[0]}.*shard 1"),
    ):
        assemble(tmp_path / "new.zarr", pieces)
    assert not ActivationStore.open(tmp_path / "new.zarr").is_sealed


def test_a_digest_among_the_statistics_that_was_not_sealed_is_not_passed_on(
    sources: list["Made"], tmp_path: Path
) -> None:
    own = tmp_path / "own.zarr"
    shutil.copytree(sources[0].root, own)
    (own / "seal.json").unlink()
    spec = stats_specs(sources[0].manifest, 3)["sha256"]
    write_shard(StoreFiles(own), spec, 1, np.zeros((1, 32), np.uint8))
    digests = {
        path: SealedFile(len(data), hashlib.sha256(data).hexdigest()) for path, data in tree(own).items()
    }
    (own / "seal.json").write_bytes(seal_bytes(digests))
    with pytest.raises(StoreDamagedError, match="its digest is not the sealed one"):
        assemble(tmp_path / "new.zarr", [Piece(ActivationStore.open(own), 0, 28)])


@pytest.mark.parametrize(
    "origin",
    [
        {},
        {"stores": ["a"], "contexts": ["0:4"], "corpus": []},
        {"stores": ["a"], "contexts": ["0:4"], "corpus": ["0:999999999999999"]},
        {"stores": ["a"], "contexts": ["-1:4"], "corpus": ["0:4"]},
        {"stores": ["a\n"], "contexts": ["0:4"], "corpus": ["0:4"]},
        ["0:4"],
    ],
)
def test_an_origin_that_says_nothing_sensible_is_refused(sources: list["Made"], origin: Any) -> None:
    root = json.loads((sources[0].root / "zarr.json").read_bytes())
    root["attributes"]["posae"]["origin"] = origin
    with pytest.raises(StoreFormatError, match="is invalid: origin"):
        parse_manifest(root)


def test_a_link_in_a_source_is_not_taken(sources: list["Made"], tmp_path: Path) -> None:
    own = tmp_path / "own.zarr"
    shutil.copytree(sources[0].root, own)
    (own / "layer_0/c.1.0.0").unlink()
    (own / "layer_0/c.1.0.0").symlink_to(sources[0].root / "layer_0/c.1.0.0")
    with pytest.raises(StoreDamagedError, match="links are not followed"):
        assemble(tmp_path / "new.zarr", [Piece(ActivationStore.open(own), 0, 28)])
    assert not any(path.is_symlink() for path in (tmp_path / "new.zarr").rglob("*"))


def test_a_changed_byte_that_was_linked_is_found_in_the_new_store_too(
    sources: list["Made"], tmp_path: Path
) -> None:
    own = tmp_path / "own.zarr"
    shutil.copytree(sources[0].root, own)
    with (own / "layer_3/c.2.0.0").open("r+b") as file:
        file.seek(20)
        byte = file.read(1)[0]
        file.seek(20)
        file.write(bytes([byte ^ 1]))
    store = assemble(tmp_path / "new.zarr", [Piece(ActivationStore.open(own), 0, 28)])
    assert [damage[:3] for damage in verify(store).damaged] == [("layer_3", 2, 0)]


def test_a_copied_shard_with_sound_chunks_that_were_not_sealed_is_damage(
    sources: list["Made"], tmp_path: Path
) -> None:
    own = tmp_path / "own.zarr"
    shutil.copytree(sources[0].root, own)
    one, other = own / "layer_0/c.0.0.0", own / "layer_0/c.1.0.0"
    if one.stat().st_size != other.stat().st_size:
        pytest.skip("sizes differ, and so are told before")
    shutil.copyfile(other, one)
    with patch("os.link", refuse), pytest.raises(StoreDamagedError, match="not those that were sealed"):
        assemble(tmp_path / "new.zarr", [Piece(ActivationStore.open(own), 0, 24)])


def test_killed_at_every_third_durable_call_it_goes_on_to_the_same_bytes(
    sources: list["Made"], tmp_path: Path
) -> None:
    parts = [(0, 0, 8), (1, 4, 12), (0, 24, 28)]
    before = [tree(made.root) for made in sources]
    whole = tree(Path(assemble(tmp_path / "whole.zarr", pieces_of(sources, *parts), (0,)).root))
    calls = 0

    def run(root: Path, last: int) -> None:
        count = 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*words: Any, **named: Any) -> Any:
                nonlocal count, calls
                count += 1
                calls = count
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*words, **named)

            return call

        with ExitStack() as patches:
            for name in ("rename", "replace", "link", "unlink"):
                patches.enter_context(patch(f"os.{name}", counted(getattr(os, name))))
            assemble(root, pieces_of(sources, *parts), (0,))

    run(tmp_path / "counted.zarr", 0)
    assert calls > 50
    for number in range(1, calls + 1, 3):
        root = tmp_path / f"{number}.zarr"
        child = os.fork()
        if not child:
            try:
                run(root, number)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        store = assemble(root, pieces_of(sources, *parts), (0,))
        assert tree(Path(store.root)) == whole
        assert n_links(root)[0] > 1
        shutil.rmtree(root)
    assert [tree(made.root) for made in sources] == before


def test_a_shard_begun_by_linking_is_never_emptied_by_the_next_holder(
    sources: list["Made"], tmp_path: Path
) -> None:
    """Whoever gets the lock empties the temporary file; were it the link, the source would be empty."""
    before = tree(sources[0].root)
    child = os.fork()
    if not child:
        with patch.object(ShardWriter, "commit", kill_this_process):
            assemble(tmp_path / "new.zarr", pieces_of(sources, (0, 0, 28)), (0,))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list((tmp_path / "new.zarr").rglob("*.linked.partial"))) == 1
    store = assemble(tmp_path / "new.zarr", pieces_of(sources, (0, 0, 28)), (0,))
    assert tree(sources[0].root) == before
    assert verify(store)[:2] == ([], [])


def test_many_processes_make_one_store(sources: list["Made"], tmp_path: Path) -> None:
    parts = [(0, 0, 24), (1, 2, 24), (1, 24, 31)]
    whole = tree(Path(assemble(tmp_path / "whole.zarr", pieces_of(sources, *parts)).root))
    children: list[int] = []
    for _ in range(3):
        child = os.fork()
        if not child:
            try:
                assemble_quietly(tmp_path / "new.zarr", pieces_of(sources, *parts))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert tree(tmp_path / "new.zarr") == whole


def assemble_quietly(root: Path, pieces: Sequence[Piece]) -> None:
    assembly = Assembly(root, pieces, assembled_manifest(pieces))
    assembly.begin(LAYERS)
    assembly.fill(lambda _: None)
    assembly.finish()
