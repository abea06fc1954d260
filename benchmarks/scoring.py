"""What scoring a run costs beside training it.

    OMP_NUM_THREADS=1 python benchmarks/scoring.py FOLDER [--d-model 512] [--features 16384] [--device cpu]

Trains BatchTopK for some steps on made-up activations, and scores it on held-out ones. Timed are the steps,
the pass over the held-out tokens, and what is done once: loading, nulls, groups of features. Printed are
CPU-seconds, or seconds on a GPU; and what share of a training of the default length, 20.48 million tokens, it
takes to score its held-out part, 5 % of the contexts.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from train import BATCH, LENGTH, Clock, made, say

from posae.pipeline.device import keep_freed_memory
from posae.pipeline.evaluate.evaluate import evaluate
from posae.pipeline.progress import Silent
from posae.pipeline.sae.run_settings import resolve_train_settings
from posae.pipeline.settings import EvaluateSettings
from posae.pipeline.train import Ongoing, Training, train_together

N_TRAINED = 10_000 * 2048
N_SCORED = N_TRAINED * 5 // 95
HELD_OUT = 160


class Passing(Silent):
    """Times the pass over the held-out tokens."""

    def __init__(self) -> None:
        """Nothing is timed yet."""
        self.clock = Clock()

    def begin(self, task: str, total: int, unit: str, done: int = 0, unit_bytes: int = 0) -> None:
        """Start."""
        self.clock.__enter__()

    def end(self) -> None:
        """Stop."""
        self.clock.__exit__()


def main() -> None:
    """Train, score, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--features", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--preset", default="batchtopk")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    keep_freed_memory()  # as posae train and posae evaluate do
    store = made(given.folder / f"scoring-{given.d_model}.zarr", given.d_model, 768, HELD_OUT)
    words = {"steps": given.steps, "batch_size": BATCH, "window_contexts": 256, "log_steps": 10**6}
    words |= {"dictionary_size": given.features, "checkpoint_steps": 10**6, "device": given.device}
    settings = resolve_train_settings(preset=given.preset, options=words)
    run = given.folder / "scored"
    shutil.rmtree(run, ignore_errors=True)
    training = Training(store, run, settings)
    ongoing = Ongoing.begin(training)
    assert ongoing is not None
    train_together([ongoing])
    passing, whole = Passing(), Clock()
    with whole:
        evaluate(run, EvaluateSettings(device=given.device), passing, store)
    name = "seconds" if training.device.type == "cuda" else "cpu_seconds"
    a_trained = getattr(ongoing.state.clock, name) / (given.steps * BATCH)
    a_scored = getattr(passing.clock, name) / (HELD_OUT * LENGTH)
    once = getattr(whole, name) - getattr(passing.clock, name)
    kind = "seconds" if name == "seconds" else "CPU-seconds"
    say(
        f"{given.preset}, d_model {given.d_model}, {given.features:,} features, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    say(f"training: {1000 * a_trained:.3f} {kind} per 1,000 tokens")
    say(f"scoring:  {1000 * a_scored:.3f} {kind} per 1,000 tokens, and {once:.1f} once")
    share = (a_scored * N_SCORED + once) / (a_trained * N_TRAINED)
    say(f"scoring {N_SCORED:,} tokens / training on {N_TRAINED:,}: {share:.3f}")


if __name__ == "__main__":
    main()
