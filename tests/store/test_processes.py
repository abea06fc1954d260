"""A store in other processes: forked while threads read it, pickled, and in the workers of a DataLoader."""

import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from posae.store import ActivationStore
from posae.store.errors import StoreMismatchError, StoreRemoteError
from posae.store.remote.cache import PartCache

if TYPE_CHECKING:
    from ..conftest import Made, MakeStore
    from ..servers import StartServer

SECONDS = 100
METHODS = ["fork", "spawn", "forkserver"]


class Contexts(Dataset[torch.Tensor]):
    """A data set as anybody writes it: it holds an opened store."""

    def __init__(self, store: ActivationStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return self.store.n_contexts

    def __getitem__(self, context: int) -> torch.Tensor:
        return torch.as_tensor(self.store.read(1, [context], dtype="float32")[0])


@contextmanager
def another_thread_reads(store: ActivationStore) -> Generator[None]:
    """Readers that hold locks at any moment, and open shards again and again."""
    stopped = threading.Event()

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not stopped.is_set():
            store.read(1, rng.integers(0, store.n_contexts, 5))
            store.tokens(rng.integers(0, store.n_contexts, 5))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def in_a_forked_child(work: Callable[[], bool]) -> None:
    """Let a child do it, which is ended if it hangs."""
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)  # as the child has no watcher of tests
        os._exit(0 if work() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_child_forked_while_threads_read_reads_the_same(
    make_store: "MakeStore", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posae.store.shards._MAPS_KEPT", 4)
    made = make_store(tmp_path / "a.zarr", n_contexts=200, shard_contexts=8)
    store = ActivationStore.open(made.root)

    def same() -> bool:
        return bool((store.read(1) == made.activations[1]).all() and (store.tokens() == made.tokens).all())

    assert same()
    with another_thread_reads(store):
        for _ in range(30):
            in_a_forked_child(same)
    assert same()


@pytest.mark.parametrize("method", METHODS)
def test_workers_of_a_data_loader_share_a_store(make_store: "MakeStore", tmp_path: Path, method: str) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=40, shard_contexts=8)
    store = ActivationStore.open(made.root)
    expected = store.read(1, dtype="float32")
    loader = DataLoader(
        Contexts(store), batch_size=8, num_workers=2, multiprocessing_context=method, timeout=SECONDS
    )
    with another_thread_reads(store):
        found = torch.cat(list(loader)).numpy()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_store_on_a_server_works_in_new_processes_and_a_forked_one_says_so(
    make_store: "MakeStore", tmp_path: Path, start_server: "StartServer", method: str
) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=40, shard_contexts=8)
    store = ActivationStore.open(start_server("http").fill(made.root, "a.zarr"), PartCache(tmp_path / method))
    loader = DataLoader(
        Contexts(store), batch_size=8, num_workers=2, multiprocessing_context=method, timeout=SECONDS
    )
    if method == "fork":
        with pytest.raises(StoreRemoteError, match=r"was forked cannot read .* by spawn"):
            list(loader)
    else:
        np.testing.assert_array_equal(torch.cat(list(loader)).numpy(), store.read(1, dtype="float32"))


def test_a_pickled_store_is_opened_where_it_lies(
    good_store: "Made", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(good_store.root.parent)
    pickled = pickle.dumps(ActivationStore.open(good_store.root.name))
    assert len(pickled) < 1000
    monkeypatch.chdir(tmp_path)
    store: ActivationStore = pickle.loads(pickled)
    assert (store.layers, store.n_contexts, store.is_sealed) == ((0, 3), 41, True)
    np.testing.assert_array_equal(store.read(3), good_store.activations[3])


def test_a_pickled_store_that_is_another_one_by_now_is_refused(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    made = make_store(tmp_path / "a.zarr")
    pickled = pickle.dumps(ActivationStore.open(made.root))
    made.root.rename(tmp_path / "old.zarr")
    make_store(tmp_path / "a.zarr", seed=1)
    with pytest.raises(StoreMismatchError, match="was replaced by another store"):
        pickle.loads(pickled)
