"""``posae merge`` by real invocations: two harvests of the demo model made one store."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from posae.store import ActivationStore

from ..conftest import tree
from .conftest import Posae, call

SMALL = ("--contexts", 24, "--context-length", 16, "--layers", "1,2")
QUICK = ("--steps", "40", "--batch-size", "64", "--window-contexts", "8", "--log-steps", "10")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Contexts 0 to 23 of the corpus, and 24 to 47."""
    folder = tmp_path_factory.mktemp("merge")
    for name, skip in (("first", 0), ("second", 24)):
        assert call("harvest", folder / f"{name}.zarr", *SMALL, "--skip-contexts", skip) == 0
    return [folder / "first.zarr", folder / "second.zarr"]


def test_a_merge_holds_the_contexts_of_one_larger_harvest(
    posae: Posae, stores: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "both.zarr"
    ended = posae("merge", *stores, "--out", out)
    assert ended.code == 0, ended.err
    merged, parts = ActivationStore.open(out), [ActivationStore.open(store) for store in stores]
    assert f"48 contexts of 2 stores in layers 1, 2, sealed as {str(merged.identity)[:16]}" in ended.out
    assert "merging 768 tokens" in ended.err
    assert "tokens/s" in ended.err
    assert call("harvest", tmp_path / "large.zarr", *SMALL[2:], "--contexts", 48) == 0
    large = ActivationStore.open(tmp_path / "large.zarr")

    def contexts(store: ActivationStore) -> list[bytes]:
        rows = zip(store.tokens(), store.documents(), strict=True)
        return sorted(tokens.tobytes() + documents.tobytes() for tokens, documents in rows)

    assert contexts(merged) == contexts(large)
    assert merged.corpus == large.corpus
    order = [(0, slice(0, 16)), (1, slice(0, 16)), (0, slice(16, 24)), (1, slice(16, 24))]
    for layer in (1, 2):
        wanted = np.concatenate([parts[number].read(layer, some) for number, some in order])
        np.testing.assert_array_equal(merged.read(layer), wanted)
    facts = json.loads(posae("inspect-store", out, "--json", "--verify").out)
    assert (facts["verified"], facts["complete"], facts["held_out"]) == (True, True, [32, 48])
    shown = " ".join(posae("inspect-store", out).out.split())
    assert f"made of 0:16 of {str(parts[0].identity)[:16]}, 0:16 of {str(parts[1].identity)[:16]}" in shown
    before = tree(out)
    assert "already finished" in posae("merge", *stores, "-o", out).out
    assert tree(out) == before


def test_a_merge_trains_when_the_stores_are_gone(posae: Posae, stores: list[Path], tmp_path: Path) -> None:
    own = [Path(shutil.copytree(store, tmp_path / store.name)) for store in stores]
    assert posae("merge", *own, "--layers", "2", "--out", tmp_path / "both.zarr").code == 0
    for store in own:
        shutil.rmtree(store)
    ended = posae("train", tmp_path / "both.zarr", tmp_path / "run", *QUICK)
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["contexts"] == [32, 48]


def test_a_killed_merge_goes_on_to_the_same_bytes(stores: list[Path], tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed.zarr", tmp_path / "whole.zarr"
    for name in ("zarr.json", "stats/zarr.json", "layer_1/zarr.json"):
        merging = subprocess.Popen(
            [sys.executable, "-m", "posae", "merge", *map(str, stores), "--out", str(killed)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while merging.poll() is None and not (killed / name).exists():
            time.sleep(0.001)
        merging.send_signal(signal.SIGKILL)
        merging.wait()
        assert ActivationStore.open(killed).n_contexts in (0, 48)
    assert call("merge", *stores, "--out", killed) == 0
    assert call("merge", *stores, "--out", whole) == 0
    assert tree(killed) == tree(whole)


def test_stores_that_do_not_belong_together_end_with_one_line(
    posae: Posae, stores: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "none.zarr"
    ended = posae("merge", stores[0], stores[0], "--out", out)
    assert (ended.code, "both hold contexts 0 to 23 of the corpus" in ended.err) == (1, True)
    assert "--skip-contexts 24" in ended.err
    truncated = tmp_path / "truncated.zarr"
    assert posae("harvest", truncated, *SMALL, "--packing", "truncate", "--skip-contexts", 24).code == 0
    ended = posae("merge", stores[0], truncated, "--out", out)
    assert (ended.code, "packing is 'pack' and 'truncate'" in ended.err) == (1, True)
    assert ended.err.count("\n") == 1
    assert posae("merge", stores[0], "--out", out).code == 1
    assert posae("merge", *stores).code == 2
    assert not out.exists()


def test_a_harvest_does_not_go_on_in_a_merge(posae: Posae, stores: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "both.zarr"
    assert posae("merge", *stores, "--out", out).code == 0
    before = tree(out)
    ended = posae("harvest", out, *SMALL[2:], "--contexts", 48)
    assert (ended.code, "origin stores was (" in ended.err) == (1, True)
    assert tree(out) == before
