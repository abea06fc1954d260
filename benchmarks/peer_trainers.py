"""posae's trainer against SAELens', dictionary_learning's and sparsify's: same autoencoder, tokens, batches.

    pip install --no-deps sae-lens==6.54.12 dictionary-learning==0.1.0  (and what .ci/run installs for them)
    pip install --no-deps eai-sparsify==1.3.3 accelerate==1.15.0 natsort==8.4.0 schedulefree==1.4.1
    python benchmarks/peer_trainers.py STORE FOLDER [--layer 1] [--features 3072] [--k 32] [--steps 200]
    python benchmarks/peer_trainers.py STORE FOLDER --steps 1000 --batch-size 2048 --learning-rates 5e-4,1e-3

posae reads its store, every chunk decoded; the others are fed the same batches, in the same order, from
float32 tensors in memory, so that none of them waits for a loader of its own. TopK and BatchTopK, each
library's own start, auxiliary loss and optimizer. Each training is timed from its first step to its last, in
turn, round after round, each round with a seed of its own; told are tokens to a second of CPU time and of
wall time, and L0 and FVU of the held-out part by each library's own encoder and decoder. Where a threshold
decides what is active, FVU is told once more with every library's threshold put so that L0 there is k.

The rate rises over the first twentieth of the steps and falls to 0 over the last fifth: so posae's presets
say, and so it is set for dictionary_learning and "SAELens, falling". SAELens' own rate is constant. That of
sparsify with Adam falls from the first twentieth on; its own optimizer, a schedule-free descent by signs,
has a constant one, 25 times Adam's, as its defaults have. The rate "own" is each library's default.
"""

# The peers have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportAttributeAccessIssue=false

import argparse
import contextlib
import io
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from posae.pipeline.device import keep_freed_memory
from posae.pipeline.sae.run_settings import resolve_train_settings
from posae.pipeline.sae.saving import load_autoencoder
from posae.pipeline.sae.topk import BatchTopK
from posae.pipeline.train import LayerMemory, Ongoing, Training, train_together
from posae.pipeline.train.batch import as_torch
from posae.store.reader import ActivationStore


class Codec(NamedTuple):
    """A trained autoencoder."""

    encode: Callable[[Tensor], Tensor]
    """Of rows of raw activations."""
    decode: Callable[[Tensor], Tensor]
    set_threshold: Callable[[float], object] | None = None
    """Where a threshold decides what is active."""


class Task(NamedTuple):
    """What all of them do."""

    store: ActivationStore
    layer: int
    features: int
    k: int
    steps: int
    batch_size: int
    learning_rate: float | None
    """None: each library's own."""
    seed: int
    folder: Path

    @property
    def few_steps(self) -> int:
        """Over which the rate rises."""
        return self.steps // 20


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
        "seed": task.seed,
        "log_steps": 10**6,
        "checkpoint_steps": 10**6,
    }
    if task.learning_rate is not None:
        options["learning_rate"] = task.learning_rate
    settings = resolve_train_settings(preset=architecture, options=options)
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
    is_even = isinstance(autoencoder, BatchTopK)
    return Trained(
        *took,
        Codec(
            lambda x: autoencoder.encode(x, any_position),
            autoencoder.decode,
            autoencoder.threshold.fill_ if is_even else None,
        ),
    )


def saelens(task: Task, architecture: str, batches: list[Tensor], *, is_falling: bool) -> Trained:
    """SAELens' SAETrainer."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kind = {"topk": sae_lens.TopKTrainingSAEConfig, "batchtopk": sae_lens.BatchTopKTrainingSAEConfig}
    cfg = kind[architecture](d_in=task.store.d_model, d_sae=task.features, k=task.k)
    torch.manual_seed(task.seed)
    sae = sae_lens.TrainingSAE.from_dict(cfg.to_dict())
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=sum(map(len, batches)),
            train_batch_size_samples=task.batch_size,
            logger=LoggingConfig(log_to_wandb=False),
            lr=task.learning_rate or SAETrainerConfig.lr,
            lr_end=1e-9,  # asked for, and ignored where the rate is constant
            lr_warm_up_steps=task.few_steps if is_falling else 0,
            lr_decay_steps=task.steps // 5 if is_falling else 0,
        ),
        sae=sae,
        data_provider=iter(batches),
    )
    took = timed(trainer.fit)
    out = task.folder / "saelens"
    shutil.rmtree(out, ignore_errors=True)
    sae.save_inference_model(str(out))
    loaded = sae_lens.SAE.load_from_disk(str(out))
    threshold = getattr(loaded, "threshold", None)
    return Trained(
        *took,
        Codec(
            lambda x: dense(loaded.encode(x)),
            loaded.decode,
            None if threshold is None else threshold.data.fill_,
        ),
    )


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
        warmup_steps=task.few_steps,
        decay_start=int(0.8 * task.steps),
        device="cpu",
        seed=task.seed,
    )

    def fit() -> None:
        for step, x in enumerate(batches):
            trainer.update(step, x)

    took = timed(fit)
    is_even = architecture == "batchtopk"
    return Trained(
        *took,
        Codec(trainer.ae.encode, trainer.ae.decode, trainer.ae.threshold.fill_ if is_even else None),
    )


class Fed(torch.nn.Module):
    """A language model to sparsify: a token is the number of a row, and its one layer gives that row."""

    def __init__(self, rows: Tensor) -> None:
        """Of all rows [rows, d_model]."""
        super().__init__()
        self.rows = rows
        self.layer = torch.nn.Identity()
        self.device = rows.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    @property
    def base_model(self) -> "Fed":
        """What hook points are looked for in."""
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """Activations [contexts, positions, d_model] of ids [contexts, positions]."""
        return cast(Tensor, self.layer(self.rows[input_ids]))


def sparsify(task: Task, batches: list[Tensor], *, optimizer: str) -> Trained:
    """The Trainer of sparsify, whole: what it hooks is ``Fed``'s layer, and a batch is one context."""
    with contextlib.redirect_stdout(io.StringIO()):
        # By name: it is not among what the types are checked with.
        library: Any = import_module("sparsify")
    rate = task.learning_rate
    out = task.folder / "sparsify"
    shutil.rmtree(out, ignore_errors=True)
    cfg = library.TrainConfig(
        library.SaeConfig(num_latents=task.features, k=task.k),
        batch_size=1,
        hookpoints=["layer"],
        init_seeds=[task.seed],
        optimizer=optimizer,
        lr=rate if rate is None or optimizer == "adam" else 25 * rate,
        lr_warmup_steps=task.few_steps,
        log_to_wandb=False,
        save_every=10**9,
        save_dir=str(out),
    )
    rows = torch.arange(sum(map(len, batches))).split([len(batch) for batch in batches])
    precision = torch.get_float32_matmul_precision()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = library.Trainer(cfg, [{"input_ids": numbers} for numbers in rows], Fed(torch.cat(batches)))
        took = timed(trainer.fit)
    torch.set_float32_matmul_precision(precision)  # it has asked for less
    # Not what the trainer holds: its own optimizer's weights are means, and those are what it saves.
    sae = library.SparseCoder.load_from_disk(out / "unnamed" / "layer")

    def encode(x: Tensor) -> Tensor:
        code = sae.encode(x)
        return torch.zeros(len(x), task.features).scatter(1, code.top_indices, code.top_acts)

    return Trained(*took, Codec(encode, lambda code: code @ sae.W_dec + sae.b_dec))


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
    n_rows, n_active, error = 0, 0, 0.0
    total, squares = torch.zeros(task.store.d_model, dtype=torch.float64), 0.0
    for x in held_out(task):
        code = codec.encode(x)
        n_rows += len(x)
        n_active += int((code != 0).sum())
        error += float((codec.decode(code) - x).double().square().sum())
        total += x.double().sum(0)
        squares += float(x.double().square().sum())
    return n_active / n_rows, error / (squares - float(total.square().sum()) / n_rows)


@torch.no_grad()
def even_fvu(task: Task, codec: Codec) -> float | None:
    """FVU with the threshold at which L0 over the held-out part is k; None where there is no threshold."""
    if codec.set_threshold is None:
        return None
    codec.set_threshold(0.0)
    n_rows, largest = 0, list[Tensor]()
    for x in held_out(task):
        code = codec.encode(x)
        n_rows += len(x)
        above = code[code > 0]
        largest.append(above.topk(min(len(above), 8 * task.k * len(x)), sorted=False).values)
    first_left_out = torch.cat(largest).topk(task.k * n_rows + 1).values[-1]
    codec.set_threshold(float(first_left_out))
    return scores(task, codec)[1]


class Told(NamedTuple):
    """What is told of a training."""

    seconds: float
    cpu_seconds: float
    l0: float
    fvu: float
    even_fvu: float


def told(task: Task, work: Callable[[], Trained]) -> Told:
    """Of a training: how long it took, and how it scores."""
    made = work()
    l0, fvu = scores(task, made.codec)
    return Told(made.seconds, made.cpu_seconds, l0, fvu, even_fvu(task, made.codec) or fvu)


def contenders(task: Task, architecture: str, batches: list[Tensor]) -> dict[str, Callable[[], Trained]]:
    """All of them; posae first."""
    found: dict[str, Callable[[], Trained]] = {
        "posae": partial(posae, task, architecture),
        "SAELens": partial(saelens, task, architecture, batches, is_falling=False),
        "SAELens, falling": partial(saelens, task, architecture, batches, is_falling=True),
        "dictionary_learning": partial(dictionary_learning, task, architecture, batches),
    }
    if architecture == "topk":
        found["sparsify, Adam"] = partial(sparsify, task, batches, optimizer="adam")
        found["sparsify"] = partial(sparsify, task, batches, optimizer="signum")
    return found


def say_all(name: str, took: list[Told], ours: list[Told], n_tokens: int) -> None:
    """A line of the table: medians of speed, and the scores of each round."""
    rates = [
        n_tokens / statistics.median(used)
        for used in ([one.cpu_seconds for one in took], [one.seconds for one in took])
    ]
    by = [one.cpu_seconds / other.cpu_seconds for one, other in zip(took, ours, strict=False)]
    spread = f"{statistics.median(by):.2f} ({min(by):.2f} to {max(by):.2f})" if by else ""
    scored = "  ".join(f"{one.l0:.1f} {one.fvu:.4f} {one.even_fvu:.4f}" for one in took)
    say(f"  {name:20} {rates[0]:12,.0f} {rates[1]:10,.0f} {spread:>21}  {scored}")


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
    parser.add_argument("--learning-rates", default="5e-4", help="as own,2e-4,1e-3")
    parser.add_argument("--architectures", default="topk,batchtopk")
    parser.add_argument("--only", help='contenders, as "posae/sparsify, Adam"')
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    keep_freed_memory()  # for all of them alike
    given.folder.mkdir(parents=True, exist_ok=True)
    task = Task(
        ActivationStore.open(given.store),
        given.layer,
        given.features,
        given.k,
        given.steps,
        given.batch_size,
        None,
        given.first_seed,
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
    for architecture in given.architectures.split(","):
        for word in given.learning_rates.split(","):
            rate = None if word == "own" else float(word)
            say(
                f"{architecture}, rate {word:8} {'tokens/CPU-s':>12} {'tokens/s':>10} "
                f"{'posae is faster by':>21}  of each round L0, FVU, FVU at L0 {given.k}"
            )
            found: dict[str, list[Told]] = {}
            for number in range(given.rounds):
                this = task._replace(learning_rate=rate, seed=given.first_seed + number)
                for name, work in contenders(this, architecture, batches).items():
                    if given.only is None or name in given.only.split("/"):
                        found.setdefault(name, []).append(told(this, work))
                        sys.stderr.write(f"{architecture} {word} {name} {found[name][-1]}\n")
            for name, took in found.items():
                say_all(name, took, found.get("posae", []), n_tokens)


if __name__ == "__main__":
    main()
