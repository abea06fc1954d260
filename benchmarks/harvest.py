"""posae harvest against the same model's bare forward pass: speed, memory, how busy the device is.

    python benchmarks/harvest.py FOLDER [--gemma] [--device auto] [--contexts 512] [--rounds 5]

The model has random weights and is made in FOLDER: a Gemma 2 of 6 layers and d_model 512, or with --gemma
the true configuration of Gemma-2-2B (5.2 GB). Text is the standard library, 128 tokens to a context.
In turn, round after round, in one process and with one loaded model: the bare pass runs the batches through
transformers, stops after the last wanted layer and throws everything away; the harvest runs them and
leaves a sealed store. Its time begins when the tokens are committed and the model is loaded. Told is
the median over rounds of the harvest's tokens/s over the bare pass's, in time and in CPU time.

FLOPs are those of the matrix products of the layers that run, counted from the configuration (attention with
all pairs of positions, as eager attention computes them). The peak is --peak-tflops, or the best of some
products of 4,096 x 4,096 bfloat16 matrices (1,024 on a CPU) in the same run.

Memory: in two fresh processes, one harvesting four times as much as the other: by how much the largest
resident set is larger than that of a bare pass over one batch. 6 layers: about 40 s of two cores a round.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gemma_2_2b import DEMO, make_model, true_configuration
from transformers import Gemma2Config

from posae.pipeline.harvest.harvest import Harvest
from posae.pipeline.harvest.language_model import LanguageModel
from posae.pipeline.settings import HarvestSettings
from posae.store import ActivationStore

LENGTH = 128
BATCH = 32


def small_configuration() -> Gemma2Config:
    """Six layers, d_model 512, the demo model's vocabulary."""
    demo = json.loads((DEMO / "config.json").read_text())
    return Gemma2Config(
        vocab_size=demo["vocab_size"],
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=512,
        max_position_embeddings=1024,
        bos_token_id=demo["bos_token_id"],
        eos_token_id=demo["eos_token_id"],
        pad_token_id=demo["pad_token_id"],
    )


def flops_to_a_token(configuration: Any, n_layers: int) -> float:
    """Of the matrix products of so many layers; two to a multiplication and addition."""
    width, heads = configuration.hidden_size, configuration.num_attention_heads * configuration.head_dim
    keys = configuration.num_key_value_heads * configuration.head_dim
    weights = width * (2 * heads + 2 * keys) + 3 * width * configuration.intermediate_size
    return n_layers * (2.0 * weights + 4.0 * LENGTH * heads)


class Stopped(Exception):
    """The forward pass has gone as far as wanted."""


def stop(*_: object) -> None:
    """End a forward pass."""
    raise Stopped


def bare(model: LanguageModel, tokens: torch.Tensor, last: int, batch: int = BATCH) -> None:
    """Run all batches through transformers up to one layer, and keep nothing."""
    hook = model.blocks[last].register_forward_hook(stop)
    try:
        for start in range(0, len(tokens), batch):
            try:
                with torch.inference_mode():
                    model.text_model(tokens[start : start + batch].to(model.device))
            except Stopped:
                pass
    finally:
        hook.remove()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


class LoadedHarvest(Harvest):
    """A harvest that is given a loaded model; its time begins when the tokens are committed."""

    loaded: LanguageModel
    started: tuple[float, float]

    def _load_model(self) -> LanguageModel:
        return self.loaded

    def _commit_tokens(self, *arguments: Any) -> None:
        super()._commit_tokens(*arguments)
        self.started = (time.perf_counter(), time.process_time())


def harvest(root: Path, settings: HarvestSettings, model: LanguageModel) -> tuple[float, float]:
    """Harvest anew; seconds and CPU-seconds."""
    shutil.rmtree(root, ignore_errors=True)
    work = LoadedHarvest(root, settings)
    work.loaded = model
    work.run()
    return time.perf_counter() - work.started[0], time.process_time() - work.started[1]


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds and CPU-seconds."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - used


def measured_peak(device: torch.device, size: int | None = None) -> float:
    """FLOP/s of a product of two bfloat16 matrices, the best of some."""
    size = size or (4096 if device.type == "cuda" else 1024)
    left, right = torch.randn((2, size, size), dtype=torch.bfloat16, device=device)

    def product() -> None:
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2.0 * size**3 / min(timed(product)[0] for _ in range(20))


def resident(name: str) -> int:
    """Bytes, from the kernel: VmRSS now, or VmHWM, the most since ``forget_most``."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def forget_most() -> None:
    """Begin VmHWM anew."""
    Path("/proc/self/clear_refs").write_text("5")


def say(line: str) -> None:
    """A line for whoever measures."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def tell_memory(root: Path, settings: HarvestSettings, model: LanguageModel) -> None:
    """In a process of its own: the resident set of a bare batch, and that of a harvest."""
    tokens = torch.randint(5, 1000, (BATCH, LENGTH), dtype=torch.int32)
    bare(model, tokens, max(settings.layers or ()))
    forget_most()
    bare(model, tokens, max(settings.layers or ()))
    alone = resident("VmHWM")
    forget_most()
    harvest(root, settings, model)
    most = resident("VmHWM")
    say(
        f"{settings.n_contexts:,} contexts: {most / 1e9:.3f} GB at most, {alone / 1e9:.3f} GB of them the "
        f"model and a bare batch, so {(most - alone) / 1e9:.3f} GB are posae's"
    )
    shutil.rmtree(root)


def tell_speed(
    root: Path, settings: HarvestSettings, model: LanguageModel, rounds: int, peak: float | None
) -> None:
    """Bare passes and harvests in turn."""
    last = max(settings.layers or ())
    harvest(root, settings.model_copy(update={"contexts": 2 * BATCH}), model)  # warm
    found = ActivationStore.open(root).tokens()
    tokens = torch.as_tensor(np.resize(found, (settings.n_contexts, LENGTH)))
    n_tokens = settings.n_contexts * LENGTH
    rates: dict[str, list[float]] = {"bare": [], "posae": []}
    shares: dict[str, list[float]] = {"time": [], "CPU time": []}
    for number in range(rounds):
        spent: dict[str, tuple[float, float]] = {}
        for name in sorted(rates, reverse=number % 2 == 1):
            if name == "bare":
                spent[name] = timed(lambda: bare(model, tokens, last))
            else:
                spent[name] = harvest(root, settings, model)
            rates[name].append(n_tokens / spent[name][0])
        for place, share in enumerate(shares.values()):
            share.append(spent["bare"][place] / spent["posae"][place])
    for name, values in rates.items():
        say(f"{name}: {statistics.median(values):,.0f} tokens/s")
    for name, values in shares.items():
        told = ", ".join(f"{value:.3f}" for value in values)
        say(f"posae over bare, {name}: {statistics.median(values):.3f} ({told})")
    used = flops_to_a_token(model.text_model.config, last + 1) * statistics.median(rates["posae"])
    most = peak * 1e12 if peak else measured_peak(model.device)
    whose = "given" if peak else "measured"
    say(
        f"model FLOP utilisation: {used / most:.3f} ({used / 1e12:.3f} of {most / 1e12:.3f} TFLOP/s, {whose})"
    )
    if model.device.type == "cuda":
        say(f"memory on the device: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at most")


def main() -> None:
    """Make the model, measure, tell."""
    parser = argparse.ArgumentParser(description="posae harvest against a bare forward pass.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gemma", action="store_true", help="Gemma-2-2B's true configuration")
    parser.add_argument("--contexts", type=int, default=512)
    parser.add_argument("--layers", help="as 1,2,4; by default as posae harvest takes them")
    parser.add_argument("--codec", default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peak-tflops", type=float)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder: Path = given.folder / ("gemma-2-2b-random" if given.gemma else "gemma-2-small-random")
    make_model(folder, true_configuration() if given.gemma else small_configuration())
    default = "5,12,19" if given.gemma else "1,2,4"
    settings = HarvestSettings(
        model=str(folder),
        layers=tuple(int(layer) for layer in (given.layers or default).split(",")),
        contexts=given.memory_of or given.contexts,
        codec=given.codec,
        device=given.device,
        batch_contexts=BATCH,
    )
    root = given.folder / "harvest.zarr"
    model = LanguageModel.load(settings.model, device=Harvest(root, settings).device)
    if given.memory_of:
        tell_memory(root, settings, model)
        return
    say(
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, "
        f"{torch.cuda.get_device_name() if model.device.type == 'cuda' else 'CPU'}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    say(f"layers {settings.layers} of {model.facts.n_layers}, d_model {model.facts.d_model}, {given.codec}")
    say(f"{settings.n_contexts:,} contexts of {LENGTH} tokens, {BATCH} to a batch, {given.rounds} rounds")
    tell_speed(root, settings, model, given.rounds, given.peak_tflops)
    shutil.rmtree(root)
    say(f"load {os.getloadavg()[0]:.1f}")
    del model
    if not given.skip_memory:
        # From two shards on: the second is begun while the first is made durable.
        for n_contexts in (2 * given.contexts, 8 * given.contexts):
            subprocess.run([sys.executable, *sys.argv, "--memory-of", str(n_contexts)], check=True)


if __name__ == "__main__":
    main()
