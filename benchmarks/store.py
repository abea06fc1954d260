"""The store against zarr-python, tensorstore and a bare memory map: speed, size, memory.

    make demo && python benchmarks/store.py FOLDER [--data data/demo.zarr] [--gigabytes 1.06] [--rounds 5]

Data: another store's activations, tiled up to d_model 2,304 (each block of features from another layer
or other contexts), so values and their statistics are real. All contenders run in turn, round
after round, in one process and one thread; a figure is the median over rounds of decoded GB to a
second of CPU time (all threads counted), a ratio the median of the ratios within a round. The page
cache is hot except where it says cold. Checksums are on in every reader that has them. Takes some
minutes, and 6.5 times the gigabytes on disk.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tensorstore
import zarr
from numcodecs import blosc
from numpy.typing import NDArray
from written import written

from posae.pipeline.ranges import equal_ranges
from posae.pipeline.train.batches import ShuffledBatches
from posae.store.bfloat16 import register_bfloat16
from posae.store.codecs import CHECKSUM_BYTES
from posae.store.layout import ArraySpec
from posae.store.manifest import Manifest, layer_spec
from posae.store.reader import ActivationStore
from posae.store.rounding import round_mantissas
from posae.store.shard_writer import encode_chunks
from posae.store.shards import ShardReader, index_bytes, parse_index
from posae.store.stats import bits_to_float32

LENGTH, D_MODEL = 128, 2304
WINDOW = 256
DEMO = Path(__file__).parents[1] / "data" / "demo.zarr"


def tiled(demo: ActivationStore, start: int, stop: int) -> NDArray[np.uint16]:
    """Contexts ``start`` to ``stop`` of the large store; bits [contexts, positions, D_MODEL]."""
    blocks: list[NDArray[np.uint16]] = []
    for block in range(D_MODEL // demo.d_model):
        layer = demo.layers[block % len(demo.layers)]
        contexts = (np.arange(start, stop) + 97 * (block // len(demo.layers))) % demo.n_contexts
        blocks.append(demo.read(layer, contexts))
    return np.concatenate(blocks, axis=2)


def make_store(root: Path, demo: ActivationStore, n_contexts: int, codec: str = "small") -> ActivationStore:
    """A sealed store of one layer; made once."""
    if (root / "seal.json").exists():
        return ActivationStore.open(root)
    manifest = demo.manifest.model_copy(
        update={
            "d_model": D_MODEL,
            "n_contexts": n_contexts,
            "held_out": (n_contexts - 8, n_contexts),
            "codec": codec,
            "model_layers": 1,
        }
    )
    ids = np.resize(demo.tokens(), (n_contexts, LENGTH)).astype(np.int32)
    whole = Manifest.model_validate(manifest.model_dump())
    return written(root, whole, ids, lambda start, stop: tiled(demo, start, stop))


def entropy_bound(bits: NDArray[np.uint16]) -> float:
    """The best ratio of any code that treats bytes alone: 16 bits over the two planes' entropies."""
    total = 0.0
    for plane in (bits >> 8, bits & 0xFF):
        share = np.bincount(plane.reshape(-1), minlength=256) / plane.size
        share = share[share > 0]
        total -= float((share * np.log2(share)).sum())
    return 16 / total


class Table:
    """Figures of contenders that run in turn."""

    def __init__(self, rounds: int) -> None:
        """Take so many rounds."""
        self.rounds = rounds

    def measure(self, n_bytes: int, contenders: dict[str, Callable[[], None]]) -> None:
        """Run and print: GB per CPU-second, GB per second of wall, ratio to the first."""
        cpu: dict[str, list[float]] = {name: [] for name in contenders}
        wall: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(self.rounds):
            for name, work in contenders.items():
                started, used = time.perf_counter(), time.process_time()
                work()
                cpu[name].append(n_bytes / 1e9 / (time.process_time() - used))
                wall[name].append(n_bytes / 1e9 / (time.perf_counter() - started))
        first = next(iter(contenders))
        for name in contenders:
            ratios = [a / b for a, b in zip(cpu[first], cpu[name], strict=True)]
            walls = [a / b for a, b in zip(wall[first], wall[name], strict=True)]
            say(
                f"  {name:34} {statistics.median(cpu[name]):6.2f} GB/CPU-s  "
                f"{statistics.median(wall[name]):6.2f} GB/s wall   {first} is "
                f"{statistics.median(ratios):.2f} x (CPU), {statistics.median(walls):.2f} x (wall)"
            )


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def chunk_readers(store: ActivationStore, order: NDArray[np.int64]) -> dict[str, Callable[[], None]]:
    """Whole chunks in random order, each reader into memory of its own choosing."""
    spec = store.spec("layer_0")
    reader = ShardReader(store.files, spec)
    buffer = np.empty(spec.chunk_shape, np.uint16)
    foreign = zarr.open_array(store.root / "layer_0", mode="r")
    opened = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {
                "driver": "file",
                "path": f"{store.root}/layer_0/",
                "file_io_mode": {"mode": "memmap"},
            },
            "recheck_cached_data": False,
        },
        read=True,
        context=tensorstore.Context({"data_copy_concurrency": {"limit": 1}}),
    ).result()
    rows = spec.chunk_rows

    def ours() -> None:
        for chunk in order:
            reader.read_chunk(int(chunk), buffer)

    def zarr_python() -> None:
        for chunk in order:
            foreign[int(chunk) * rows : (int(chunk) + 1) * rows]

    def tensorstore_memmap() -> None:
        for chunk in order:
            opened[int(chunk) * rows : (int(chunk) + 1) * rows].read().result()

    return {"posae": ours, "zarr-python": zarr_python, "tensorstore (memmap)": tensorstore_memmap}


def codec_alone(store: ActivationStore) -> Callable[[], None]:
    """What the codec itself costs: payloads in memory, no file, no index, no checksum."""
    spec = store.spec("layer_0")
    payloads: list[bytes] = []
    for shard in range(spec.n_shards):
        data = (store.root / spec.shard_path(shard)).read_bytes()
        places = parse_index(spec, shard, data[-index_bytes(spec) :], len(data))
        payloads += [data[int(a) : int(a) + int(n) - CHECKSUM_BYTES] for a, n in places]
    buffer = np.empty(spec.chunk_shape, np.uint16)

    def decode() -> None:
        for payload in payloads:
            blosc.decompress(payload, buffer)

    return decode


def raw_against_memmap(
    store: ActivationStore, order: NDArray[np.int64], flat: Path, table: Table, n_bytes: int
) -> None:
    """Uncompressed chunks against copies out of a bare memory map: at first, with checksums, and later."""
    shape = (store.n_contexts, LENGTH, D_MODEL)
    if not flat.exists() or flat.stat().st_size != np.prod(shape) * 2:
        values = np.memmap(flat, np.uint16, "w+", shape=shape)
        for start in range(0, store.n_contexts, 256):
            values[start : start + 256] = store.read(0, slice(start, min(start + 256, store.n_contexts)))
        values.flush()
    mapped = np.memmap(flat, np.uint16, "r", shape=shape)
    opened = ShardReader(store.files, store.spec("layer_0"))
    buffer = np.empty((8, LENGTH, D_MODEL), np.uint16)

    def copies(values: NDArray[np.uint16]) -> None:
        for chunk in order:
            np.copyto(buffer, values[int(chunk) * 8 : (int(chunk) + 1) * 8])

    def reads(reader: ShardReader) -> None:
        for chunk in order:
            reader.read_chunk(int(chunk), buffer)

    reads(opened)
    say("raw, every reading but the first, against a bare memory map without checksums")
    table.measure(n_bytes, {"posae": lambda: reads(opened), "np.memmap copy": lambda: copies(mapped)})
    say("raw, the first reading, which checks every byte, against a bare memory map newly made")
    table.measure(
        n_bytes,
        {
            "posae": lambda: reads(ShardReader(store.files, store.spec("layer_0"))),
            "np.memmap copy": lambda: copies(np.memmap(flat, np.uint16, "r", shape=shape)),
        },
    )


def main() -> None:
    """Make the stores, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=DEMO)
    parser.add_argument("--gigabytes", type=float, default=1.06)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print_peak(arguments.peak_of)
        return
    register_bfloat16()
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
    folder: Path = arguments.folder
    demo = ActivationStore.open(arguments.data)
    n_contexts = round(arguments.gigabytes * 1e9 / (LENGTH * D_MODEL * 2) / 8) * 8
    say(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"numpy {np.__version__}, zarr {zarr.__version__}, tensorstore {version('tensorstore')}; "
        f"{n_contexts} contexts x {LENGTH} x {D_MODEL}, tiled from {demo.manifest.model}"
    )
    table = Table(arguments.rounds)
    stores = {c: make_store(folder / f"{c}.zarr", demo, n_contexts, c) for c in ("small", "fast", "raw")}
    order = np.random.default_rng(0).permutation(stores["small"].spec("layer_0").n_chunks)
    cold(stores, order, arguments.rounds)  # first: what a process has mapped stays in the cache
    sizes(stores)
    n_bytes = len(order) * stores["small"].spec("layer_0").chunk_bytes
    for codec, store in stores.items():
        say(f"reading whole chunks in random order, one thread, {codec}")
        contenders = chunk_readers(store, order)
        if codec != "raw":
            contenders["codec alone, in memory"] = codec_alone(store)
        table.measure(n_bytes, contenders)
    raw_against_memmap(stores["raw"], order, folder / "flat", table, n_bytes)

    scaling(stores["small"], order, table, n_bytes)
    batches(stores["small"], table)
    writing(folder, demo, stores["small"].manifest, table)
    memory(folder, demo, n_contexts)


def sizes(stores: dict[str, ActivationStore]) -> None:
    """Ratios beside the bound, which is computed here from the data, and what rounding would give."""
    sample = stores["raw"].read(0, slice(0, 256))
    for codec, store in stores.items():
        bound = entropy_bound(sample)
        ratio = store.raw_bytes(0) / store.stored_bytes(0)
        say(f"size of {codec}: ratio {ratio:.3f}, byte-plane bound {bound:.3f}, {ratio / bound:.1%} of it")
    values = bits_to_float32(sample).astype(np.float64)
    variation = float(np.square(values - values.mean(axis=(0, 1))).sum())
    spec = stores["small"].spec("layer_0")
    for mantissa_bits in (6, 5, 4, 3):
        rounded = round_mantissas(sample, mantissa_bits)
        ratio = sample.nbytes / sum(map(len, encode_chunks(spec, rounded)))
        error = values - bits_to_float32(rounded)
        relative = np.linalg.norm(error, axis=-1) / np.linalg.norm(values, axis=-1)
        say(
            f"size of small with {mantissa_bits} mantissa bits: ratio {ratio:.3f}, byte-plane bound "
            f"{entropy_bound(rounded):.3f}; relative error {relative.mean():.2%}, "
            f"FVU {np.square(error).sum() / variation:.1e}"
        )


def scaling(store: ActivationStore, order: NDArray[np.int64], table: Table, n_bytes: int) -> None:
    """Two threads against one."""
    spec = store.spec("layer_0")
    reader = ShardReader(store.files, spec)

    def with_threads(n_threads: int) -> None:
        buffers = np.empty((n_threads, *spec.chunk_shape), np.uint16)

        def work(thread: int) -> None:
            for chunk in order[thread::n_threads]:
                reader.read_chunk(int(chunk), buffers[thread])

        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(work, range(n_threads)))

    say("reading whole chunks, small, by threads (see wall)")
    table.measure(n_bytes, {"two threads": lambda: with_threads(2), "one thread": lambda: with_threads(1)})


def batches(store: ActivationStore, table: Table) -> None:
    """Shuffled batches of 2,048 with positions against decoding the same chunks and no more."""
    shuffled = ShuffledBatches(store, 0, equal_ranges(LENGTH, 4), window_contexts=WINDOW, threads=1)
    order = shuffled.order
    epochs = 2
    n_steps = sum(
        order.steps_of_window(chunks) for epoch in range(epochs) for chunks in order.windows_of_epoch(epoch)
    )
    spec = store.spec("layer_0")
    reader = ShardReader(store.files, spec)
    window = np.empty((WINDOW // spec.chunk_rows, *spec.chunk_shape), np.uint16)

    def all_batches() -> None:
        for _ in shuffled.steps(0, n_steps):
            pass

    def bare() -> None:
        for epoch in range(epochs):
            for number, chunk in enumerate(order.chunks_of_epoch(epoch)):
                reader.read_chunk(int(chunk), window[number % len(window)])

    all_batches()
    say(f"shuffled batches of 2,048 with positions, windows of {WINDOW} contexts, one decoding thread")
    table.measure(epochs * order.n_chunks * spec.chunk_bytes, {"batches": all_batches, "bare decode": bare})


def cold(stores: dict[str, ActivationStore], order: NDArray[np.int64], rounds: int) -> None:
    """Chunks that are not in the page cache: read ahead of the decoding, or not."""
    chosen = order[:32]
    for codec, store in stores.items():
        spec = store.spec("layer_0")
        walls: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(rounds):
            for is_ahead, found in walls.items():
                for shard in range(spec.n_shards):
                    with (store.root / spec.shard_path(shard)).open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                seconds = seconds_of_reading(store, chosen, is_ahead=is_ahead)
                found.append(len(chosen) * spec.chunk_bytes / 1e9 / seconds)
        ahead, none = statistics.median(walls[True]), statistics.median(walls[False])
        say(
            f"cold cache, 32 chunks in random order, {codec}: WILLNEED ahead {ahead:.2f} GB/s wall, "
            f"none {none:.2f}, {ahead / none:.2f} x"
        )


def seconds_of_reading(store: ActivationStore, chunks: NDArray[np.int64], *, is_ahead: bool) -> float:
    """By a reader of its own, as what is mapped does not leave the cache."""
    spec = store.spec("layer_0")
    reader = ShardReader(store.files, spec)
    buffer = np.empty(spec.chunk_shape, np.uint16)
    started = time.perf_counter()
    if is_ahead:
        reader.will_need(chunks.tolist())
    for chunk in chunks:
        reader.read_chunk(int(chunk), buffer)
    return time.perf_counter() - started


def memory(folder: Path, demo: ActivationStore, n_contexts: int) -> None:
    """Peak memory of reading an epoch of batches, each in a process of its own."""
    two_windows = 2 * WINDOW * LENGTH * D_MODEL * 2 / 1e6
    say(f"peak memory of an epoch of batches, windows of {WINDOW} contexts, two windows {two_windows:.0f} MB")
    for factor in (1, 4, 16):
        store = make_store(folder / f"memory-{factor}.zarr", demo, factor * n_contexts // 4 // 8 * 8)
        words = [sys.executable, __file__, str(folder), "--peak-of", str(store.root)]
        ended = subprocess.run(words, check=True, capture_output=True, text=True)
        decoded, stored = store.raw_bytes(0) / 1e9, store.stored_bytes(0) / 1e9
        say(f"  {factor:2} x ({decoded:5.2f} GB decoded, {stored:.2f} stored): {ended.stdout}")


def print_peak(root: Path) -> None:
    """Read an epoch in this process; print its peaks."""
    shuffled = ShuffledBatches(
        ActivationStore.open(root), 0, equal_ranges(LENGTH, 4), window_contexts=WINDOW, threads=2
    )
    order = shuffled.order
    anonymous = mapped = 0
    for batch in shuffled.steps(0, sum(map(order.steps_of_window, order.windows_of_epoch(0)))):
        if batch.step % 16 == 0:
            lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            anonymous = max(anonymous, int(lines["RssAnon"].split()[0]))
            mapped = max(mapped, int(lines["RssFile"].split()[0]))
    sys.stdout.write(
        f"{anonymous / 1e3:.0f} MB of its own, and {mapped / 1e3:.0f} MB of files mapped at the most"
    )


def writing(folder: Path, demo: ActivationStore, manifest: Manifest, table: Table) -> None:
    """One durable shard of 512 contexts, encoded in one thread; statistics are not made here."""
    spec = layer_spec(manifest, 0)
    rows = tiled(demo, 0, min(spec.shard_rows, spec.shape[0]))
    ours_at, zarr_at = folder / "ours.zarr", folder / "theirs.zarr"

    def ours() -> None:
        write_ours(ours_at, spec, rows)

    def zarr_python() -> None:
        shutil.rmtree(zarr_at, ignore_errors=True)
        zarr_at.mkdir()
        (zarr_at / "zarr.json").write_bytes((folder / "small.zarr" / spec.metadata_path).read_bytes())
        zarr.open_array(zarr_at, mode="r+")[: len(rows)] = rows
        with (zarr_at / "c.0.0.0").open("rb+") as file:
            os.fsync(file.fileno())

    say("writing a durable shard, small, one thread")
    table.measure(rows.nbytes, {"posae": ours, "zarr-python + fsync": zarr_python})
    same = (ours_at / "layer_0" / "c.0.0.0").read_bytes() == (zarr_at / "c.0.0.0").read_bytes()
    say(f"  the two files are {'byte-identical' if same else 'DIFFERENT'}")


def write_ours(root: Path, spec: ArraySpec, rows: NDArray[np.uint16]) -> None:
    """One shard by our writer, streamed chunk by chunk."""
    from posae.store.files import StoreFiles
    from posae.store.shard_writer import ShardWriter

    shutil.rmtree(root, ignore_errors=True)
    (root / spec.path).mkdir(parents=True)
    writer = ShardWriter.try_lock(StoreFiles(root), spec, 0, wait=True)
    assert writer
    for start in range(0, len(rows), spec.chunk_rows):
        for encoded in encode_chunks(spec, rows[start : start + spec.chunk_rows]):
            writer.append(encoded)
    writer.finish()
    writer.commit()


if __name__ == "__main__":
    main()
