"""Is what was planted found? Position-aware autoencoders against agnostic ones of the same size and L0.

    posae harvest demo.zarr --contexts 4096
    python benchmarks/planted.py demo.zarr FOLDER [--layer 2] [--seeds 0,1,2] [--steps 1500]

Plants each effect into a copy of the store (see `posae plant`), and trains on each copy BatchTopK with the
part that should find the effect, and without. The agnostic one gets features until it has at least as many
parameters; both read the same tokens in the same order, by seed. Told is how much less of the held-out
part's variance is left unexplained, in each seed, with the 95 % interval of the mean over seeds (Student's t
of the paired differences). An effect counts as found where the whole interval lies below 0. Where nothing is
planted, nothing may be found. Ends with 1 where this fails, or a gain is below its target.

Costs about 80 s of one core per run, eight runs per seed; run again, it resumes.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from posae.pipeline.evaluate.evaluate import evaluate
from posae.pipeline.sae.run_settings import train_presets, train_settings
from posae.pipeline.settings import EvaluateSettings, PlantSettings, build
from posae.pipeline.stores.plant import Planting
from posae.pipeline.train import Training
from posae.store import ActivationStore

T_OF_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t of a two-sided 95 % interval, by number of differences."""

MEAN = {"position_mean": "lowrank:8"}
ADAPTER = {"position_adapter": "decoder:8", "warmup_steps": 0, "ramp_steps": 1}
"""Without a curriculum: with one the gain was smaller (docs/benchmarks.md)."""


class Case(NamedTuple):
    """One effect, and what should find it."""

    effect: dict[str, Any]
    aware: dict[str, Any]
    target: float | None
    """The gain to be reached, as a share of the agnostic FVU; None where there is nothing to be found."""

    @property
    def name(self) -> str:
        """For lines."""
        return f"{self.effect['effect']}, {self.method}"

    @property
    def method(self) -> str:
        """The setting that should find it."""
        return str(next(iter(self.aware.values())))


CASES = [
    Case({"effect": "additive"}, MEAN, 0.05),
    Case({"effect": "rotation"}, ADAPTER, 0.03),
    Case({"effect": "none"}, MEAN, None),
    Case({"effect": "none"}, ADAPTER, None),
]


def width_of_size(n_parameters: int, size_at: Callable[[int], int]) -> int:
    """The narrowest dictionary that gives at least ``n_parameters``."""
    low, high = 1, n_parameters
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size_at(middle) >= n_parameters else (middle + 1, high)
    return low


def scores(store: ActivationStore, folder: Path, given: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train unless the run is there, and score it."""
    settings = train_settings(given | {"seed": seed, "data_seed": seed}, "")
    training = Training(store, folder, settings)
    training.train()
    if not (folder / "evaluation.json").exists():
        evaluate(folder, EvaluateSettings(store=store.root, device=settings.device))
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of their mean."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return -math.inf, math.inf
    half = T_OF_95[len(differences)] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean - half, mean + half


def measure(
    case: Case, source: ActivationStore, folder: Path, common: dict[str, Any], seeds: list[int]
) -> bool:
    """Plant, train, tell; whether it is as it should be."""
    effect = build(PlantSettings, case.effect | {"layer": common["layer"]}, "")
    words = "-".join(map(str, case.effect.values()))
    store = Planting(source, folder / f"{words}.zarr", effect).run().store
    sized = Training(store, folder / "unused", train_settings(common | case.aware, ""))
    n_parameters = sized.new_autoencoder(None).n_parameters()

    def size_at(width: int) -> int:
        settings = train_settings(common | {"dictionary_size": max(width, common["target_l0"])}, "")
        return Training(store, folder / "unused", settings).new_autoencoder(None).n_parameters()

    agnostic = common | {"dictionary_size": width_of_size(n_parameters, size_at)}
    r2 = store.position_r2(common["layer"])
    sys.stdout.write(
        f"{case.name}: position R2 {r2:.2%} (before {source.position_r2(common['layer']):.2%})\n"
    )
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    runs = folder / "runs" / words
    for seed in seeds:
        part = case.method.replace(":", "")
        plain = scores(store, runs / f"agnostic-{agnostic['dictionary_size']}-{seed}", agnostic, seed)
        aware = scores(store, runs / f"{part}-{seed}", common | case.aware, seed)
        pairs.append((plain, aware))
        for name, found in (("agnostic", plain), ("aware", aware)):
            by_range = " ".join(f"{value:.4f}" for value in found["fvu_by_range"])
            sys.stdout.write(
                f"  seed {seed}  {name:8}  {found['dictionary_size']:5} features  {found['n_parameters']:7,} "
                f"numbers  L0 {found['l0']:5.2f}  FVU {found['fvu']:.4f}  by range {by_range}\n"
            )
            sys.stdout.flush()
    changes = [aware["fvu"] / plain["fvu"] - 1 for plain, aware in pairs]
    low, high = interval(changes)
    is_found = high < 0
    mean = statistics.mean(changes)
    is_right = not is_found if case.target is None else is_found and -mean >= case.target
    verdict = "found" if is_found else "not found"
    wanted = "nothing to find" if case.target is None else f"target {-case.target:.0%}"
    sys.stdout.write(
        f"  FVU changes by {', '.join(f'{change:+.2%}' for change in changes)}; mean {mean:+.2%}, 95 % of "
        f"{low:+.2%} to {high:+.2%}: {verdict} ({wanted}){'' if is_right else '  NOT AS IT SHOULD BE'}\n"
    )
    return is_right


def main() -> None:
    """Every case; exit code 1 where one is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="store of a harvest; it is not changed")
    parser.add_argument("folder", type=Path, help="folder for planted stores and runs")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--dictionary-size", type=int, default=512)
    parser.add_argument("--only", default="", help="only cases whose name begins so")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    common = train_presets()["batchtopk"] | {
        "layer": arguments.layer,
        "dictionary_size": arguments.dictionary_size,
        "target_l0": 16,
        "steps": arguments.steps,
        "batch_size": 1024,
        "learning_rate": 1e-3,
        "device": "cpu",
    }
    sys.stdout.write(
        f"machine: {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}\n"
    )
    source = ActivationStore.open(arguments.store)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    right = [
        measure(case, source, arguments.folder, common, seeds)
        for case in CASES
        if case.name.startswith(arguments.only)
    ]
    sys.exit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
