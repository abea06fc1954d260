"""posae's trainer against SAELens' and dictionary_learning's: the same autoencoder, tokens, batches and rate.

    pip install --no-deps sae-lens==6.54.12 dictionary-learning==0.1.0  (and what .ci/run installs for them)
    python benchmarks/peer_trainers.py STORE FOLDER [--layer 1] [--features 3072] [--k 32] [--steps 200]

posae reads its store, every chunk decoded; the others are fed the same batches, in the same order, from
float32 tensors in memory, so that none of them waits for a loader of its own. TopK and BatchTopK, each
library's own start, auxiliary loss and optimizer. Each training is timed from its first step to its last, in
turn, round after round; told are medians of tokens to a second of CPU time and of wall time, and L0 and FVU
of the held-out part by each library's own encoder and decoder.
"""
# The peers have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportAttributeAccessIssue=false

import argparse
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from posae.pipeline.batches import as_torch
from posae.pipeline.device import keep_freed_memory
from posae.pipeline.sae.saving import load_autoencoder
from posae.pipeline.settings import TRAIN_PRESETS, TrainSettings, resolve_settings
from posae.pipeline.train import LayerMemory, Ongoing, Training, train_together
from posae.store.reader import ActivationStore

Codec = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""What encodes, and what decodes, rows of raw activations."""


class Task(NamedTuple):
    """What all of them do."""

    store: ActivationStore
    layer: int
    features: int
    k: int
    steps: int
    batch_size: int
    learning_rate: float
    folder: Path


class Trained(NamedTuple):
    """What one of them took, and made."""

    seconds: float
    cpu_seconds: float
    codec: Codec


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and CPU-seconds of this process, of some work."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - used


def training(task: Task, architecture: str) -> Training:
    """posae's, about to run."""
    options: dict[str, Any] = {
        "layer": task.layer,
        "dictionary_size": task.features,
        "target_l0": task.k,
        "steps": task.steps,
        "batch_size": task.batch_size,
        "window_contexts": 256,
        "learning_rate": task.learning_rate,
        "log_steps": 10**6,
        "checkpoint_steps": 10**6,
    }
    settings = resolve_settings(
        TrainSettings, "train", presets=TRAIN_PRESETS, preset=architecture, options=options
    )
    run = task.folder / architecture
    shutil.rmtree(run, ignore_errors=True)
    return Training(task.store, run, settings)


def posae(task: Task, architecture: str) -> Trained:
    """From the store."""
    made = training(task, architecture)
    ongoing = Ongoing.begin(made)
    assert ongoing is not None
    took = timed(lambda: train_together([ongoing], memory=LayerMemory("never")))
    autoencoder = load_autoencoder(made.run.folder).eval()
    any_position = torch.zeros(1, dtype=torch.int64)
    return Trained(*took, (lambda x: autoencoder.encode(x, any_position), autoencoder.decode))


def saelens(task: Task, architecture: str, batches: list[Tensor]) -> Trained:
    """SAELens' SAETrainer."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kind = {"topk": sae_lens.TopKTrainingSAEConfig, "batchtopk": sae_lens.BatchTopKTrainingSAEConfig}
    cfg = kind[architecture](d_in=task.store.d_model, d_sae=task.features, k=task.k)
    torch.manual_seed(0)
    sae = sae_lens.TrainingSAE.from_dict(cfg.to_dict())
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=sum(map(len, batches)),
            train_batch_size_samples=task.batch_size,
            lr=task.learning_rate,
            lr_end=task.learning_rate / 10,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter(batches),
    )
    took = timed(trainer.fit)
    out = task.folder / "saelens"
    shutil.rmtree(out, ignore_errors=True)
    sae.save_inference_model(str(out))
    loaded = sae_lens.SAE.load_from_disk(str(out))
    return Trained(*took, (lambda x: dense(loaded.encode(x)), loaded.decode))


def dense(code: Tensor) -> Tensor:
    """A code with its zeros."""
    return code.to_dense() if code.is_sparse else code


def dictionary_learning(task: Task, architecture: str, batches: list[Tensor]) -> Trained:
    """dictionary_learning's trainers, as its trainSAE calls them."""
    sys.modules.setdefault("nnsight", ModuleType("nnsight")).LanguageModel = object  # pyright: ignore
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    kind = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[architecture]
    trainer = kind(
        steps=task.steps,
        activation_dim=task.store.d_model,
        dict_size=task.features,
        k=task.k,
        layer=task.layer,
        lm_name="any",
        lr=task.learning_rate,
        warmup_steps=0,
        decay_start=int(0.8 * task.steps),
        device="cpu",
        seed=0,
    )

    def fit() -> None:
        for step, x in enumerate(batches):
            trainer.update(step, x)

    took = timed(fit)
    return Trained(*took, (trainer.ae.encode, trainer.ae.decode))


def held_out(task: Task) -> Iterator[Tensor]:
    """Its ordinary tokens, some thousands at a time; float32 [rows, d_model]."""
    first, last = task.store.held_out_part(task.layer)
    for start in range(first, last, 32):
        contexts = np.arange(start, min(start + 32, last))
        wanted = ~np.isin(task.store.tokens(contexts), task.store.manifest.special_token_ids)
        yield as_torch(task.store.read(task.layer, contexts)[wanted]).float()


@torch.no_grad()
def scores(task: Task, codec: Codec) -> tuple[float, float]:
    """L0, and FVU as a ratio of sums around the held-out part's mean."""
    encode, decode = codec
    n_rows, n_active, error = 0, 0, 0.0
    total, squares = torch.zeros(task.store.d_model, dtype=torch.float64), 0.0
    for x in held_out(task):
        code = encode(x)
        n_rows += len(x)
        n_active += int((code != 0).sum())
        error += float((decode(code) - x).double().square().sum())
        total += x.double().sum(0)
        squares += float(x.double().square().sum())
    return n_active / n_rows, error / (squares - float(total.square().sum()) / n_rows)


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--features", type=int, default=3072)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    keep_freed_memory()  # for all of them alike
    task = Task(
        ActivationStore.open(given.store),
        given.layer,
        given.features,
        given.k,
        given.steps,
        given.batch_size,
        given.learning_rate,
        given.folder,
    )
    batches = [
        batch.on_device.to(torch.float32) for batch in training(task, "topk").batches().steps(0, given.steps)
    ]
    n_tokens = sum(map(len, batches))
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    say(
        f"d_model {task.store.d_model}, {given.features} features, k {given.k}, {given.steps} steps of "
        f"{given.batch_size}; {given.rounds} rounds, torch {torch.__version__}, {threads} threads, "
        f"load {load:.1f}"
    )
    for architecture in ("topk", "batchtopk"):
        contenders: dict[str, Callable[[], Trained]] = {
            "posae, from its store": partial(posae, task, architecture),
            "SAELens, from memory": partial(saelens, task, architecture, batches),
            "dictionary_learning, from memory": partial(dictionary_learning, task, architecture, batches),
        }
        found: dict[str, list[Trained]] = {name: [] for name in contenders}
        for _ in range(given.rounds):
            for name, work in contenders.items():
                found[name].append(work())
        say(
            f"{architecture:34} {'tokens/CPU-s':>14} {'tokens/s':>10} {'posae is faster by':>22} "
            f"{'L0':>7} {'FVU':>8}"
        )
        ours = found["posae, from its store"]
        for name, took in found.items():
            by = [one.cpu_seconds / other.cpu_seconds for one, other in zip(took, ours, strict=True)]
            l0, fvu = scores(task, took[-1].codec)
            rate = n_tokens / statistics.median(one.seconds for one in took)
            cpu_rate = n_tokens / statistics.median(one.cpu_seconds for one in took)
            spread = f"{statistics.median(by):.2f} ({min(by):.2f} to {max(by):.2f})"
            say(f"  {name:32} {cpu_rate:14,.0f} {rate:10,.0f} {spread:>22} {l0:7.1f} {fvu:8.4f}")


if __name__ == "__main__":
    main()
