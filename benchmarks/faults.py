"""The store under faults: killed, out of space, cut short, its bits flipped. What is found, what is lost?

    python benchmarks/faults.py FOLDER [--kills 200] [--pairs 100] [--disks 40] [--cuts 100] [--flips 1000]

Every harvest is the real command, on the demo model, in a process forked off this one, which has run it
before (so that moments fall into the harvest and not into three seconds of imports). Full disks need root, to
mount a small file system in FOLDER. Figures and what follows from them: docs/reliability.md. A fault that is
not found, or bytes that differ, are told, and the exit code is 1. Takes a quarter of an hour on two cores.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # threads do not survive a fork

import numpy as np

from posae import __version__
from posae.cli.app import main as posae_main
from posae.pipeline.ranges import equal_ranges
from posae.pipeline.train.batches import ShuffledBatches
from posae.store.errors import StoreDamagedError, StoreError
from posae.store.layout import ArraySpec
from posae.store.reader import ActivationStore
from posae.store.shards import index_bytes, parse_index
from posae.store.verify import verify

LAYERS, LENGTH, SHARD = (1, 3), 4, 512
SETTINGS = ("--contexts", "1600", "--context-length", str(LENGTH), "--layers", "1,3")
WAIT_SECONDS = 0.0002


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Faults:
    """The folder that all happens in, an undisturbed harvest to compare with, and what went wrong."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Harvest once without faults, and a few times more to know how long it takes."""
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        self.wrong: list[str] = []
        self.whole = folder / "whole.zarr"
        self.seconds = 0.0
        shutil.rmtree(self.whole, ignore_errors=True)
        assert self.run("harvest", self.whole, *SETTINGS) == 0
        for _ in range(3):
            shutil.rmtree(self.whole)
            harvest = self.begin("harvest", self.whole, *SETTINGS)
            self.wait_for(self.whole, harvest)
            began = time.monotonic()
            assert ended(harvest) == 0
            self.seconds = time.monotonic() - began
        self.tree = tree(self.whole)
        self.store = ActivationStore.open(self.whole)
        self.activations = {layer: self.store.read(layer) for layer in LAYERS}

    def begin(self, *words: object) -> int:
        """The process that runs a command."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 99
        try:
            # What no Python writes, the handler of SIGBUS, goes there too.
            os.dup2(os.open(self.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 2)
            code = self.run(*words)
        finally:
            os._exit(code)

    def run(self, *words: object) -> int:
        """Run a command in this process: what it ends with; what it says goes to ``said``."""
        sys.argv = ["posae", *map(str, words)]
        streams = sys.stdout, sys.stderr
        with (self.folder / "said").open("w", buffering=1) as said:
            sys.stdout = sys.stderr = said
            try:
                posae_main()
            except SystemExit as end:
                return int(end.code or 0)
            finally:
                sys.stdout, sys.stderr = streams
        return 0

    def error_lines(self) -> list[str]:
        """The errors that the last command told."""
        lines = (self.folder / "said").read_text().splitlines()
        return [line for line in lines if line.startswith("error: ") or "Traceback" in line]

    def wait_for(self, path: Path, child: int) -> None:
        """Until ``path`` is there, or the process has ended."""
        while not path.exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(WAIT_SECONDS)

    def expect(self, holds: bool, what: str) -> None:
        """Tell and keep what does not hold."""
        if not holds:
            self.wrong.append(what)
            say(f"  WRONG: {what}")

    def check_what_is_there(self, root: Path, when: str) -> str:
        """It opens, verifies, and a reader sees whole shards of what was written; says how far it came."""
        if not (root / "zarr.json").exists():
            return "before the root"
        store = ActivationStore.open(root)
        damaged = verify(store).damaged
        self.expect(not damaged, f"{when}: damage {damaged}")
        code = ended(self.begin("inspect-store", root, "--verify"))
        self.expect(code == 0, f"{when}: inspect-store --verify ends with {code}")
        for layer in store.layers:
            n = store.contexts_by_layer[layer]
            self.expect(n % SHARD == 0 or n == self.store.n_contexts, f"{when}: {n} contexts")
            same = (store.read(layer) == self.activations[layer][:n]).all()
            self.expect(bool(same), f"{when}: a reader sees other values in layer {layer}")
        same = (store.tokens() == self.store.tokens(slice(store.n_contexts))).all()
        self.expect(bool(same), f"{when}: a reader sees other tokens")
        if store.is_sealed:
            return "sealed"
        if not (root / "stats/zarr.json").exists():
            return "before the tokens were committed"
        return f"{store.n_contexts:,} contexts committed"

    def check_finishes(self, root: Path, when: str) -> None:
        """The same command finishes it, with the same bytes."""
        code = ended(self.begin("harvest", root, *SETTINGS))
        self.expect(code == 0, f"{when}: going on ends with {code}: {self.error_lines()}")
        self.expect(tree(root) == self.tree, f"{when}: other bytes than without the fault")

    def kill(self, child: int, seconds: float) -> bool:
        """Kill a process after some seconds; whether it had not ended by itself."""
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        return ended(child) == -signal.SIGKILL


def ended(child: int) -> int:
    """The exit status of a process; negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(root: Path) -> dict[str, bytes]:
    """Every file and its bytes."""
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


def kills(faults: Faults, n_kills: int) -> None:
    """One harvest, killed at a random moment from the making of its folder to its end."""
    say(f"harvest killed, {n_kills} times at random within its {faults.seconds:.2f} s of writing")
    reached: Counter[str] = Counter()
    while reached.total() < n_kills:
        root = faults.folder / "killed.zarr"
        harvest = faults.begin("harvest", root, *SETTINGS)
        faults.wait_for(root, harvest)
        moment = float(faults.rng.uniform(0, faults.seconds))
        if faults.kill(harvest, moment):
            when = f"killed after {moment:.4f} s"
            reached[faults.check_what_is_there(root, when)] += 1
            faults.check_finishes(root, when)
        shutil.rmtree(root)
    tell(reached)


def pairs(faults: Faults, n_pairs: int) -> None:
    """Two harvests of one store side by side; one is killed, or both are, each at a moment of its own."""
    say(f"two harvests side by side, {n_pairs} times; in every other round both are killed, else one")
    reached: Counter[str] = Counter()
    n_killed = 0
    for number in range(n_pairs):
        root = faults.folder / "pair.zarr"
        harvests = [faults.begin("harvest", root, *SETTINGS) for _ in range(2)]
        faults.wait_for(root, harvests[0])
        moments = np.sort(faults.rng.uniform(0, faults.seconds, 1 + number % 2))
        when = f"pair {number}, killed after {moments} s"
        for harvest, pause in zip(harvests, np.diff(moments, prepend=0), strict=False):
            n_killed += faults.kill(harvest, float(pause))
        if len(moments) == 1:
            code = ended(harvests[1])
            faults.expect(code == 0, f"{when}: the other one ends with {code}: {faults.error_lines()}")
            faults.expect(tree(root) == faults.tree, f"{when}: the other one leaves other bytes")
        reached[faults.check_what_is_there(root, when)] += 1
        faults.check_finishes(root, when)
        shutil.rmtree(root)
    say(f"  {n_killed} processes killed")
    tell(reached)


def tell(reached: Counter[str]) -> None:
    """How far the killed ones had come."""
    for place, count in sorted(reached.items()):
        say(f"  {place:36} {count:5}")


@contextmanager
def disk(folder: Path, n_bytes: int) -> Iterator[None]:
    """A file system of so many bytes."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def disks(faults: Faults, n_disks: int) -> None:
    """A harvest onto disks of every size that is too small; then room is made, and it resumes."""
    pages = sum(-(-len(data) // 4096) for data in faults.tree.values())
    sizes = np.linspace(1, pages - 1, n_disks).astype(int) * 4096
    say(f"harvest onto {n_disks} disks of {sizes[0]:,} to {sizes[-1]:,} bytes, all too small")
    place = faults.folder / "disk"
    reached: Counter[str] = Counter()
    for size in sizes:
        with disk(place, int(size)):
            root, when = place / "a.zarr", f"disk of {size:,} bytes"
            code, lines = ended(faults.begin("harvest", root, *SETTINGS)), faults.error_lines()
            one = code == 1 and len(lines) == 1 and "no space left" in lines[0]
            faults.expect(one, f"{when}: ends with {code} and {lines}")
            faults.expect(not list(root.rglob("*.partial")), f"{when}: leaves temporary files")
            reached[faults.check_what_is_there(root, when)] += 1
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
            faults.check_finishes(root, when)
    tell(reached)


def cuts(faults: Faults, n_cuts: int) -> None:
    """Every shard cut short at a random moment while inspect-store --verify reads the store."""
    say(f"all shards cut short at random while inspect-store --verify reads, {n_cuts} times")
    root = faults.folder / "cut.zarr"
    shutil.copytree(faults.whole, root)
    began = time.monotonic()
    assert ended(faults.begin("inspect-store", root, "--verify")) == 0
    seconds = time.monotonic() - began
    files = [path for path in faults.tree if path.startswith("layer_") and "/c." in path]
    ends: Counter[str] = Counter()
    for number in range(n_cuts):
        sizes = [int(faults.rng.integers(len(faults.tree[path]))) for path in files]
        reading = faults.begin("inspect-store", root, "--verify")
        time.sleep(float(faults.rng.uniform(0, seconds)))
        for path, size in zip(files, sizes, strict=True):
            os.truncate(root / path, size)
        code, lines = ended(reading), faults.error_lines()
        told = (faults.folder / "said").read_text().count("damaged: ")
        if code == 0:
            ends["was done before"] += 1
        elif lines:
            ends["one line, by the handler of SIGBUS"] += 1
        else:
            ends["told as damage"] += 1
        right = code == 0 or (code == 1 and (told >= 1 or len(lines) == 1))
        faults.expect(right, f"cut {number}: ends with {code} and {lines}")
        for path in files:
            (root / path).write_bytes(faults.tree[path])
    tell(ends)
    shutil.rmtree(root)


class Flip:
    """One bit of a sealed store, and what finds that it was flipped."""

    def __init__(self, faults: Faults, root: Path, path: str, bit: int) -> None:
        """Flip bit ``bit`` of the file at ``path``."""
        self.faults, self.root, self.path, self.byte = faults, root, path, bit // 8
        data = bytearray(faults.tree[path])
        data[bit // 8] ^= 1 << bit % 8
        (root / path).write_bytes(data)
        self.data = bytes(data)

    def undo(self) -> None:
        """As it was."""
        (self.root / self.path).write_bytes(self.faults.tree[self.path])

    def verified(self) -> tuple[bool, bool]:
        """Whether ``verify`` finds it, and whether it names the place and no other."""
        try:
            found = [damage[:3] for damage in verify(ActivationStore(self.root)).damaged]
        except StoreError as error:
            return True, self.path in str(error)
        if self.path == "seal.json":
            return bool(found), {name for name, _, _ in found} <= self._entries_changed()
        return bool(found), found == [place_of(self.faults, self.path, self.byte)]

    def _entries_changed(self) -> set[str]:
        before, now = (json.loads(data)["files"] for data in (self.faults.tree["seal.json"], self.data))
        paths = {path for path in {**before, **now} if before.get(path) != now.get(path)}
        return paths | {path.rpartition("/")[0] for path in paths}

    def stops(self, work: Callable[[ActivationStore], str], wanted: str) -> tuple[bool, bool]:
        """Whether ``work`` stops with an error, and whether it silently gives something else."""
        try:
            found = work(ActivationStore.open(self.root))
        except StoreDamagedError as error:
            # A chunk that training meets is named as verify names it.
            place = place_of(self.faults, self.path, self.byte)
            named = self.path == "seal.json" or error.array in (place[0], self.path)
            self.faults.expect(named, f"flip in {self.path}: reading says {error}")
            return True, False
        except StoreError:
            return True, False
        return False, found != wanted


def place_of(faults: Faults, path: str, byte: int) -> tuple[str, int | None, int | None]:
    """Array, shard and chunk that a byte of a file lies in; the chunk is None in an index."""
    name, _, key = path.rpartition("/")
    if not key.startswith("c."):
        return path, None, None
    shard = int(key.split(".")[1])
    for chunk, (offset, size) in enumerate(chunks_of(faults, path)):
        if offset <= byte < offset + size:
            return name, shard, chunk
    return name, shard, None


def chunks_of(faults: Faults, path: str) -> list[tuple[int, int]]:
    """Offset and size of the chunks in a shard's file."""
    name, _, key = path.rpartition("/")
    spec: ArraySpec = faults.store.spec(name)
    data = faults.tree[path]
    index = parse_index(spec, int(key.split(".")[1]), data[-index_bytes(spec) :], len(data))
    return [(int(offset), int(size)) for offset, size in index]


def kinds(faults: Faults) -> dict[str, list[str]]:
    """The files of each kind; a shard's counts as its chunks and as its index."""
    shards = [path for path in faults.tree if "/c." in path]
    of = {
        "activations": [path for path in shards if path.startswith("layer_")],
        "tokens, documents, positions": [p for p in shards if not p.startswith(("layer_", "stats/"))],
        "statistics": [path for path in shards if path.startswith("stats/")],
    }
    found = {f"{name}: {part}": paths for part in ("chunks", "index") for name, paths in of.items()}
    found["metadata (zarr.json)"] = [path for path in faults.tree if path.endswith("zarr.json")]
    found["seal.json"] = ["seal.json"]
    return found


def read_all(store: ActivationStore) -> str:
    """Digest of all that a reader can ask for."""
    digest = hashlib.sha256(json.dumps(store.corpus).encode())
    for values in (store.tokens(), store.documents()):
        digest.update(values.tobytes())
    for layer in store.layers:
        digest.update(store.read(layer).tobytes())
        for values in (*store.stats(layer), store.norms(layer).mean):
            digest.update(values.tobytes())
    return digest.hexdigest()


def train_once(store: ActivationStore) -> str:
    """Digest of all batches of an epoch of each layer, after the checks that ``posae train`` makes."""
    digest = hashlib.sha256()
    for layer in LAYERS:
        store.check_layer(layer)
        for values in store.stats(layer):
            digest.update(values.tobytes())
        special = store.manifest.special_token_ids
        shuffled = ShuffledBatches(
            store, layer, equal_ranges(LENGTH, 4), window_contexts=256, leave_out=special, threads=1
        )
        order = shuffled.order
        n_steps = sum(order.steps_of_window(chunks) for chunks in order.windows_of_epoch(0))
        for batch in shuffled.steps(0, n_steps):
            for values in (batch.activations, batch.positions, batch.tokens, batch.range_offsets):
                digest.update(values.tobytes())
    return digest.hexdigest()


def flips(faults: Faults, n_flips: int) -> None:
    """One flipped bit at a time, as many of each kind."""
    say(f"{n_flips:,} flipped bits of a sealed store of {sum(map(len, faults.tree.values())):,} bytes")
    heads = ("flips", "verify", "right place", "reading all", "training", "silent")
    say(f"  {'kind':36}" + "".join(f"{head:>12}" for head in heads))
    root = faults.folder / "flipped.zarr"
    shutil.copytree(faults.whole, root)
    wanted_all, wanted_batches = read_all(faults.store), train_once(faults.store)
    files = kinds(faults)
    sums: dict[str, list[int]] = {kind: [0] * len(heads) for kind in files}
    for number in range(n_flips):
        kind = list(files)[number % len(files)]
        path = str(faults.rng.choice(files[kind]))
        start, stop = 0, len(faults.tree[path])
        if kind.endswith(("chunks", "index")):
            middle = sum(size for _, size in chunks_of(faults, path))
            start, stop = (0, middle) if kind.endswith("chunks") else (middle, stop)
        flip = Flip(faults, root, path, int(faults.rng.integers(8 * start, 8 * stop)))
        found, right = flip.verified()
        read_stops, read_silent = flip.stops(read_all, wanted_all)
        train_stops, train_silent = flip.stops(train_once, wanted_batches)
        silent = not found or read_silent or train_silent
        faults.expect(not silent and right, f"flip in {path}, byte {flip.byte}: {found=} {right=} {silent=}")
        figures = (1, found, right, read_stops, train_stops, silent)
        sums[kind] = [a + b for a, b in zip(sums[kind], figures, strict=True)]
        flip.undo()
    faults.expect(tree(root) == faults.tree, "flips were not undone")
    for kind, figures in sums.items():
        say(f"  {kind:36}" + "".join(f"{figure:12,}" for figure in figures))
    totals = [sum(column) for column in zip(*sums.values(), strict=True)]
    say(f"  {'all':36}" + "".join(f"{figure:12,}" for figure in totals))
    shutil.rmtree(root)


def main() -> None:
    """All of it, in turn; each number may be 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--disks", type=int, default=40)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of moments and places")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    faults = Faults(arguments.folder, arguments.seed)
    n_bytes = sum(map(len, faults.tree.values()))
    say(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, posae {__version__}, "
        f"Python {platform.python_version()}; store of {len(faults.tree)} files, {n_bytes:,} bytes"
    )
    parts = (
        (kills, arguments.kills),
        (pairs, arguments.pairs),
        (disks, arguments.disks),
        (cuts, arguments.cuts),
        (flips, arguments.flips),
    )
    for part, count in parts:
        if count:
            part(faults, count)
    say(f"{len(faults.wrong)} wrong, {time.monotonic() - began:.0f} s")
    sys.exit(1 if faults.wrong else 0)


if __name__ == "__main__":
    main()
