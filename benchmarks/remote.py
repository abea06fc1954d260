"""Training straight from a server that takes its time, against training from a local copy.

    posae harvest demo.zarr --contexts 4096
    python benchmarks/remote.py demo.zarr [--delay 0.05] [--steps 240] [--window 512] [--rounds 3]

Serves the store by HTTP from another process, which waits `--delay` seconds before it answers each request.
Trains from it with an empty cache, and in turn from the folder. Told is, by preset, how fast the steps went
from the server, as a share of the local speed (median of rounds), and how long it took to open and check the
store. The weights must be the same: ends with 1 where they are not, or where a share is below 0.9.

By default one epoch of 4,096 contexts in eight windows: every chunk comes from the server, once.

Costs about 10 s of two cores a training; two presets, two trainings a round.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from posae.pipeline.settings import TRAIN_PRESETS, TrainSettings, build
from posae.pipeline.train import Training
from posae.store import ActivationStore
from posae.store.remote.cache import PartCache

LEAST = 0.9
PRESETS = ("paper", "posae")


class Slow(BaseHTTPRequestHandler):
    """Files below `root`, whole or in ranges, each after `delay` seconds."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, root: Path, delay: float) -> None:
        """Answer one connection."""
        self.root, self.delay = root, delay
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        """Say how long a file is."""
        self._answer(with_body=False)

    def do_GET(self) -> None:
        """Send a file, or a range of it."""
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        time.sleep(self.delay)
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        start, stop = 0, size
        asked = self.headers.get("Range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(size, int(last) + 1)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if with_body:
            with path.open("rb") as file:
                file.seek(start)
                self.wfile.write(file.read(stop - start))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def serve(root: Path, delay: float, ready: Connection) -> None:
    """Serve until the process is ended."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, root=root, delay=delay))
    ready.send(server.server_address[1])
    server.serve_forever()


class Timed(NamedTuple):
    """One training."""

    opening_seconds: float
    steps_per_second: float
    weights: bytes


def say(line: str) -> None:
    """A line for whoever measures."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def trained(place: str, folder: Path, settings: TrainSettings) -> Timed:
    """Train from `place`, with an empty cache."""
    begun = time.perf_counter()
    store = ActivationStore.open(place, PartCache(folder / "cache"))
    store.check_layer(store.layer_or_middle(None))
    training = Training(store, folder / "run", settings)
    opened = time.perf_counter()
    training.train()
    seconds = time.perf_counter() - opened
    weights = (folder / "run" / "sae_weights.safetensors").read_bytes()
    return Timed(opened - begun, settings.steps / seconds, weights)


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description="Training from a slow server, against a local copy.")
    parser.add_argument("store", type=Path)
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(given.store, given.delay, theirs), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}"
    store = ActivationStore.open(given.store)
    say(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    say(f"{store.n_contexts:,} contexts, d_model {store.d_model}, {given.delay * 1000:.0f} ms a request")
    failed = False
    for preset in PRESETS:
        settings = build(
            TrainSettings,
            {**TRAIN_PRESETS[preset], "steps": given.steps, "window_contexts": given.window},
            "[train]",
        )
        shares: list[float] = []
        openings: list[float] = []
        for _ in range(given.rounds):
            with tempfile.TemporaryDirectory() as name:
                local = trained(str(given.store), Path(name) / "local", settings)
                remote = trained(url, Path(name) / "remote", settings)
            failed |= local.weights != remote.weights
            shares.append(remote.steps_per_second / local.steps_per_second)
            openings.append(remote.opening_seconds)
        share = statistics.median(shares)
        failed |= share < LEAST
        told = ", ".join(f"{value:.3f}" for value in shares)
        seconds = statistics.median(openings)
        say(f"{preset}: {share:.3f} of the local speed ({told}); opening takes {seconds:.2f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
