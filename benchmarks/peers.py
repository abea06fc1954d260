"""posae against SAELens: what a harvest costs, for the same model and the same tokens.

    python benchmarks/peers.py FOLDER --saelens VENV/bin/python [--contexts 256] [--rounds 3]

VENV is an environment of its own, as SAELens pins other versions: `python -m venv VENV`, then
`VENV/bin/pip install torch==2.13.0 sae-lens`. The model is that of benchmarks/harvest.py, 6 layers, d_model
512, random weights, made in FOLDER; both run it in bfloat16 with batches of 32 contexts of 128 tokens.
SAELens caches what its CacheActivationsRunner can keep, float32 (its default) or float16; one run for
each layer, as it takes one hook at a time. posae keeps bfloat16, all layers in one run.

Each figure is from a process of its own, in turn, round after round; the clock starts when the model is
loaded and the tokens are there. Told are medians: tokens/s, tokens to a second of CPU time, bytes to a value
on the disk, and by how much the largest resident set exceeds that before the start. About a minute of two
cores for each layer and round.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTH, BATCH = 128, 32


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def resident_bytes() -> int:
    """The resident set now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_posae(folder: Path, layers: list[int], n_contexts: int, _dtype: str) -> dict[str, float]:
    """In a process of its own: one harvest."""
    from harvest import harvest

    from posae.pipeline.harvest.language_model import LanguageModel
    from posae.pipeline.settings import HarvestSettings

    root, model = folder / "posae.zarr", str(folder / "gemma-2-small-random")
    settings = HarvestSettings(model=model, layers=tuple(layers), contexts=n_contexts, device="cpu")
    loaded = LanguageModel.load(model)
    before = resident_bytes()
    seconds, cpu_seconds = harvest(root, settings, loaded)
    n_bytes = sum(size_of(root / f"layer_{layer}") for layer in layers)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": n_bytes, "before": before}


def run_saelens(folder: Path, layers: list[int], n_contexts: int, dtype: str) -> dict[str, float]:
    """In a process of its own, with SAELens's Python: a run for each layer."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    import numpy as np
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    tokens = Dataset.from_dict({"input_ids": np.load(folder / "tokens.npy")[:n_contexts].tolist()})
    model, root = folder / "gemma-2-small-random", folder / "saelens"
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    buffer_bytes = 32_768 * width * (4 if dtype == "float32" else 2)
    runners = [
        CacheActivationsRunner(
            CacheActivationsRunnerConfig(
                dataset_path="local",
                model_name=str(model),
                model_class_name="AutoModelForCausalLM",
                model_from_pretrained_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"},
                model_batch_size=BATCH,
                hook_name=f"model.layers.{layer}",
                d_in=width,
                training_tokens=n_contexts * LENGTH,
                context_size=LENGTH,
                new_cached_activations_path=str(root / f"layer_{layer}"),
                dtype=dtype,
                device="cpu",
                buffer_size_gb=(buffer_bytes + 1) / 1e9,
                shuffle=True,
                prepend_bos=True,
            ),
            override_dataset=tokens,
        )
        for layer in layers
    ]
    before = resident_bytes()
    started, used = time.perf_counter(), time.process_time()
    for runner in runners:
        runner.run()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "bytes": size_of(root),
        "before": before,
    }


WORK = {"posae": run_posae, "saelens": run_saelens}


def measure(python: str, given: Any, peer: str, layers: list[int], dtype: str) -> dict[str, float]:
    """What one process tells."""
    for left in ("posae.zarr", "saelens"):
        shutil.rmtree(given.folder / left, ignore_errors=True)
    words = ["--work", peer, "--layers", *map(str, layers), "--contexts", str(given.contexts)]
    command = [python, __file__, str(given.folder), *words, "--dtype", dtype]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def say(line: str) -> None:
    """A line for whoever measures."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def compare(given: Any) -> None:
    """Make model and tokens, run all in turn, tell."""
    import numpy as np
    from gemma_2_2b import make_model
    from harvest import harvest, small_configuration

    from posae.pipeline.harvest.language_model import LanguageModel
    from posae.pipeline.settings import HarvestSettings
    from posae.store import ActivationStore

    model = given.folder / "gemma-2-small-random"
    make_model(model, small_configuration())
    settings = HarvestSettings(model=str(model), layers=(0,), contexts=given.contexts, device="cpu")
    harvest(given.folder / "posae.zarr", settings, LanguageModel.load(str(model)))
    store = ActivationStore.open(given.folder / "posae.zarr")
    np.save(given.folder / "tokens.npy", store.tokens())
    cores = len(os.sched_getaffinity(0))
    say(f"{platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}, {given.contexts:,} contexts")
    contenders = {
        "posae": (sys.executable, "posae", "bfloat16"),
        "SAELens, float32": (given.saelens, "saelens", "float32"),
        "SAELens, float16": (given.saelens, "saelens", "float16"),
    }
    for layers in ([4], [1, 2, 4]):
        found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for _ in range(given.rounds):
            for name, (python, peer, dtype) in contenders.items():
                found[name].append(measure(python, given, peer, layers, dtype))
        for name, figures in found.items():
            tell(name, layers, given.contexts * LENGTH, store.d_model, figures, found["posae"])
    say(f"load {os.getloadavg()[0]:.1f}")


def tell(
    name: str,
    layers: list[int],
    n_tokens: int,
    d_model: int,
    figures: list[dict[str, float]],
    ours: list[dict[str, float]],
) -> None:
    """One line of medians; ratios are those within a round."""

    def median(values: list[float]) -> float:
        return statistics.median(values)

    say(
        f"{len(layers)} layer(s), {name}: "
        f"{median([n_tokens / f['seconds'] for f in figures]):,.0f} tokens/s, "
        f"{median([n_tokens / f['cpu_seconds'] for f in figures]):,.0f} a CPU-second, "
        f"{figures[0]['bytes'] / (n_tokens * d_model * len(layers)):.3f} bytes to a value, "
        f"memory {median([f['most'] - f['before'] for f in figures]) / 1e6:,.0f} MB more"
    )
    if figures is not ours:
        pairs = list(zip(figures, ours, strict=True))
        say(
            f"    posae is {median([f['seconds'] / o['seconds'] for f, o in pairs]):.2f} times as fast, "
            f"in CPU time {median([f['cpu_seconds'] / o['cpu_seconds'] for f, o in pairs]):.2f}"
        )


def main() -> None:
    """Compare, or do one piece of work for it."""
    parser = argparse.ArgumentParser(description="posae against SAELens: harvesting.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--saelens", help="the Python of an environment that has sae-lens")
    parser.add_argument("--contexts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.work:
        compare(given)
        return
    told = WORK[given.work](given.folder, given.layers, given.contexts, given.dtype)
    told["most"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(json.dumps(told))


if __name__ == "__main__":
    main()
