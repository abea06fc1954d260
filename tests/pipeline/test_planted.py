"""What is planted is found, at equal size and L0, and where nothing is planted nothing is found."""

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from posae.pipeline.evaluate import evaluate
from posae.pipeline.plant import Planting
from posae.pipeline.settings import (
    TRAIN_PRESETS,
    EvaluateSettings,
    PlantSettings,
    TrainSettings,
    build,
)
from posae.pipeline.train import Training
from posae.store.reader import ActivationStore

if TYPE_CHECKING:
    from ..conftest import MakeStore

LENGTH, D_MODEL, N_TRUE, TRUE_L0 = 16, 16, 96, 4
SEEDS = (0, 1, 2)
COMMON = TRAIN_PRESETS["batchtopk"] | {
    "dictionary_size": 48,
    "target_l0": TRUE_L0,
    "steps": 400,
    "batch_size": 256,
    "window_contexts": 64,
    "learning_rate": 4e-3,
    "log_steps": 250,
    "checkpoint_steps": 250,
    "device": "cpu",
}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch("os.fsync"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Activations that are sparse sums of 96 directions, the same at every position."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((N_TRUE, D_MODEL))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    shape = (320, LENGTH, N_TRUE)
    code = np.where(rng.random(shape) < TRUE_L0 / N_TRUE, 1 + rng.random(shape), 0)
    values = (code @ directions + 0.05 * rng.standard_normal((*shape[:2], D_MODEL))).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    root = tmp_path_factory.mktemp("planted") / "source.zarr"
    make_store(root, n_contexts=320, context_length=LENGTH, d_model=D_MODEL, held_out=64, bits=bits)
    return ActivationStore.open(root)


Changes = Callable[[dict[str, Any], dict[str, Any]], list[float]]


@pytest.fixture
def changes(source: ActivationStore, tmp_path: Path) -> Changes:
    """How the share of unexplained variance changes by what is aware of positions, in each seed."""

    def measured(effect: dict[str, Any], aware: dict[str, Any]) -> list[float]:
        store = Planting(source, tmp_path / "planted.zarr", build(PlantSettings, effect, "")).run().store

        def training(folder: str, given: dict[str, Any]) -> Training:
            return Training(store, tmp_path / folder, build(TrainSettings, COMMON | given, ""))

        def size(given: dict[str, Any]) -> int:
            return training("unused", given).new_autoencoder(None).n_parameters()

        width = next(k for k in range(48, 480) if size({"dictionary_size": k}) >= size(aware))
        assert size({"dictionary_size": width}) < size(aware) + 2 * D_MODEL + 2

        def score(name: str, given: dict[str, Any], seed: int) -> dict[str, Any]:
            run = training(f"{name}-{seed}", given | {"seed": seed, "data_seed": seed})
            run.train()
            return evaluate(run.run.folder, EvaluateSettings(device="cpu"))

        found: list[float] = []
        for seed in SEEDS:
            plain = score("agnostic", {"dictionary_size": width}, seed)
            knowing = score("aware", aware, seed)
            assert knowing["l0"] == pytest.approx(plain["l0"], rel=0.06)
            found.append(knowing["fvu"] / plain["fvu"] - 1)
        return found

    return measured


MEAN = {"position_mean": "lowrank:2"}


def test_planted_vectors_are_found_by_a_position_mean(changes: Changes) -> None:
    found = changes({"effect": "additive", "strength": 0.4, "rank": 2}, MEAN)
    assert max(found) < -0.1


def test_where_nothing_is_planted_a_position_mean_finds_nothing(changes: Changes) -> None:
    found = changes({"effect": "none"}, MEAN)
    assert abs(mean(found)) < 0.05
