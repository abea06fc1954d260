"""A harvest by many processes through torchrun, one of them killed: the bytes are those of one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from posae.store import ActivationStore
from posae.store.verify import verify

from ..conftest import tree
from .conftest import call

# Six shards, in small batches, so that there is a middle to be killed in.
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
    while not (shared / "layer_4/c.0.0.0").exists():
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
    n_there = len(list(shared.glob("layer_4/c.*")))
    assert 0 < n_there < N_SHARDS

    two = torchrun(2, "harvest", shared, *WORDS)
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    assert tree(shared) == tree(alone)
    # One of them speaks, and of all that is done.
    assert out.count("sealed as") == 1
    assert err.count("harvesting 12,288 tokens (") == 1
    assert err.count("harvesting 12,288/12,288 tokens") == 1
