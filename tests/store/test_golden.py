"""Stores that the first release wrote open, verify and read the same, for ever."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from posae.store import ActivationStore
from posae.store.rounding import round_mantissas
from posae.store.verify import verify
from posae.store.writer import StoreWriter

from ..conftest import tree

GOLDEN = Path(__file__).parents[1] / "golden"
ROOT, ROUNDED = GOLDEN / "format-1.zarr", GOLDEN / "format-1-rounded.zarr"
IDENTITY = {
    ROOT: "1dc524182b59b455aabaf4b0c4ade3eba9ae94b660a7e236cdad97836f5f7ef4",
    ROUNDED: "048cb81be7ee53ddda2e317e159548d2f1409fce202d48a8bd5c1270449f0544",
}
MADE_WITH = {"numpy": "2.4.6", "numcodecs": "0.16.6"}
ACTIVATIONS = {
    0: "95cc31d9f9b94a1ae14a583f295f71df6e2b7ae4654e7d34aa26a370f19f238a",
    3: "b4dc73af8cf278a2ad9a7f8a457fa51927a5c2da87d31fbc4ceebd2e0ba5d272",
}


def test_it_opens_verifies_and_has_these_values() -> None:
    store = ActivationStore.open(ROOT)
    found = verify(store)
    assert (found.damaged, found.foreign) == ([], [])
    assert store.identity == IDENTITY[ROOT]
    assert (store.layers, store.n_contexts, store.context_length, store.d_model) == ((0, 3), 20, 6, 16)
    assert store.held_out_part(0) == (16, 20)
    assert (store.manifest.model, store.manifest.versions) == ("golden", MADE_WITH)
    assert store.corpus["documents"] == 7
    for layer, digest in ACTIVATIONS.items():
        assert hashlib.sha256(store.read(layer).tobytes()).hexdigest() == digest
    first, last = [15925, 16178, 15668, 48458, 16094, 48939, 49064], [48507, 15551, 15504, 15588, 49243]
    assert store.read(3, [17], [5])[0, 0, :7].tolist() == first
    assert store.read(3, [17], [5])[0, 0, -5:].tolist() == last
    assert store.tokens([0, 19]).tolist() == [[2, 45, 76, 19, 65, 87], [2, 74, 97, 52, 9, 59]]
    assert store.stats(0).counts.tolist() == [0, 14, 13, 13, 12, 14]
    assert store.norms(0).mean[:2] == pytest.approx([5.10280359, 4.74109565])
    assert store.norms(3).median == pytest.approx(4.36203093)
    assert (store.manifest.mantissa_bits, store.rounding_error(0)) == (None, None)
    assert store.compression_bound(0) is None, "of the first stores no bytes were counted"


def test_the_rounded_one_says_what_was_lost() -> None:
    store, exact = ActivationStore.open(ROUNDED), ActivationStore.open(ROOT)
    found = verify(store)
    assert (found.damaged, found.foreign) == ([], [])
    assert store.identity == IDENTITY[ROUNDED]
    for layer in ACTIVATIONS:
        assert (store.read(layer) == round_mantissas(exact.read(layer), 5)).all()
    error = store.rounding_error(0)
    assert error is not None
    assert error.relative == pytest.approx(0.006420644992771062)
    assert error.fvu == pytest.approx(4.2527207650442896e-05)
    assert store.compression_bound(0) == pytest.approx(1.7763509540344669)


@pytest.mark.parametrize("root", [ROOT, ROUNDED], ids=lambda root: root.name)
def test_writing_it_anew_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    for name, then in MADE_WITH.items():
        if version(name) != then:
            pytest.skip(f"{name} {version(name)} may compress or sum otherwise than {then}")
    old = ActivationStore.open(root)
    exact = ActivationStore.open(ROOT)
    tokens = old.tokens()
    ordinary = ~np.isin(tokens, old.manifest.special_token_ids)
    ordinary[old.manifest.held_out[0] :] = False
    writer = StoreWriter.begin(tmp_path / "new.zarr", old.manifest)
    with writer.lock():
        writer.write_tokens(tokens, old.documents(), old.corpus)
        writer.add_layers(old.layers)
    shard = writer.lock_shard(old.layers, 0, wait=True)
    assert shard is not None
    with shard, ThreadPoolExecutor(1) as pool:
        for layer in old.layers:
            shard.append(layer, exact.read(layer), ordinary, pool)
        shard.commit()
    assert writer.seal() == IDENTITY[root]
    assert tree(writer.root) == tree(root)
