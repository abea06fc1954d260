"""What is planted is found, at equal size and L0, and where nothing is planted nothing is found."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch

from posae.pipeline import load_autoencoder
from posae.pipeline.sae.run_settings import train_presets, train_settings
from posae.pipeline.settings import PlantSettings, build
from posae.pipeline.stores.plant import Planting
from posae.pipeline.train import Training
from posae.pipeline.train.batches import ordered_batches
from posae.store.reader import ActivationStore

if TYPE_CHECKING:
    from ...conftest import MakeStore

LENGTH, D_MODEL, N_HELD_OUT, SEEDS = 16, 16, 64, (0, 1)
COMMON = train_presets()["batchtopk"] | {
    "dictionary_size": 32,
    "batch_size": 256,
    "window_contexts": 64,
    "device": "cpu",
}


class Case(NamedTuple):
    """What activations are made of, and what should find an effect in them."""

    n_directions: int
    active: int
    """Directions in an activation, on average; also the target L0."""
    aware: dict[str, Any]
    training: dict[str, Any]


MEAN = Case(96, 4, {"position_mean": "lowrank:2"}, {"steps": 300, "learning_rate": 4e-3})
ADAPTER = Case(
    24,
    2,
    {"position_adapter": "decoder:12", "ranges": "2", "warmup_steps": 0, "ramp_steps": 1},
    {"steps": 400, "learning_rate": 6e-3},
)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch("os.fsync"):
        yield
    torch.set_num_threads(threads)


class Laboratory:
    """Plants into made-up stores, and trains with and without positions."""

    def __init__(self, make_store: "MakeStore", folder: Path) -> None:
        self.make_store, self.folder = make_store, folder

    def source(self, case: Case) -> ActivationStore:
        """Activations that are sparse sums of directions, the same at every position."""
        rng = np.random.default_rng(0)
        directions = rng.standard_normal((case.n_directions, D_MODEL))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        shape = (320, LENGTH, case.n_directions)
        code = np.where(rng.random(shape) < case.active / case.n_directions, 1 + rng.random(shape), 0)
        noise = 0.05 * rng.standard_normal((*shape[:2], D_MODEL))
        bits = ((code @ directions + noise).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        self.make_store(
            self.folder / "source.zarr",
            n_contexts=320,
            context_length=LENGTH,
            d_model=D_MODEL,
            held_out=N_HELD_OUT,
            bits=bits,
        )
        return ActivationStore.open(self.folder / "source.zarr")

    def changes(self, case: Case, effect: dict[str, Any]) -> list[float]:
        """How the share of unexplained variance changes by knowing positions, in each seed."""
        settings = build(PlantSettings, effect, "")
        store = Planting(self.source(case), self.folder / "planted.zarr", settings).run().store

        def training(folder: str, given: dict[str, Any]) -> Training:
            words = COMMON | case.training | {"target_l0": case.active} | given
            return Training(store, self.folder / folder, train_settings(words, ""))

        def size(given: dict[str, Any]) -> int:
            return training("unused", given).new_autoencoder(None).n_parameters()

        wanted = size(case.aware)
        width = next(k for k in range(32, 320) if size({"dictionary_size": k}) >= wanted)
        assert size({"dictionary_size": width}) < wanted + 2 * D_MODEL + 2
        found: list[float] = []
        for seed in SEEDS:
            seeds = {"seed": seed, "data_seed": seed}
            plain = fvu(training(f"agnostic-{seed}", {"dictionary_size": width} | seeds))
            found.append(fvu(training(f"aware-{seed}", case.aware | seeds)) / plain - 1)
        return found


@pytest.fixture
def laboratory(make_store: "MakeStore", tmp_path: Path) -> Laboratory:
    return Laboratory(make_store, tmp_path)


def fvu(training: Training) -> float:
    """Train, and score the held-out part as one batch: so exactly the target L0 is kept."""
    training.train()
    autoencoder = load_autoencoder(training.run.folder).train()
    start, stop = training.store.held_out_part(training.layer)
    (batch,) = ordered_batches(
        training.store,
        training.layer,
        training.ranges,
        start=start,
        stop=stop,
        leave_out=training.leave_out,
        batch_contexts=N_HELD_OUT,
    )
    x = batch.on_device.float()
    with torch.no_grad():
        output = autoencoder(x, torch.as_tensor(batch.range_offsets), torch.as_tensor(batch.positions))
    assert (output.code != 0).float().sum(1).mean().item() == pytest.approx(
        training.settings.model_dump()["target_l0"]
    )
    return ((x - output.reconstruction).square().sum() / (x - x.mean(0)).square().sum()).item()


def test_planted_vectors_are_found_by_a_position_mean(laboratory: Laboratory) -> None:
    found = laboratory.changes(MEAN, {"effect": "additive", "strength": 0.4, "rank": 2})
    assert max(found) < -0.1


def test_where_nothing_is_planted_a_position_mean_finds_nothing(laboratory: Laboratory) -> None:
    assert mean(laboratory.changes(MEAN, {"effect": "none"})) == pytest.approx(0, abs=0.05)


def test_planted_rotations_are_found_by_an_adapter_of_the_decoder(laboratory: Laboratory) -> None:
    assert max(laboratory.changes(ADAPTER, {"effect": "rotation", "rank": 16, "ranges": "2"})) < -0.06


def test_where_nothing_is_planted_an_adapter_of_the_decoder_finds_nothing(laboratory: Laboratory) -> None:
    assert mean(laboratory.changes(ADAPTER, {"effect": "none"})) > -0.02
