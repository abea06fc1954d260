"""Many processes through torchrun, one of them killed.

A harvest has the bytes of one process, a training its weights but for the order of additions.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import safetensors.torch
import torch

from posae.store import ActivationStore
from posae.store.verify import verify

from ..conftest import tree
from .conftest import call

# Six shards, in small batches, so that there is a middle to be killed in.
LAYERS = ("layer_0", "layer_4")
WORDS = ("--contexts", "3072", "--context-length", "4", "--layers", "0,4", "--batch-contexts", "16")
N_SHARDS = 6


def torchrun(n_processes: int, *words: object) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, f"--nproc-per-node={n_processes}", "-m", "posae", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def rank(process: int) -> str:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((v.decode() for v in variables if v.startswith(b"RANK=")), "")


def standing_shards(store: Path) -> set[str]:
    """The names of the shards that stand in every layer: layers are committed side by side."""
    return set[str].intersection(*({file.name for file in (store / layer).glob("c.*")} for layer in LAYERS))


def wait_for_the_end(process: int) -> None:
    """Wait until a process that is stopped was asked to end."""
    while True:
        status = Path(f"/proc/{process}/status").read_text().splitlines()
        pending = int(next(line for line in status if line.startswith("ShdPnd:")).split()[1], 16)
        if pending >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


def test_processes_of_torchrun_make_the_store_of_one_though_one_is_killed(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone" / "a.zarr", tmp_path / "shared" / "a.zarr"
    assert call("harvest", alone, *WORDS) == 0

    three = torchrun(3, "harvest", shared, *WORDS)
    while not standing_shards(shared):
        assert three.poll() is None, three.communicate()
        time.sleep(0.001)
    ranks = {rank(child): child for child in children(three.pid)}
    # All stand still while one dies, as the others might be done before torchrun ends them.
    for process in ranks.values():
        os.kill(process, signal.SIGSTOP)
    os.kill(ranks.pop("RANK=1"), signal.SIGKILL)
    for process in ranks.values():
        wait_for_the_end(process)
        os.kill(process, signal.SIGCONT)
    three.communicate(timeout=120)
    assert three.returncode != 0
    begun = ActivationStore.open(shared)
    assert not begun.is_sealed
    assert verify(begun).damaged == []
    assert 0 < len(standing_shards(shared)) < N_SHARDS

    two = torchrun(2, "harvest", shared, *WORDS)
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    assert tree(shared) == tree(alone)
    # One of them speaks, and of all that is done.
    assert out.count("sealed as") == 1
    assert err.count("harvesting 12,288 tokens (") == 1
    assert err.count("harvesting 12,288/12,288 tokens") == 1


def test_processes_of_torchrun_share_a_training_though_one_is_killed(tmp_path: Path) -> None:
    store, alone, shared = tmp_path / "a.zarr", tmp_path / "alone", tmp_path / "shared"
    assert call("harvest", store, "--contexts", "128", "--context-length", "16", "--layers", "2") == 0
    words = ("--steps", "240", "--batch-size", "128", "--checkpoint-steps", "20", "--log-steps", "40")
    words = (*words, "--preset", "paper", "--window-contexts", "64")
    assert call("train", store, alone, *words) == 0

    two = torchrun(2, "train", store, shared, *words)
    while not (shared / "checkpoint/state.safetensors").exists():
        assert two.poll() is None, two.communicate()
        time.sleep(0.001)
    ranks = {rank(child): child for child in children(two.pid)}
    os.kill(ranks["RANK=1"], signal.SIGKILL)
    two.communicate(timeout=120)
    assert two.returncode != 0
    assert not (shared / "sae_weights.safetensors").exists()

    three = torchrun(3, "train", store, shared, *words)
    out, err = three.communicate(timeout=120)
    assert three.returncode == 0, err
    # One of them speaks, and goes on where the last checkpoint was.
    assert out.count("scores on the held-out part") == 1
    assert err.count("training 30,720 tokens (") == 1
    wanted, found = (
        safetensors.torch.load_file(run / "sae_weights.safetensors")  # pyright: ignore[reportUnknownMemberType]
        for run in (alone, shared)
    )
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0.01, atol=1e-3)
    assert (shared / "evaluation.json").exists()
    steps = [json.loads(line)["step"] for line in (shared / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 240
