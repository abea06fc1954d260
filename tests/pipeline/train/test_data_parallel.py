"""Several processes share a training: the weights are those of one, wherever it was interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from posae.pipeline.errors import RunMismatchError
from posae.pipeline.runs import WEIGHTS, Run
from posae.pipeline.sae.run_settings import train_presets, train_settings
from posae.pipeline.train import Training
from posae.pipeline.train.data_parallel import Team, refuse_shared
from posae.store import ActivationStore
from posae.store.errors import SettingsError

from ...conftest import Made

COMMON: dict[str, Any] = {
    **{"steps": 24, "batch_size": 24, "window_contexts": 16, "log_steps": 6, "checkpoint_steps": 12},
    **{"ranges": "2", "warmup_steps": 8, "ramp_steps": 8, "learning_rate": 1e-3, "device": "cpu"},
}
KINDS: dict[str, dict[str, Any]] = {
    "paper": train_presets()["paper"],
    "standard": {"architecture": "standard"},
    "topk": {"architecture": "topk", "target_l0": 4, "dead_after_tokens": 24},
    "batchtopk": {"architecture": "batchtopk", "target_l0": 4, "dictionary_size": 64},
    "dense": {"architecture": "batchtopk", "target_l0": 4, "dictionary_size": 16, "dead_after_tokens": 24},
    "jumprelu": {"architecture": "jumprelu", "target_l0": 4, "position_adapter": "bias+decoder:2"},
    "masked": {"architecture": "masked", "mask": "gaussian", "curriculum": "plateau"},
    "separate": {"architecture": "separate", "shuffle_positions": True, "position_mean": "lowrank:2"},
}
RUNS = {
    name: {**kind, **COMMON} | {k: kind[k] for k in kind.keys() & {"curriculum"}}
    for name, kind in KINDS.items()
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "sae_weights.safetensors")  # pyright: ignore[reportUnknownMemberType]


def train_together(n_processes: int, store: Path, folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    worker = ["-m", "posae.tests.pipeline.train.data_parallel", store, folder, json.dumps(runs)]
    subprocess.run(
        [sys.executable, *launcher, *map(str, worker)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.parametrize("n_processes", [2, 3])
def test_weights_are_those_of_one_process(n_processes: int, good_store: Made, tmp_path: Path) -> None:
    train_together(n_processes, good_store.root, tmp_path / "shared", RUNS | {"again": RUNS["batchtopk"]})
    once, again = (tmp_path / "shared" / name / WEIGHTS for name in ("batchtopk", "again"))
    assert once.read_bytes() == again.read_bytes()
    store = ActivationStore.open(good_store.root)
    for name, settings in RUNS.items():
        alone = Training(store, tmp_path / "alone" / name, train_settings(settings, "[train]"))
        alone.train()
        there = Run(tmp_path / "shared" / name)
        assert_same(tensors(alone.run.folder), tensors(there.folder), name)
        # Also what the weights do not show yet: which features were silent, what the curriculum has seen.
        wanted, found = alone.run.load_checkpoint(), there.load_checkpoint()
        assert wanted is not None
        assert found is not None
        assert wanted[0] == found[0]
        assert_same(wanted[1], found[1], name)
        for line, other in zip(alone.run.metrics(), there.metrics(), strict=True):
            assert line.keys() == other.keys()
            for key in line.keys() - {"seconds", "cpu_seconds"}:
                wanted_value = None if line[key] is None else pytest.approx(line[key], rel=1e-3, abs=1e-6)
                assert other[key] == wanted_value, f"{name} {key}"


def assert_same(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor], name: str) -> None:
    """Equal but for the order of additions."""
    assert wanted.keys() == found.keys()
    for key in wanted.keys() - {"clock"}:

        def told(problem: str, key: str = key) -> str:
            return f"{name} {key}: {problem}"

        torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-5, msg=told)


class Second(Team):
    """As process 1 sees a training whose process 0 has a configuration."""

    number, n_processes = 1, 2

    def __init__(self, of_first: dict[str, Any]) -> None:
        self._of_first = of_first

    def told(self, value: Any) -> Any:
        return self._of_first


def test_a_process_follows_the_first_and_refuses_to_train_something_else(
    good_store: Made, tmp_path: Path
) -> None:
    store, settings = ActivationStore.open(good_store.root), train_settings(COMMON, "[train]")
    first, second = (Training(store, tmp_path / name, settings) for name in ("first", "second"))
    first.n_contexts -= 1  # the store grew while the second was started
    second.take_after(Second(first.config))
    assert second.n_contexts == first.n_contexts

    other = Training(store, tmp_path / "other", settings.model_copy(update={"seed": 1}))
    with pytest.raises(RunMismatchError, match="process 1 of this run has other settings"):
        other.take_after(Second(first.config))


def test_processes_that_would_share_a_gpu_are_refused() -> None:
    refuse_shared(["GPU-1", "GPU-2"])
    with pytest.raises(SettingsError, match="3 processes would share 2 GPUs"):
        refuse_shared(["GPU-1", "GPU-2", "GPU-1"])
