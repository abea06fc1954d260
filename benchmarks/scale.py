"""What a store costs that is far larger than this machine: its metadata and its sampler, without its data.

    python benchmarks/scale.py FOLDER [--tokens 22e6,0.5e9,2e9,8e9] [--layers 5,12,19]

Lays out in FOLDER a store of Gemma-2-2B's shape for each number of tokens, with all the files that it
would have, through the real writer. What a shard holds is written once, and the others are further names
of that file (hard links), so 8 billion tokens take some 200,000 names and little room. The activations are
zeros; token ids and sums are random; sizes, indexes, seal, statistics and checksums are as a harvest
leaves them. Then each thing that grows with a store is done once, with the real code, in a process of its
own. Told are its seconds, its CPU-seconds, and by how much it raised the process's peak of memory; 0 MB is
less than importing posae takes.

All files are in the page cache, and the data is far smaller than it would be: what a disk or a network
would add is not in the seconds. Costs about 10 minutes of a core and 3 GB of memory: two windows of
activations, and the files that are mapped. Results stand in docs/scale.md.
"""

import argparse
import hashlib
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from posae.pipeline.harvest.corpus import corpus_counts
from posae.pipeline.harvest.text.contexts import InOrder, held_out_contexts, order_of_contexts, take_contexts
from posae.pipeline.ranges import equal_ranges
from posae.pipeline.train.batches import ShuffledBatches
from posae.pipeline.train.order import Order
from posae.store import ActivationStore
from posae.store.files import StoreFiles
from posae.store.layout import CHUNK_CONTEXTS, ArraySpec, shard_contexts
from posae.store.manifest import Manifest, group_json, layer_spec, token_specs
from posae.store.seal import (
    CORPUS_PATH,
    MAX_SEAL_BYTES,
    SEAL_PATH,
    SealedFile,
    parse_seal,
    pretty_json,
    seal_bytes,
)
from posae.store.shard_writer import ShardWriter, encode_chunks
from posae.store.shards import index_bytes
from posae.store.stats import stats_specs
from posae.store.writer import StoreWriter

LENGTH, WINDOW, BATCH, SPECIAL = 128, 2048, 2048, (0, 1, 2, 3)
GATHERED = 8192
"""Contexts that are gathered at once: those of a shard."""
EPOCHS_BEFORE = 2
"""Whole epochs before the step that is resumed at."""


class Cost(NamedTuple):
    """What one thing took."""

    seconds: float
    cpu_seconds: float
    """Of all threads."""

    peak_bytes: int
    """Of the process, above what it had before; maps of files that were touched are in it."""

    said: str


def manifest_of(n_tokens: int, d_model: int) -> Manifest:
    """The manifest of a harvest of so many tokens."""
    n_contexts = -(-n_tokens // LENGTH)
    return Manifest(
        model="google/gemma-2-2b",
        model_revision=None,
        model_config_hash="0" * 64,
        model_layers=26,
        d_model=d_model,
        attention="eager",
        device="cuda",
        batch_contexts=32,
        n_contexts=n_contexts,
        context_length=LENGTH,
        skip_contexts=0,
        held_out=(n_contexts - held_out_contexts(n_contexts, 0.05, CHUNK_CONTEXTS), n_contexts),
        packing="pack",
        dataset="layout",
        dataset_revision=None,
        dataset_config=None,
        dataset_split="train",
        dataset_column="text",
        tokenizer_hash="0" * 64,
        first_token=2,
        separator_token=1,
        special_token_ids=SPECIAL,
        vocabulary_size=256000,
        seed=0,
        codec="small",
        byte_counts=True,
        chunk_contexts=CHUNK_CONTEXTS,
        shard_contexts=shard_contexts(n_contexts),
        versions={},
    )


def specs_of(manifest: Manifest, layers: Sequence[int]) -> list[ArraySpec]:
    """Every array of the store."""
    specs = list(token_specs(manifest).values())
    for layer in layers:
        specs += [layer_spec(manifest, layer), *stats_specs(manifest, layer).values()]
    return specs


# Laying a store out


def rows_of(spec: ArraySpec, rng: np.random.Generator) -> NDArray[Any]:
    """What a shard of an array is made of: entries of axis 0, as many as are repeated to fill it."""
    name, shape = spec.path.rpartition("/")[2], spec.shape[1:]
    if name == "position":
        return np.arange(spec.shape[0], dtype=spec.dtype)
    if name == "tokens":
        tokens = rng.integers(4, 256000, (spec.shard_rows, *shape), dtype=spec.dtype)
        tokens[rng.random(tokens.shape) < 0.002] = 1
        tokens[:, 0] = 2
        return tokens
    if name == "document":
        ends = rng.random((spec.shard_rows, *shape)) < 0.002
        return np.cumsum(ends).reshape(ends.shape).astype(spec.dtype)
    if name == "sums":
        return rng.normal(size=(1, *shape)).astype(spec.dtype)
    return np.zeros((spec.chunk_rows, *shape), spec.dtype)


def fill(files: StoreFiles, spec: ArraySpec, rng: np.random.Generator, sealed: dict[str, SealedFile]) -> None:
    """Write the first and the last shard of an array; the others are further names of the first."""
    chunks = encode_chunks(spec, rows_of(spec, rng))
    for shard in {0, spec.n_shards - 1}:
        writer = ShardWriter.try_lock(files, spec, shard, wait=True)
        assert writer
        for number in range(spec.chunks_in(shard)):
            writer.append(chunks[number % len(chunks)])
        sealed[spec.shard_path(shard)] = writer.finish()
        writer.commit()
    first = spec.shard_path(0)
    for shard in range(1, spec.n_shards - 1):
        os.link(files.root / first, files.root / spec.shard_path(shard))
        sealed[spec.shard_path(shard)] = sealed[first]


def lay_out(root: Path, manifest: Manifest, layers: Sequence[int]) -> None:
    """Write all files of the store but its card."""
    writer = StoreWriter.begin(root, manifest)
    for spec in token_specs(manifest).values():
        writer.files.write(spec.metadata_path, pretty_json(spec.to_json()))
    writer.files.write(CORPUS_PATH, pretty_json(group_json({})))
    writer.add_layers(layers)
    sealed: dict[str, SealedFile] = {}
    for file in root.rglob("zarr.json"):
        data = file.read_bytes()
        sealed[file.relative_to(root).as_posix()] = SealedFile(len(data), hashlib.sha256(data).hexdigest())
    rng = np.random.default_rng(0)
    for spec in specs_of(manifest, layers):
        fill(writer.files, spec, rng, sealed)
    writer.files.write(SEAL_PATH, seal_bytes(sealed))


# What is done with it


def opened(root: Path, layer: int) -> Callable[[], str]:
    """Opening the store: the seal, and the metadata of every array."""

    def do() -> str:
        store = ActivationStore.open(root)
        return f"{len(store.seal.files) if store.seal else 0:,} files sealed"

    return do


def parsed(root: Path, layer: int) -> Callable[[], str]:
    """Parsing the seal alone."""
    data = (root / SEAL_PATH).read_bytes()
    return lambda: f"{len(data) / 1e6:.1f} MB, {len(parse_seal(data).files):,} files"


def unsealed(root: Path, layer: int) -> Callable[[], str]:
    """Opening it as an unfinished harvest finds it: no seal, all shards committed."""

    def do() -> str:
        (root / SEAL_PATH).rename(root / "aside")
        try:
            return f"{ActivationStore.open(root).n_contexts:,} contexts committed"
        finally:
            (root / "aside").rename(root / SEAL_PATH)

    return do


def missing(root: Path, layer: int) -> Callable[[], str]:
    """Asking what is left to harvest in all layers."""
    store = ActivationStore.open(root)
    writer = StoreWriter(root, store.manifest)
    return lambda: f"{len(writer.missing_shards(store.layers)):,} shards missing"


def checked(root: Path, layer: int) -> Callable[[], str]:
    """What a training checks before it begins: every file of a layer, by its index."""
    store = ActivationStore.open(root)

    def do() -> str:
        store.check_layer(layer)
        n_arrays = 3 + len(stats_specs(store.manifest, layer))
        return f"{store.committed_shards(layer) * n_arrays:,} files opened"

    return do


def digested(root: Path, layer: int) -> Callable[[], str]:
    """The digests that a run records."""
    store = ActivationStore.open(root)
    return lambda: f"{len(store.digests(layer))} digests"


def summed(root: Path, layer: int) -> Callable[[], str]:
    """Position means: the statistics of all shards of a layer."""
    store = ActivationStore.open(root)

    def do() -> str:
        stats = store.stats(layer)
        return f"{store.committed_shards(layer) * stats.sums.size * 4 / 1e9:.2f} GB of sums"

    return do


def _batches(root: Path, layer: int) -> ShuffledBatches:
    store = ActivationStore.open(root)
    return ShuffledBatches(
        store, layer, equal_ranges(LENGTH, 4), batch_size=BATCH, window_contexts=WINDOW, leave_out=SPECIAL
    )


def _order(root: Path) -> Order:
    """The order of a training of that size, over made-up counts that differ from chunk to chunk."""
    manifest = ActivationStore.open(root).manifest
    n_chunks = -(-manifest.held_out[0] // CHUNK_CONTEXTS)
    wanted = np.random.default_rng(0).integers(900, CHUNK_CONTEXTS * (LENGTH - 1), n_chunks)
    return Order(
        n_contexts=manifest.held_out[0],
        context_length=LENGTH,
        chunk_contexts=CHUNK_CONTEXTS,
        window_contexts=WINDOW,
        batch_size=BATCH,
        seed=0,
        wanted_of=wanted.__getitem__,
    )


def ordered(root: Path, layer: int) -> Callable[[], str]:
    """One epoch's order: the chunks of each window."""
    order = _order(root)
    return lambda: f"{sum(1 for _ in order.windows_of_epoch(0)):,} windows"


def found(root: Path, layer: int) -> Callable[[], str]:
    """Finding a step in the third epoch."""
    order = _order(root)
    step = int((EPOCHS_BEFORE + 0.37) * int(order.wanted_of(np.arange(order.n_chunks)).sum()) / BATCH)

    def do() -> str:
        place = order.find(step)
        assert place
        return f"step {step:,}: epoch {place[0]}, window {place[1]:,}"

    return do


def begun(root: Path, layer: int) -> Callable[[], str]:
    """The first batch of a new run."""
    batches = _batches(root, layer)
    return lambda: f"step {next(batches.steps(0, 1)).step}"


def resumed(root: Path, layer: int) -> Callable[[], str]:
    """The first batch of a run that is resumed in its third epoch; all token ids are read."""
    batches = _batches(root, layer)
    step = int((EPOCHS_BEFORE + 0.37) * batches.n_contexts * LENGTH / BATCH)
    return lambda: f"step {next(batches.steps(step, step + 1)).step:,}"


THINGS = (parsed, opened, checked, digested, summed, ordered, found, begun, resumed, unsealed, missing)


class AnyNumbers:
    """In place of a tokenizer: as many numbers as a text has letters."""

    bos_token_id, eos_token_id, cls_token_id, all_special_ids = 2, 1, None, list(SPECIAL)
    rng = np.random.default_rng(0)

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        """Token ids."""
        return {"input_ids": [self.rng.integers(0, 256000, len(text)).tolist() for text in texts]}


def dealt_out(of: tuple[Path, int], layer: int) -> Callable[[], str]:
    """Contexts as a harvest makes them: in a file, counted, and gathered in their order."""
    folder, n_contexts = of
    documents = repeat("x" * 4000)

    def do() -> str:
        with OwnMemory() as memory:
            contexts = take_contexts(
                documents,
                AnyNumbers(),
                n_contexts=n_contexts,
                context_length=LENGTH,
                folder=folder,  # pyright: ignore
            )
            order = order_of_contexts(n_contexts, seed=0, held_out=n_contexts // 20)
            counts = corpus_counts(contexts.tokens, SPECIAL, n_documents=1, n_left_out=0)
            for rows in (contexts.tokens, contexts.documents):
                gathered = InOrder(rows, order)
                for start in range(0, n_contexts, GATHERED):
                    gathered[start : start + GATHERED]
        held = contexts.tokens.nbytes + contexts.documents.nbytes
        told = f"{held / 1e6:,.0f} MB in a file, {counts['duplicate_contexts']} duplicates"
        return f"{told}, {memory.most / 1e6:,.0f} MB of its own at the most"

    return do


class OwnMemory:
    """How much more of its own memory, files that are mapped left out, the process took within ``with``."""

    most = 0

    def __enter__(self) -> Self:
        """Begin to look, a hundred times a second."""
        self._before, self._is_done = self._now(), Event()
        self._looking = Thread(target=self._look)
        self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._is_done.set()
        self._looking.join()

    def _look(self) -> None:
        while not self._is_done.wait(0.01):
            self.most = max(self.most, self._now() - self._before)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cost_of(thing: Callable[[Any, int], Callable[[], str]], of: Any, layer: int) -> Cost:
    """Do one thing, in a process that does nothing else."""
    do = thing(of, layer)
    before, began, cpu_began = peak_bytes(), time.perf_counter(), time.process_time()
    said = do()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return Cost(seconds, cpu_seconds, peak_bytes() - before, said)


def tell(thing: Callable[[Any, int], Callable[[], str]], of: Any, layer: int) -> None:
    """Do one thing in a process of its own, and say what it took."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        cost = pool.submit(cost_of, thing, of, layer).result()
    say(
        f"  {cost.seconds:8.2f} s {cost.cpu_seconds:8.2f} CPU-s {cost.peak_bytes / 1e6:6.0f} MB"
        f"  {(thing.__doc__ or '').rstrip('.')}: {cost.said}"
    )


def say(line: str) -> None:
    """A line, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def describe(manifest: Manifest, layers: Sequence[int], seal: int) -> None:
    """What a store is made of."""
    specs, spec = specs_of(manifest, layers), layer_spec(manifest, layers[0])
    n_files = sum(1 + array.n_shards for array in specs) + 3 + len(layers)
    indexes = sum(index_bytes(array) * array.n_shards for array in specs)
    say(
        f"\n{manifest.n_contexts * LENGTH:,} tokens: {manifest.n_contexts:,} contexts, "
        f"{len(layers)} layers, {len(layers) * spec.n_chunks * spec.chunk_bytes / 1e12:.2f} TB raw\n"
        f"  {manifest.n_shards:,} shards a layer, of {manifest.shard_contexts:,} contexts; "
        f"{n_files:,} files\n"
        f"  an index of {index_bytes(spec):,} bytes a shard, {indexes / 1e6:.0f} MB in all; "
        f"seal {seal / 1e6:.1f} MB of {MAX_SEAL_BYTES / 1e6:.1f}"
    )


def main() -> None:
    """Lay out, measure, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", default="22e6,0.5e9,2e9,8e9")
    parser.add_argument("--layers", default="5,12,19")
    parser.add_argument("--d-model", type=int, default=2304)
    parser.add_argument("--dealt-out", default="250000,1000000,4000000", help="contexts")
    arguments = parser.parse_args()
    layers = [int(layer) for layer in arguments.layers.split(",")]
    say(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, numpy {np.__version__}"
    )
    for n_tokens in (int(float(word)) for word in arguments.tokens.split(",")):
        root = arguments.folder / f"{n_tokens}.zarr"
        shutil.rmtree(root, ignore_errors=True)
        manifest = manifest_of(n_tokens, arguments.d_model)
        lay_out(root, manifest, layers)
        describe(manifest, layers, (root / SEAL_PATH).stat().st_size)
        for thing in THINGS:
            tell(thing, root, layers[0])
        shutil.rmtree(root)
    for n_contexts in (int(word) for word in arguments.dealt_out.split(",")):
        say(f"\n{n_contexts:,} contexts dealt out")
        tell(dealt_out, (arguments.folder, n_contexts), 0)


if __name__ == "__main__":
    main()
