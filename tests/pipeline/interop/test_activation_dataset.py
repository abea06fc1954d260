"""Other trainers get the tokens that posae's would, in the same order, with any number of workers."""

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from posae.pipeline.interop.activation_dataset import ActivationBuffer, ActivationDataset, Rows
from posae.pipeline.ranges import equal_ranges
from posae.pipeline.train.batches import shuffled_batches
from posae.store import ActivationStore
from posae.store.errors import StoreIncompleteError, StoreNotFoundError

if TYPE_CHECKING:
    from ...conftest import Made, MakeStore

OPTIONS: dict[str, Any] = {"batch_size": 32, "window_contexts": 16, "seed": 3}


@pytest.fixture(scope="module")
def made(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> "Made":
    root = tmp_path_factory.mktemp("dataset") / "store.zarr"
    return make_store(root, n_contexts=60, layers=(1, 2), held_out=12)


def rows(dataset: ActivationDataset, **loader: Any) -> list[Rows]:
    return list(DataLoader(dataset, batch_size=None, **loader))


def test_an_epoch_has_each_ordinary_token_of_the_training_part_once(made: "Made") -> None:
    found = rows(ActivationDataset(made.root, 2, **OPTIONS))
    sizes = [len(batch.activations) for batch in found]
    assert max(sizes) <= 48
    x = torch.cat([batch.activations for batch in found])
    assert x.dtype == torch.float32
    contexts, at = np.nonzero(made.ordinary)
    wanted = (made.activations[2][contexts, at].astype(np.uint32) << 16).view(np.float32)
    ids, positions = (torch.cat([batch[i] for batch in found])[:, None].float() for i in (2, 1))
    there = np.column_stack([wanted, made.tokens[contexts, at], at]).astype(np.float32)
    got = torch.cat([x, ids, positions], dim=1).numpy()
    assert np.array_equal(there[np.lexsort(there.T)], got[np.lexsort(got.T)])


def test_batches_are_those_of_a_training(made: "Made") -> None:
    opened = ActivationStore.open(made.root)
    special = made.manifest.special_token_ids
    theirs = shuffled_batches(opened, 1, equal_ranges(6, 1), steps=9, leave_out=special, **OPTIONS)
    mine = list(ActivationDataset(opened, 1, steps=9, dtype=torch.bfloat16, **OPTIONS))
    for batch, found in zip(theirs, mine, strict=True):
        assert torch.equal(batch.on_device, found.activations)
        assert np.array_equal(batch.positions, found.positions)
        assert np.array_equal(batch.tokens, found.tokens)


def test_special_tokens_are_given_if_asked_for(made: "Made") -> None:
    found = rows(ActivationDataset(made.root, 1, special_tokens=True, **OPTIONS))
    assert (
        sum(len(batch.tokens) for batch in found) == made.manifest.held_out[0] * made.manifest.context_length
    )


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # PyTorch's own way
def test_workers_change_nothing(made: "Made") -> None:
    dataset = ActivationDataset(made.root, 1, steps=7, **OPTIONS)
    alone = rows(dataset)
    workers = rows(dataset, num_workers=2)
    assert len(workers) == 7
    for mine, theirs in zip(alone, workers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_it_can_be_iterated_again_and_sent_to_other_processes(made: "Made") -> None:
    dataset = ActivationDataset(made.root, 1, steps=3, **OPTIONS)
    again = pickle.loads(pickle.dumps(dataset))
    for one, other in zip(list(dataset), list(again), strict=True):
        assert torch.equal(one.activations, other.activations)
    assert len(list(dataset)) == 3


def test_a_buffer_gives_the_activations_alone(made: "Made") -> None:
    dataset = ActivationDataset(made.root, 1, steps=3, **OPTIONS)
    buffer = ActivationBuffer(dataset)
    for x, batch in zip(buffer, dataset, strict=True):
        assert torch.equal(x, batch.activations)
    assert buffer.config["layer"] == 1


def test_what_is_not_there_is_told_at_once(made: "Made", tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        ActivationDataset(tmp_path / "nowhere", 1)
    with pytest.raises(StoreIncompleteError, match="layer 5"):
        ActivationDataset(made.root, 5)
