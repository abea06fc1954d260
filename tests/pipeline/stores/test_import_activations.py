"""Activations of other programs become a store with the same values, and what is not known is marked."""

import json
import pickle
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch
from numpy.typing import NDArray

from posae.pipeline.errors import ForeignFileError
from posae.pipeline.settings import ImportSettings, build
from posae.pipeline.stores.import_activations import Import, ImportedStore
from posae.store import ActivationStore
from posae.store.card import card
from posae.store.errors import PosaeError, SettingsError, StoreMismatchError
from posae.store.stats import bits_to_float32
from posae.store.verify import verify

safetensors = cast(Any, safetensors_torch)
N, LENGTH, D_MODEL, LAYER = 41, 6, 16, 3
TOKENS = np.random.default_rng(1).integers(0, 50, (N, LENGTH))


def values(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


ACTIVATIONS = values(N, LENGTH, D_MODEL)
BITS = torch.as_tensor(ACTIVATIONS).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk keeps is tested elsewhere."""

    def passed_over(_: object) -> None: ...

    monkeypatch.setattr("os.fsync", passed_over)


def imported(source: Path, path: Path, **settings: Any) -> ImportedStore:
    return Import(source, path, build(ImportSettings, {"layer": LAYER} | settings, "")).run()


def as_dataset(folder: Path, hook: str = f"blocks.{LAYER}.hook_resid_post") -> Path:
    """As SAELens' ``CacheActivationsRunner`` saves it."""
    datasets: Any = import_module("datasets")
    features = datasets.Features(
        {
            hook: datasets.Array2D(shape=(LENGTH, D_MODEL), dtype="float32"),
            "token_ids": datasets.Sequence(datasets.Value(dtype="int32"), length=LENGTH),
        }
    )
    columns = {hook: ACTIVATIONS, "token_ids": TOKENS.astype(np.int32)}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    return folder


def as_safetensors(path: Path) -> Path:
    x = torch.as_tensor(ACTIVATIONS).to(torch.bfloat16)
    path.write_bytes(safetensors.save({"activations": x, "tokens": torch.as_tensor(TOKENS)}))
    return path


def as_pt(path: Path) -> Path:
    torch.save(
        {"acts": torch.as_tensor(ACTIVATIONS).double(), "input_ids": torch.as_tensor(TOKENS), "note": "a"},
        path,
    )
    return path


def as_npy(path: Path) -> Path:
    np.save(path, ACTIVATIONS)
    return path


KINDS: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "saelens": ("cached", as_dataset, "float32"),
    "safetensors": ("a.safetensors", as_safetensors, "bfloat16"),
    "pt": ("a.pt", as_pt, "float64"),
    "npy": ("a.npy", as_npy, "float32"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets")
@pytest.mark.parametrize("kind", KINDS)
def test_contexts_become_a_store(kind: str, tmp_path: Path) -> None:
    name, write, dtype = KINDS[kind]
    source = write(tmp_path / name)
    settings = {"layer": None} if kind == "saelens" else {}
    done = imported(source, tmp_path / "s.zarr", **settings)
    assert (done.n_tokens, done.n_left_out) == (N * LENGTH, 0)
    store = ActivationStore.open(tmp_path / "s.zarr")
    assert store.is_sealed
    assert not store.corpus
    assert not verify(store).damaged
    assert np.array_equal(store.read(LAYER), BITS)
    known = kind != "npy"
    assert np.array_equal(store.tokens(), TOKENS if known else np.zeros_like(TOKENS))
    manifest = store.manifest
    assert manifest.imported
    assert (manifest.imported.kind, manifest.imported.dtype) == (kind, dtype)
    without = () if known else ("tokens",)
    assert manifest.unknown == ("documents", "model", "special_tokens", *without)
    assert (manifest.dataset, manifest.held_out) == (name, (40, N))
    assert manifest.vocabulary_size == (TOKENS.max() + 1 if known else 1)
    stats = store.stats(LAYER)
    assert stats.counts.tolist() == [40] * LENGTH
    np.testing.assert_allclose(stats.sums, bits_to_float32(BITS[:40]).sum(0, dtype=np.float64), rtol=1e-5)
    # Again it is all there.
    if kind == "saelens":
        (source / "cache-0123456789abcdef.arrow").write_bytes(b"datasets keeps such files there")
    assert imported(source, tmp_path / "s.zarr", **settings).n_tokens == 0


def test_other_readers_read_it(tmp_path: Path) -> None:
    imported(as_npy(tmp_path / "a.npy"), tmp_path / "s.zarr")
    zarr: Any = import_module("zarr")
    cast(Any, import_module("posae.store")).register_bfloat16()
    bits = zarr.open_group(str(tmp_path / "s.zarr"), mode="r")[f"layer_{LAYER}"][:]
    assert np.array_equal(bits, BITS)
    tensorstore: Any = import_module("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/s.zarr/layer_{LAYER}/"}}
    found = tensorstore.open(spec, read=True).result().read().result()
    assert np.array_equal(found.view(np.uint16), BITS)


def test_rows_become_contexts_without_positions(tmp_path: Path) -> None:
    rows = values(103, D_MODEL)
    folder = tmp_path / "shards"
    folder.mkdir()
    # The tenth comes after the ninth, and shards need not be whole contexts.
    edges = [0, 1, 9, 10, 22, 31, 50, 51, 64, 77, 103]
    for number, (start, stop) in enumerate(pairwise(edges)):
        np.save(folder / f"part_{number + 1}.npy", rows[start:stop].astype(np.float16))
    done = imported(folder, tmp_path / "s.zarr", context_length=10, model="some-model")
    assert done.n_left_out == 3
    store = done.store
    assert store.manifest.unknown == ("documents", "positions", "special_tokens", "tokens")
    halves = rows[:100].astype(np.float16).astype(np.float32)
    wanted = torch.as_tensor(halves).to(torch.bfloat16).float().numpy().reshape(10, 10, D_MODEL)
    assert np.array_equal(store.read(LAYER, dtype="float32"), wanted)
    text = card(store)
    assert "not known: documents, positions, special tokens, tokens" in text
    assert "random order" not in text


def test_rows_may_be_whole_contexts_if_said_so(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ACTIVATIONS.reshape(-1, D_MODEL))
    done = imported(tmp_path / "a.npy", tmp_path / "s.zarr", context_length=LENGTH, positions=True)
    assert "positions" not in done.store.manifest.unknown
    assert np.array_equal(done.store.read(LAYER), BITS)
    with pytest.raises(SettingsError, match="not whole contexts of 7"):
        imported(tmp_path / "a.npy", tmp_path / "t.zarr", context_length=7, positions=True)
    np.save(tmp_path / "b.npy", ACTIVATIONS)
    done = imported(tmp_path / "b.npy", tmp_path / "b.zarr", positions=False)
    assert "positions" in done.store.manifest.unknown


def test_token_ids_of_rows(tmp_path: Path) -> None:
    x, ids = torch.as_tensor(ACTIVATIONS).reshape(-1, D_MODEL), torch.as_tensor(TOKENS).reshape(-1)
    (tmp_path / "a.safetensors").write_bytes(safetensors.save({"x": x, "token_ids": ids}))
    done = imported(
        tmp_path / "a.safetensors", tmp_path / "s.zarr", context_length=LENGTH, special_token_ids=(0, 1)
    )
    assert np.array_equal(done.store.tokens(), TOKENS)
    assert done.store.manifest.unknown == ("documents", "model", "positions")
    ordinary = ~np.isin(TOKENS, (0, 1))
    assert done.store.stats(LAYER).counts.sum() == ordinary[:40].sum()


def test_killed_it_goes_on_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", values(1100, LENGTH, 4))
    imported(tmp_path / "a.npy", tmp_path / "whole.zarr")
    work = Import(tmp_path / "a.npy", tmp_path / "killed.zarr", ImportSettings(layer=LAYER))
    read = work.cache.read

    def cut_off(start: int, stop: int) -> NDArray[np.uint16]:
        if start >= 700:
            raise KeyboardInterrupt
        return read(start, stop)

    monkeypatch.setattr(work.cache, "read", cut_off)
    monkeypatch.setattr("posae.pipeline.stores.import_activations._ROWS_AT_ONCE", 64 * LENGTH)
    with pytest.raises(KeyboardInterrupt):
        work.run()
    begun = ActivationStore.open(tmp_path / "killed.zarr")
    assert (begun.is_sealed, begun.n_contexts) == (False, 512)
    done = imported(tmp_path / "a.npy", tmp_path / "killed.zarr")
    assert done.n_tokens == (1100 - 512) * LENGTH
    for path in sorted((tmp_path / "whole.zarr").rglob("*")):
        if path.is_file():
            assert (
                tmp_path / "killed.zarr" / path.relative_to(tmp_path / "whole.zarr")
            ).read_bytes() == path.read_bytes()
    np.save(tmp_path / "a.npy", values(1101, LENGTH, 4))
    with pytest.raises(StoreMismatchError, match="begun with other settings"):
        imported(tmp_path / "a.npy", tmp_path / "killed.zarr")


class Evil:
    """Would leave a mark, were it unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil(mark)))
    torch.save({"x": torch.zeros(16, 4), "evil": Evil(mark)}, tmp_path / "b.pt")
    np.save(tmp_path / "c.npy", np.array([Evil(mark)], dtype=object), allow_pickle=True)
    for name in ("a.pt", "b.pt", "c.npy"):
        with pytest.raises(ForeignFileError, match="not only plain tensors"):
            imported(tmp_path / name, tmp_path / "s.zarr")
    assert not mark.exists()
    assert not (tmp_path / "s.zarr").exists()


def tensors(path: Path, **named: torch.Tensor) -> Path:
    path.write_bytes(safetensors.save(named))
    return path


REFUSED: list[tuple[str, dict[str, Any], type[PosaeError], str]] = [
    ("nowhere.npy", {}, ForeignFileError, "no such file or folder"),
    ("text.txt", {}, ForeignFileError, "convert it"),
    ("mixed", {}, ForeignFileError, "several kinds"),
    ("empty", {}, ForeignFileError, "there are none"),
    ("cut.npy", {}, ForeignFileError, "damaged"),
    ("cut.safetensors", {}, ForeignFileError, "damaged"),
    ("integers.npy", {}, ForeignFileError, "the tensor of activations is unclear"),
    ("two.safetensors", {}, ForeignFileError, "'a', 'b'\\); choose one with --tensor"),
    ("two.safetensors", {"tensor": "c"}, ForeignFileError, "choose one with --tensor"),
    ("other_ids.safetensors", {}, ForeignFileError, "ids of the same tokens"),
    ("negative_ids.safetensors", {}, ForeignFileError, "token ids are not all"),
    ("nan.npy", {}, ForeignFileError, "contexts 0 to 8 is not finite"),
    ("nan_of_a_gpu.npy", {}, ForeignFileError, "contexts 0 to 8 is not finite"),
    ("huge.npy", {}, ForeignFileError, "too large for bfloat16"),
    ("few.npy", {}, SettingsError, "fill no context"),
    ("good.npy", {"layer": None}, SettingsError, "give it with --layer"),
    ("good.npy", {"layer": 2**20}, SettingsError, "layers are below"),
    ("good.npy", {"context_length": 5}, SettingsError, "leave out --context-length"),
    ("good.npy", {"special_token_ids": (1,)}, SettingsError, "no token ids"),
    ("good.npy", {"tensor": "x"}, ForeignFileError, "the tensor of activations is unclear"),
    ("wide.npy", {"context_length": 2**13}, SettingsError, "choose a smaller --context-length"),
    ("uneven", {}, ForeignFileError, "not of the form"),
    ("mlp", {"layer": None}, SettingsError, "residual stream after a block"),
    ("cached", {"layer": 2}, SettingsError, "which is layer 3"),
    ("torn", {}, ForeignFileError, "datasets cannot read it"),
    ("cut", {}, ForeignFileError, "datasets cannot read it"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each thing that cannot be imported, and some that can."""
    root = tmp_path_factory.mktemp("sources")
    (root / "text.txt").write_text("a")
    for name in ("mixed", "empty", "uneven"):
        (root / name).mkdir()
    x = values(9, 6, 4)
    np.save(root / "mixed" / "a.npy", x)
    tensors(root / "mixed" / "b.safetensors", a=torch.zeros(4, 4))
    np.save(root / "good.npy", x)
    for name in ("cut.npy", "cut.safetensors"):
        whole = np.save(root / "w.npy", x) or root / "w.npy"
        if name.endswith("safetensors"):
            whole = tensors(root / "w.safetensors", a=torch.as_tensor(x))
        (root / name).write_bytes(whole.read_bytes()[:-100])
    np.save(root / "integers.npy", np.ones((9, 6, 4), np.int32))
    tensors(root / "two.safetensors", a=torch.zeros(4, 4), b=torch.zeros(4, 4), c=torch.zeros(4))
    tensors(
        root / "other_ids.safetensors", a=torch.zeros(4, 4, 4), tokens=torch.zeros(4, 5, dtype=torch.int64)
    )
    tensors(root / "negative_ids.safetensors", a=torch.zeros(4, 4, 4), tokens=torch.full((4, 4), -1))
    np.save(root / "nan.npy", np.where(x == x[0, 0, 0], np.nan, x))
    all_ones = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    np.save(root / "nan_of_a_gpu.npy", np.where(x == x[0, 0, 0], all_ones, x))
    np.save(root / "huge.npy", x.astype(np.float64) * 1e39)
    np.save(root / "few.npy", values(100, 4))
    np.lib.format.open_memmap(root / "wide.npy", "w+", np.float16, (2**13, 2**15))  # a file of holes
    np.save(root / "uneven" / "a.npy", x)
    np.save(root / "uneven" / "b.npy", values(9, 5, 4))
    as_dataset(root / "mlp", f"blocks.{LAYER}.hook_mlp_out")
    as_dataset(root / "cached")
    as_dataset(root / "torn")
    (root / "torn" / "state.json").write_text("{}")
    data = next(as_dataset(root / "cut").glob("data-*"))
    data.write_bytes(data.read_bytes()[:-5000])
    return root


@pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets")
@pytest.mark.parametrize(("name", "settings", "kind", "said"), REFUSED)
def test_what_cannot_be_imported_is_refused(
    name: str, settings: dict[str, Any], kind: type[PosaeError], said: str, sources: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said) as refused:
        imported(sources / name, tmp_path / "s.zarr", **settings)
    assert "\n" not in str(refused.value)


def test_a_store_says_in_its_files_that_it_was_imported(tmp_path: Path) -> None:
    imported(as_npy(tmp_path / "a.npy"), tmp_path / "s.zarr")
    root = json.loads((tmp_path / "s.zarr" / "zarr.json").read_text())
    assert root["attributes"]["posae"]["imported"] == {
        "kind": "npy",
        "dtype": "float32",
        "unknown": ["documents", "model", "special_tokens", "tokens"],
    }
