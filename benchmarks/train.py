"""What a training step costs, and what of it is not the products with the weights.

    python benchmarks/train.py FOLDER                    d_model 512, 2,048 features: some 15 minutes
    python benchmarks/train.py FOLDER --d-model 2304 --features 2304
    python benchmarks/train.py FOLDER --d-model 2304 --features 16384 --device cuda --steps 64

It writes stores of made-up activations into FOLDER (1.5 GB at 512), and trains on them for a few steps each
time. All that is compared runs in turn, so often; printed are medians of the ratios within a round. Results
stand in docs/benchmarks.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from written import written

from posae.pipeline.device import keep_freed_memory
from posae.pipeline.sae.run_settings import resolve_train_settings
from posae.pipeline.sae.topk import TopK
from posae.pipeline.train import LayerMemory, Ongoing, Training, train_together
from posae.pipeline.train.batch import Batch
from posae.store.manifest import Manifest
from posae.store.reader import ActivationStore

LENGTH, BATCH, WINDOW = 128, 4096, 256
"""Positions of a context, tokens of a batch, contexts of a window."""


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def made(root: Path, d_model: int, n_contexts: int, n_held_out: int = 8) -> ActivationStore:
    """A sealed store of one layer: normal numbers in d_model / 4 directions, and noise; made once."""
    if (root / "seal.json").exists():
        return ActivationStore.open(root)
    manifest = Manifest(
        model="made-up",
        model_revision=None,
        skip_contexts=0,
        dataset_revision=None,
        dataset_config=None,
        dataset_split=None,
        dataset_column=None,
        model_config_hash="0" * 64,
        model_layers=1,
        d_model=d_model,
        attention="none",
        device="cpu",
        batch_contexts=32,
        n_contexts=n_contexts,
        context_length=LENGTH,
        held_out=(n_contexts - n_held_out, n_contexts),
        packing="pack",
        dataset="made-up",
        tokenizer_hash="0" * 64,
        first_token=None,
        separator_token=None,
        special_token_ids=(),
        vocabulary_size=100,
        seed=0,
        codec="small",
        chunk_contexts=8,
        shard_contexts=512,
        versions={"numpy": np.__version__},
    )
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((d_model // 4, d_model)).astype(np.float32)
    ids = rng.integers(5, 100, (n_contexts, LENGTH)).astype(np.int32)

    def activations(start: int, stop: int) -> NDArray[np.uint16]:
        hidden = rng.standard_normal((stop - start, LENGTH, len(mixing)), np.float32)
        noise = rng.standard_normal((stop - start, LENGTH, d_model), np.float32)
        bits: NDArray[np.int16] = (
            torch.as_tensor(hidden @ mixing + noise).bfloat16().view(torch.int16).numpy()
        )
        return bits.view(np.uint16)

    return written(root, manifest, ids, activations)


class Clock:
    """Seconds, and CPU-seconds of the process, within its ``with`` blocks; a GPU is waited for."""

    seconds = cpu_seconds = 0.0

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def __enter__(self) -> Self:
        """Begin."""
        self._wait()
        self.seconds -= time.perf_counter()
        self.cpu_seconds -= time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._wait()
        self.seconds += time.perf_counter()
        self.cpu_seconds += time.process_time()


class Bench:
    """One size of autoencoder, and how often all is measured."""

    def __init__(
        self, folder: Path, d_model: int, features: int, steps: int, rounds: int, device: str
    ) -> None:
        """Make the store: two windows for each round's steps at least."""
        self.folder, self.d_model, self.features = folder, d_model, features
        self.steps, self.rounds, self.device = steps, rounds, device
        n_contexts = -(-(steps * BATCH // LENGTH + 8) // (2 * WINDOW)) * 2 * WINDOW
        self.store = made(folder / f"{d_model}x{n_contexts}.zarr", d_model, n_contexts)

    def training(self, preset: str, **options: Any) -> Training:
        """A training about to run, in a folder that is made anew."""
        words = {"steps": self.steps, "batch_size": BATCH, "window_contexts": WINDOW, "log_steps": 10**6}
        words |= {"dictionary_size": self.features, "checkpoint_steps": 10**6, "curriculum": "step"}
        words |= {"device": self.device}
        settings = resolve_train_settings(preset=preset, options=words | options)
        run = self.folder / "runs" / f"{preset}-{options.get('seed', 0)}"
        shutil.rmtree(run, ignore_errors=True)
        return Training(self.store, run, settings)

    def ongoing(self, preset: str, **options: Any) -> Ongoing:
        """It, begun."""
        begun = Ongoing.begin(self.training(preset, **options))
        assert begun is not None
        return begun

    def in_memory(self, preset: str) -> list[tuple[Batch, torch.Tensor]]:
        """Its batches, float32, on the device."""
        batches = self.training(preset).batches().steps(0, self.steps)
        return [(batch, batch.on_device.to(torch.float32)) for batch in batches]

    def compare(self, title: str, contenders: dict[str, Callable[[], Clock]], per: int) -> None:
        """Run each in turn; a contender prepares, and gives what the timed part took."""
        say(f"{title:40} {'tokens/s':>10} {'seconds, to the first':>26} {'CPU-seconds':>26}")
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for turn in range(self.rounds + 1):  # the first warms up
            for name, work in contenders.items():
                clock = work()
                if turn:
                    found[name].append((clock.seconds, clock.cpu_seconds))
        first = next(iter(contenders))
        for name, took in found.items():
            rate = per / statistics.median(wall for wall, _ in took)
            told = ""
            for kind in (0, 1):
                ratios = [one[kind] / other[kind] for one, other in zip(took, found[first], strict=True)]
                told += f"   {statistics.median(ratios):8.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            say(f"  {name:38} {rate:10,.0f}{told}")

    def stepping(self, preset: str, **options: Any) -> Callable[[], Clock]:
        """Steps of a preset fed from memory."""
        batches = self.in_memory(preset)

        def work() -> Clock:
            # Of a training that is a step longer: at its last step more is measured, elsewhere at each 50th.
            ongoing = self.ongoing(preset, **{"steps": self.steps + 1} | options)
            with Clock() as clock:
                for batch, x in batches:
                    ongoing.take(batch, x)
            return clock

        return work

    def feeding(self) -> None:
        """Steps fed from memory, and from the store, every chunk decoded."""
        for preset in ("paper-baseline", "batchtopk"):
            self._feeding(preset)

    def _feeding(self, preset: str) -> None:

        def from_store() -> Clock:
            ongoing = self.ongoing(preset, steps=self.steps + 1)
            with Clock() as clock:
                for batch in ongoing.training.batches().steps(0, self.steps):
                    ongoing.take(batch, batch.on_device.to(torch.float32))
            return clock

        contenders = {"from memory, float32": self.stepping(preset), "from the store": from_store}
        self.compare(f"feeding {preset}", contenders, self.steps * BATCH)

    def together(self, preset: str, n_runs: int) -> None:
        """So many runs one after another, and side by side."""

        def passes(sizes: list[int]) -> Callable[[], Clock]:
            def work() -> Clock:
                clock, seed = Clock(), 0
                for size in sizes:
                    group = [self.ongoing(preset, seed=seed + i) for i in range(size)]
                    seed += size
                    with clock:
                        train_together(group, memory=LayerMemory("never"))
                return clock

            return work

        contenders = {"one after another": passes([1] * n_runs), "side by side": passes([n_runs])}
        self.compare(f"{n_runs} trainings of {preset}", contenders, n_runs * self.steps * BATCH)

    def adapters(self) -> None:
        """The paper's adapters, before and after they come in, beside the base alone."""
        late, early = {"warmup_steps": self.steps + 1}, {"warmup_steps": 0}
        contenders = {
            "base alone (paper-baseline)": self.stepping("paper-baseline"),
            "paper, alpha 0": self.stepping("paper", **late),
            "paper, alpha 1": self.stepping("paper", **early),
            "paper-15pct, alpha 1": self.stepping("paper-15pct", **early),
        }
        self.compare("adapters", contenders, self.steps * BATCH)

    def listed(self) -> None:
        """TopK and BatchTopK by lists of active features, and by dense products."""
        for preset in ("topk", "batchtopk"):
            work = self.stepping(preset)

            def densely(work: Callable[[], Clock] = work) -> Clock:
                with never(TopK, "_is_listed"):
                    return work()

            contenders = {"dense": densely, "listed": work}
            self.compare(f"{preset}, 32 of {self.features} active", contenders, self.steps * BATCH)

    def shared(self) -> None:
        """One training by one process, and by several that torchrun starts: one thread each, or a GPU."""
        say("one training of paper-baseline in several processes")
        rates: dict[int, list[float]] = {}
        most = torch.cuda.device_count() if self.device != "cpu" else os.cpu_count() or 1
        numbers = [n for n in (1, 2, 4, 8) if n <= most]
        for _ in range(self.rounds):
            for n_processes in numbers:
                rates.setdefault(n_processes, []).append(self._shared_by(n_processes))
        for n_processes, found in rates.items():
            ratios = [one / alone for one, alone in zip(found, rates[1], strict=True)]
            told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            say(f"  {n_processes} processes: {statistics.median(found):,.0f} tokens/s, {told} of one")

    def _shared_by(self, n_processes: int) -> float:
        """Tokens to a second between the middle of a training and its end."""
        run, half = self.folder / "runs" / "shared", self.steps
        shutil.rmtree(run, ignore_errors=True)
        words = {"preset": "paper-baseline", "steps": 2 * half, "log-steps": half, "batch-size": BATCH}
        words |= {"window-contexts": WINDOW, "dictionary-size": self.features, "device": self.device}
        options = [f"--{name}={value}" for name, value in words.items()]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
        command = [sys.executable, *launcher, "-m", "posae", "train", str(self.store.root), str(run)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *options], env=environment, capture_output=True, check=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        middle, end = (line for line in lines if line["step"] in (half, 2 * half))
        return (end["tokens"] - middle["tokens"]) / (end["seconds"] - middle["seconds"])

    def growing(self) -> None:
        """What one epoch takes of stores of 1, 4, 8 and 16 times the contexts."""
        say("one epoch of batchtopk, in a process of its own")
        for times in (1, 4, 8, 16):
            store = made(self.folder / f"grow-{times}.zarr", self.d_model, 512 * times)
            words = [__file__, str(self.folder), "--epoch", str(store.root), "--features", str(self.features)]
            told = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
            say(f"  {512 * times * LENGTH:9,} tokens: {told.stdout.strip()}")


@contextmanager
def never(owner: type, name: str) -> Generator[None]:
    """A question that is answered by no for a while."""
    before = getattr(owner, name)
    setattr(owner, name, lambda *_: False)  # pyright: ignore
    try:
        yield
    finally:
        setattr(owner, name, before)


def epoch(folder: Path, root: Path, features: int) -> None:
    """Train for an epoch and print what it took."""
    store = ActivationStore.open(root)
    steps = store.training_contexts(0) * LENGTH // BATCH
    words = {"steps": steps, "batch_size": BATCH, "window_contexts": WINDOW, "dictionary_size": features}
    settings = resolve_train_settings(
        preset="batchtopk",
        options=words | {"log_steps": 10**6},
    )
    run = folder / "runs" / "epoch"
    shutil.rmtree(run, ignore_errors=True)
    with Clock() as clock:
        Training(store, run, settings).train(memory=LayerMemory("never"))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, maps = (int(status[key].split()[0]) / 1e3 for key in ("RssAnon", "RssFile"))
    took = f"{clock.seconds:.1f} s, {clock.cpu_seconds:.1f} CPU-s"
    say(f"{took}; memory of its own {own:,.0f} MB, files mapped {maps:,.0f} MB")


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=["feeding", "together", "adapters", "listed", "growing", "shared"])
    parser.add_argument("--epoch", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    keep_freed_memory()  # as posae train does
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.epoch:
        epoch(given.folder, given.epoch, given.features)
        return
    bench = Bench(given.folder, given.d_model, given.features, given.steps, given.rounds, given.device)
    load = os.getloadavg()[0]
    say(f"d_model {given.d_model}, {given.features} features, batches of {BATCH}, {given.steps} steps")
    threads = torch.get_num_threads()
    say(f"{given.rounds} rounds; torch {torch.__version__}, {threads} threads, load {load:.1f}")
    parts: dict[str, Callable[[], None]] = {
        "feeding": bench.feeding,
        "together": lambda: bench.together("paper-baseline", 4),
        "adapters": bench.adapters,
        "listed": bench.listed,
        "growing": bench.growing,
        "shared": bench.shared,
    }
    for name, part in parts.items():
        if given.only in (None, name):
            part()


if __name__ == "__main__":
    main()
