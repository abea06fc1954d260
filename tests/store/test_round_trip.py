"""What goes into a store comes out bit for bit: through posae, zarr-python and tensorstore."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import posae.store
from posae.store import ActivationStore
from posae.store.files import StoreFiles
from posae.store.manifest import layer_spec, token_specs
from posae.store.shard_writer import write_array
from posae.store.shards import ShardReader
from posae.store.stats import stats_specs
from posae.store.verify import verify

if TYPE_CHECKING:
    from ..conftest import Made, MakeStore

posae.store.register_bfloat16()
tensorstore: Any = pytest.importorskip("tensorstore")
open_array: Any = cast("Any", zarr).open_array
open_group: Any = cast("Any", xarray).open_zarr

EXPONENT = 0x7F80
CODECS = ("small", "fast", "raw")


def finite(bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return np.where(bits & EXPONENT == EXPONENT, bits & ~np.uint16(0x0100), bits)


shapes = st.tuples(
    st.sampled_from([1, 7, 8, 9, 511, 512, 513]) | st.integers(1, 60), st.integers(2, 9), st.integers(1, 20)
)


@st.composite
def activations(draw: st.DrawFn) -> NDArray[np.uint16]:
    shape = draw(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    patterns = draw(st.sampled_from([[0, 0x8000, 1, 0x7F7F, 0xFF7F], [0x3F80], None]))
    bits = rng.integers(0, 2**16, shape, np.uint16) if patterns is None else rng.choice(patterns, shape)
    return finite(bits.astype(np.uint16))


def by_zarr(root: Path, path: str) -> NDArray[Any]:
    array = open_array(root / path, mode="r")
    return array[:]


def by_tensorstore(root: Path, path: str) -> NDArray[Any]:
    place = {"driver": "file", "path": str(root / path)}
    values = np.asarray(
        tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result().read().result()
    )
    return values.view(np.uint16) if values.dtype.name == "bfloat16" else values


@settings(max_examples=25, deadline=None)
@given(bits=activations(), codec=st.sampled_from(CODECS), seed=st.integers(0, 9), seal=st.booleans())
def test_every_array_comes_out_as_it_went_in(
    make_store: "MakeStore", bits: NDArray[np.uint16], codec: str, seed: int, seal: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        n_contexts, length, d_model = bits.shape
        made = make_store(
            Path(folder) / "a.zarr",
            n_contexts=n_contexts,
            context_length=length,
            d_model=d_model,
            layers=(2,),
            codec=codec,
            seed=seed,
            seal=seal,
            bits=bits,
        )
        store = ActivationStore.open(made.root)
        np.testing.assert_array_equal(store.read(2), bits)
        np.testing.assert_array_equal(store.tokens(), made.tokens)
        np.testing.assert_array_equal(store.documents(), made.documents)
        assert verify(store).damaged == []
        written: dict[str, NDArray[Any]] = {
            "layer_2": bits,
            "tokens": made.tokens,
            "document": made.documents,
            "position": np.arange(length),
        }
        for oracle in (by_zarr, by_tensorstore):
            for path, values in written.items():
                np.testing.assert_array_equal(oracle(made.root, path), values)
            for spec in stats_specs(made.manifest, 2).values():
                values = store.array(spec.path).read_rows(np.arange(spec.shape[0]))
                np.testing.assert_array_equal(oracle(made.root, spec.path), values)


@pytest.mark.filterwarnings(r"ignore:Object at (seal\.json|\.lock)")  # zarr-python, of what is not Zarr
@pytest.mark.parametrize("options", [{}, {"mask_and_scale": False}], ids=["plain", "bits"])
def test_xarray_opens_the_group_with_named_axes(good_store: "Made", options: dict[str, bool]) -> None:
    dataset = open_group(good_store.root, consolidated=False, **options)
    assert dict(dataset.sizes) == {"context": 41, "position": 6, "feature": 16}
    for layer, bits in good_store.activations.items():
        found = dataset[f"layer_{layer}"]
        assert found.dims == ("context", "position", "feature")
        np.testing.assert_array_equal(found.isel(context=[40, 2], position=3).values, bits[[40, 2], 3])
    np.testing.assert_array_equal(dataset["tokens"].values, good_store.tokens)
    assert dataset["position"].values.tolist() == [0, 1, 2, 3, 4, 5]


def as_floats(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


@st.composite
def selections(draw: st.DrawFn, size: int) -> Any:
    edge = st.none() | st.integers(-size, size)
    indices = st.integers(-size, size - 1)
    return draw(
        st.builds(slice, edge, edge, st.none() | st.integers(-5, 5).filter(bool))
        | st.lists(indices, max_size=12)
        | st.lists(indices, max_size=12).map(lambda found: np.array(found, np.int64))
        | st.lists(st.booleans(), min_size=size, max_size=size)
    )


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_selection_reads_what_numpy_would(good_store: "Made", data: st.DataObject) -> None:
    contexts, positions = data.draw(selections(41)), data.draw(selections(6))
    store = ActivationStore.open(good_store.root)
    all_contexts = good_store.activations[3]
    expected = all_contexts[np.arange(41)[contexts]][:, np.arange(6)[positions]]
    np.testing.assert_array_equal(store.read(3, contexts, positions), expected)
    np.testing.assert_array_equal(store.read(3, contexts, positions, "float32"), as_floats(expected))
    np.testing.assert_array_equal(store.tokens(contexts), good_store.tokens[np.arange(41)[contexts]])


def test_rows_of_whole_chunks_in_any_order(good_store: "Made") -> None:
    store, rng = ActivationStore.open(good_store.root), np.random.default_rng(0)
    orders = [np.arange(16).reshape(2, 8).T.ravel(), np.arange(16).reshape(8, 2).T.ravel(), np.arange(32) % 8]
    for rows in [*orders, *(rng.permutation(41) for _ in range(20))]:
        np.testing.assert_array_equal(store.read(0, rows), good_store.activations[0][rows])


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF])
def test_what_is_not_finite_is_refused(make_store: "MakeStore", tmp_path: Path, bits: int) -> None:
    values = np.zeros((9, 3, 4), np.uint16)
    values[8, 1, 2] = bits
    with pytest.raises(FloatingPointError):
        make_store(tmp_path / "a.zarr", n_contexts=9, context_length=3, d_model=4, bits=values)
    store = ActivationStore.open(tmp_path / "a.zarr")
    assert (store.n_contexts, store.is_sealed) == (0, False)
    assert [path for path in store.files.walk() if "partial" in path] == []


@pytest.mark.parametrize("codec", CODECS)
def test_shard_files_are_those_of_zarr_python(make_store: "MakeStore", tmp_path: Path, codec: str) -> None:
    made = make_store(
        tmp_path / "ours.zarr", n_contexts=37, d_model=33, codec=codec, held_out=8, shard_contexts=16
    )
    specs = [layer_spec(made.manifest, 1), *token_specs(made.manifest).values()]
    specs += stats_specs(made.manifest, 1).values()
    for spec in specs:
        theirs = tmp_path / "theirs.zarr" / spec.path
        theirs.mkdir(parents=True)
        (theirs / "zarr.json").write_bytes((made.root / spec.metadata_path).read_bytes())
        array = open_array(theirs, mode="r+")
        array[:] = by_zarr(made.root, spec.path)
        for shard in range(spec.n_shards):
            ours = (made.root / spec.shard_path(shard)).read_bytes()
            assert (tmp_path / "theirs.zarr" / spec.shard_path(shard)).read_bytes() == ours, spec.path


def test_the_padding_of_the_last_chunk_is_fill(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=9, codec="raw")
    for path in ("layer_1", "tokens", "document"):
        metadata = json.loads((made.root / path / "zarr.json").read_bytes())
        assert metadata["shape"][0] == 9
        metadata["shape"][0] = 16
        (made.root / path / "zarr.json").write_text(json.dumps(metadata))
    assert (by_zarr(made.root, "layer_1")[9:] == 0x7FC0).all()
    assert (by_zarr(made.root, "tokens")[9:] == -1).all()
    assert (by_zarr(made.root, "document")[9:] == -1).all()
    assert (by_zarr(made.root, "layer_1")[:9] == made.activations[1]).all()


def test_a_chunk_of_nothing_but_fill_is_written_all_the_same(tmp_path: Path, good_store: "Made") -> None:
    spec, files = token_specs(good_store.manifest)["tokens"], StoreFiles(tmp_path)
    write_array(files, spec, np.full(spec.shape, -1, np.int32))
    assert (ShardReader(files, spec).read_rows(np.arange(41)) == -1).all()
