"""A store on a server that takes its time: beside tensorstore, and beside a local copy.

    posae harvest demo.zarr --contexts 4096
    python benchmarks/remote.py FOLDER --data demo.zarr [--delay 0.05] [--rounds 3] [--only chunks,opening]

Another process serves FOLDER by HTTP and waits `--delay` seconds before it answers each request. What is
compared runs in turn, and a figure is the median over rounds; caches are empty each time.

- chunks: 256 random chunks of a layer of 64 shards of 64 chunks, read by posae and by tensorstore (its http
  kvstore), into memory; the values must be equal. Shards of one chunk, too.
- opening: opening and checking stores of 8 and of 336 shards for a layer, ten arrays each.
- feeding: an epoch of batches with which nothing is done, from the server and from a local copy.
- training: an epoch from the server as a share of the speed from a local copy, by preset; the weights must be
  the same. From the data as they are, and from a store of d_model 512 that is tiled from them.

Prints tables for docs/benchmarks.md. Ends with 1 where values or weights differ. Costs some ten minutes.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from numpy.typing import NDArray
from scale import lay_out, manifest_of
from slow_server import served
from written import written

from posae.pipeline.ranges import equal_ranges
from posae.pipeline.sae.run_settings import train_presets, train_settings
from posae.pipeline.settings import TrainSettings
from posae.pipeline.train import Training
from posae.pipeline.train.batches import ShuffledBatches
from posae.store import ActivationStore
from posae.store.manifest import Manifest
from posae.store.remote.cache import PartCache

PRESETS = ("paper", "posae")
N_CHUNKS, LENGTH = 256, 32


def say(line: str) -> None:
    """A line for whoever measures."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def random_store(
    root: Path, data: ActivationStore, *, n_chunks: int, chunks_per_shard: int
) -> ActivationStore:
    """A sealed store of random activations, d_model 64, so that bytes matter less than requests."""
    if (root / "seal.json").exists():
        return ActivationStore.open(root)
    n_contexts = 8 * n_chunks
    changed = {
        "d_model": 64,
        "n_contexts": n_contexts,
        "context_length": LENGTH,
        "held_out": (n_contexts - 8, n_contexts),
        "shard_contexts": 8 * chunks_per_shard,
        "model_layers": 1,
    }
    manifest = Manifest.model_validate(data.manifest.model_copy(update=changed).model_dump())
    ids = np.resize(data.tokens(), (n_contexts, LENGTH)).astype(np.int32)

    def activations(start: int, stop: int) -> NDArray[np.uint16]:
        values = np.random.default_rng(start).standard_normal((stop - start, LENGTH, 64), np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    return written(root, manifest, ids, activations)


@contextmanager
def empty_cache() -> Generator[PartCache]:
    """A cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        yield PartCache(Path(folder))


def chunks_by_posae(url: str, rows: NDArray[np.int64]) -> tuple[float, NDArray[np.uint16]]:
    """Seconds, and the values; the store is open before."""
    with empty_cache() as cache:
        store = ActivationStore.open(url, cache)
        begun = time.perf_counter()
        values = store.read(0, rows)
        return time.perf_counter() - begun, values


def chunks_by_tensorstore(url: str, rows: NDArray[np.int64]) -> tuple[float, NDArray[np.uint16]]:
    """The same by tensorstore, all chunks asked for at once."""
    kvstore = {"driver": "http", "base_url": f"{url}/layer_0/"}
    spec = {"driver": "zarr3", "kvstore": kvstore, "recheck_cached_data": False}
    opened = tensorstore.open(spec, read=True, context=tensorstore.Context()).result()
    begun = time.perf_counter()
    running = [opened[start : start + 8].read() for start in rows[::8].tolist()]
    found = [np.asarray(future.result()) for future in running]
    return time.perf_counter() - begun, np.concatenate(found).view(np.uint16)


def measure_chunks(root: Path, url: str, rounds: int) -> bool:
    """Random chunks; whether all values are equal."""
    equal = True
    say("\n| Store | posae, s | tensorstore, s | posae takes |\n|---|---|---|---|")
    for name in ("shards-of-64.zarr", "shards-of-1.zarr"):
        n_chunks = ActivationStore.open(root / name).n_contexts // 8
        seconds: dict[str, list[float]] = {"posae": [], "tensorstore": []}
        for number in range(rounds):
            chosen = np.random.default_rng(number).permutation(n_chunks)[:N_CHUNKS]
            rows = (chosen[:, np.newaxis] * 8 + np.arange(8)).reshape(-1)
            ours, our_values = chunks_by_posae(f"{url}/{name}", rows)
            theirs, their_values = chunks_by_tensorstore(f"{url}/{name}", rows)
            seconds["posae"].append(ours)
            seconds["tensorstore"].append(theirs)
            equal &= bool((our_values == their_values).all())
        ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
        medians = [f"{statistics.median(found):.2f}" for found in seconds.values()]
        what = f"{min(N_CHUNKS, n_chunks)} of {n_chunks} chunks, {name}"
        say(f"| {what} | {' | '.join(medians)} | **{ratio:.2f}** x |")
    return equal


def measure_opening(root: Path, url: str, rounds: int) -> None:
    """Opening a store and checking a layer."""
    say("\n| Store | opening, s | checking a layer, s |\n|---|---|---|")
    for name in ("shards-of-64.zarr", "gemma-22e6.zarr"):
        opening: list[float] = []
        checking: list[float] = []
        for _ in range(rounds):
            with empty_cache() as cache:
                begun = time.perf_counter()
                store = ActivationStore.open(f"{url}/{name}", cache)
                opened = time.perf_counter()
                store.check_layer(store.layers[0])
                checking.append(time.perf_counter() - opened)
                opening.append(opened - begun)
        shards = ActivationStore.open(root / name).manifest.n_shards
        n_arrays = 11
        say(
            f"| {shards} shards, {n_arrays} arrays to a layer | {statistics.median(opening):.2f} | "
            f"{statistics.median(checking):.2f} |"
        )


def fed(place: str, window: int) -> tuple[float, float, int]:
    """Seconds and CPU-seconds that an epoch of batches takes when nothing is done with them; and tokens."""
    with empty_cache() as cache:
        store = ActivationStore.open(place, cache)
        ranges = equal_ranges(store.context_length, 4)
        batches = ShuffledBatches(store, store.layers[0], ranges, window_contexts=window)
        begun, used = time.perf_counter(), time.process_time()
        order = batches.order
        steps = sum(map(order.steps_of_window, order.windows_of_epoch(0)))
        n_tokens = sum(batch.n_rows for batch in batches.steps(0, steps))
        return time.perf_counter() - begun, time.process_time() - used, n_tokens


def measure_feeding(root: Path, url: str, given: Any) -> None:
    """What training gets at the most: batches alone."""
    say("\n| Store | | tokens/s | CPU-s per million tokens |\n|---|---|---|---|")
    for name in ("data.zarr", "wide.zarr"):
        store = ActivationStore.open(root / name)
        for where, place in (("local", str(root / name)), ("server", f"{url}/{name}")):
            found = [fed(place, given.window) for _ in range(given.rounds)]
            rate = statistics.median(n / seconds for seconds, _, n in found)
            cpu = statistics.median(1e6 * used / n for _, used, n in found)
            say(f"| d_model {store.d_model}, windows of {given.window} | {where} | {rate:,.0f} | {cpu:.2f} |")


def trained(place: str, folder: Path, settings: TrainSettings) -> tuple[float, bytes]:
    """Steps a second, with an empty cache, and the weights."""
    store = ActivationStore.open(place, PartCache(folder / "cache"))
    training = Training(store, folder / "run", settings)
    opened = time.perf_counter()
    training.train()
    seconds = time.perf_counter() - opened
    return settings.steps / seconds, (folder / "run" / "sae_weights.safetensors").read_bytes()


def measure_training(root: Path, url: str, given: Any) -> bool:
    """Training from the server; whether all weights are those of the local copy."""
    equal = True
    say("\n| Store | preset | share of the local speed | steps a second, local |\n|---|---|---|---|")
    for name in ("data.zarr", "wide.zarr"):
        store = ActivationStore.open(root / name)
        for preset in PRESETS:
            wanted = {"steps": given.steps, "window_contexts": given.window, "layer": store.layers[0]}
            settings = train_settings({**train_presets()[preset], **wanted}, "[train]")
            local: list[float] = []
            shares: list[float] = []
            for _ in range(given.rounds):
                with tempfile.TemporaryDirectory() as folder:
                    here, our_weights = trained(str(root / name), Path(folder) / "local", settings)
                    there, their_weights = trained(f"{url}/{name}", Path(folder) / "remote", settings)
                equal &= our_weights == their_weights
                local.append(here)
                shares.append(there / here)
            say(
                f"| d_model {store.d_model}, {store.n_contexts:,} contexts | `{preset}` | "
                f"**{statistics.median(shares):.2f}** ({', '.join(f'{share:.2f}' for share in shares)}) | "
                f"{statistics.median(local):.1f} |"
            )
    return equal


def tiled(data: ActivationStore) -> Callable[[int, int], NDArray[np.uint16]]:
    """Activations four times as wide: of four other places in the store."""

    def activations(start: int, stop: int) -> NDArray[np.uint16]:
        contexts = np.arange(start, stop)
        parts = [data.read(data.layers[0], (contexts + 97 * n) % data.n_contexts) for n in range(4)]
        return np.concatenate(parts, axis=2)

    return activations


def make_stores(root: Path, data: Path) -> None:
    """What is served; made once."""
    root.mkdir(parents=True, exist_ok=True)
    source = ActivationStore.open(data)
    random_store(root / "shards-of-64.zarr", source, n_chunks=64 * 64, chunks_per_shard=64)
    random_store(root / "shards-of-1.zarr", source, n_chunks=512, chunks_per_shard=1)
    if not (root / "gemma-22e6.zarr" / "seal.json").exists():
        lay_out(root / "gemma-22e6.zarr", manifest_of(336 * 512 * 128, 2304), [12])
    if not (root / "data.zarr").exists():
        shutil.copytree(data, root / "data.zarr")
    if not (root / "wide.zarr" / "seal.json").exists():
        n_contexts = min(2048, source.n_contexts)
        changed = {
            "d_model": 4 * source.d_model,
            "n_contexts": n_contexts,
            "held_out": (n_contexts - 104, n_contexts),
            "model_layers": 1,
        }
        manifest = Manifest.model_validate(source.manifest.model_copy(update=changed).model_dump())
        written(root / "wide.zarr", manifest, source.tokens(slice(0, n_contexts)), tiled(source))


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="chunks,opening,feeding,training")
    given = parser.parse_args()
    make_stores(given.folder, given.data)
    say(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"{given.delay * 1000:.0f} ms a request; tensorstore {version('tensorstore')}"
    )
    equal = True
    with served(given.folder, given.delay) as url:
        if "chunks" in given.only:
            equal &= measure_chunks(given.folder, url, given.rounds)
        if "opening" in given.only:
            measure_opening(given.folder, url, given.rounds)
        if "feeding" in given.only:
            measure_feeding(given.folder, url, given)
        if "training" in given.only:
            equal &= measure_training(given.folder, url, given)
    say("\nall values and weights are equal" if equal else "\nvalues or weights DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
