"""Scores of a run on contexts that it never saw: the held-out part of its store.

One pass over the held-out part, in order, in bounded memory; written into the run as
``evaluation.json``. Special tokens are left out as they were in training.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..store.errors import RunMismatchError, RunNotFoundError, StoreIncompleteError, StoreMismatchError
from ..store.ranges import parse_ranges
from ..store.reader import ActivationStore
from .batches import ordered_batches
from .device import choose_device
from .language_model import LanguageModel, load_tokenizer
from .metrics import ScoreKeeper, Scores
from .probing.hub import probe_saebench
from .probing.offline import probe_store
from .probing.results import ProbingResult
from .progress import Progress, Silent
from .runs import EVALUATION, Run
from .sae.autoencoder import Autoencoder
from .sae.saving import load_autoencoder
from .settings import EvaluateSettings
from .text.contexts import tokenizer_hash
from .text.stdlib import stdlib_files, stdlib_revision


@torch.no_grad()
def evaluate(folder: Path, settings: EvaluateSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Score a finished run, and write ``evaluation.json`` into it.

    Raises:
        RunNotFoundError: there is no finished run.
        RunMismatchError: the store is not the one that the run was trained from.
        StoreIncompleteError: the store holds nothing out.
    """
    progress = progress or Silent()
    run = Run(folder)
    config = run.config
    if not run.is_finished:
        raise RunNotFoundError(f"{folder} has not finished training; run posae train again, it goes on")
    trained = config["settings"]
    store = ActivationStore.open(settings.store or config["store"]["path"])
    layer: int = trained["layer"]
    store.check_layer(layer)
    _check_same(run, store, config)
    ranges = parse_ranges(trained["ranges"], store.context_length)
    start, stop = store.held_out_part(layer)
    start = max(start, int(config["store"]["training_contexts"]))
    if start >= stop:
        raise StoreIncompleteError(
            f"{store.root} holds no contexts out of training, so nothing can be scored; harvest at least "
            "16 contexts, with --held-out above 0"
        )
    device = choose_device(settings.device)
    autoencoder = load_autoencoder(folder).to(device)
    keeper = ScoreKeeper(store.d_model, autoencoder.dictionary_size, len(ranges))
    n_contexts = min(stop - start, settings.contexts or stop - start)
    progress.begin("scoring", n_contexts * store.context_length, "tokens")
    leave_out = config["store"]["left_out_ids"]
    for batch in ordered_batches(
        store, layer, ranges, start=start, stop=start + n_contexts, leave_out=leave_out, device=device
    ):
        x = batch.on_device.to(torch.float32)
        positions = torch.as_tensor(batch.positions).to(device)
        output = autoencoder(x, torch.as_tensor(batch.range_offsets), positions)
        base = None if output.base_code is None else autoencoder.decode(output.base_code, positions)
        keeper.add(x, output.reconstruction, output.code, batch.range_offsets.tolist(), base)
        progress.advance(len(set(batch.contexts.tolist())) * store.context_length)
    progress.end()
    found = {
        "architecture": autoencoder.architecture,
        "layer": layer,
        "dictionary_size": autoencoder.dictionary_size,
        "n_parameters": autoencoder.n_parameters(),
        "n_base_parameters": autoencoder.base_parameters(),
        "ranges": [str(r) for r in ranges],
        **as_json(keeper.scores()),
        "contexts": [start, start + n_contexts],
        "store": {"path": str(store.root.absolute()), "read": store.digests(layer)},
    }
    if settings.probing != "none":
        found["probing"] = _probe(
            store, layer, autoencoder.eval(), (start, stop), leave_out, settings, progress
        )
    run.write_json(EVALUATION, found)
    return found


def as_json(scores: Scores) -> dict[str, Any]:
    """Scores as JSON; what cannot be told is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, tuple):
            return [finite(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: finite(value) for name, value in scores._asdict().items()}


def _probe(
    store: ActivationStore,
    layer: int,
    autoencoder: Autoencoder,
    held_out: tuple[int, int],
    leave_out: Sequence[int],
    settings: EvaluateSettings,
    progress: Progress,
) -> ProbingResult:
    """Sparse probing of the activations and their codes, offline or on SAEBench's datasets."""
    manifest, device = store.manifest, choose_device(settings.device)
    name, revision = settings.model or manifest.model, None if settings.model else manifest.model_revision
    if not settings.model and name != "demo":
        # A store may come from a stranger: it names a model of the hub, never a place on this machine.
        if Path(name).exists() or name.startswith((".", "/", "~")):
            raise StoreMismatchError(
                f"{store.root} was made with a local model, {name}; name its folder with --model"
            )
        progress.say(f"tokenizer of {name}")
    tokenizer = load_tokenizer(name, revision)
    if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
        raise StoreMismatchError(
            f"the tokenizer of {name} is not the one that {store.root} was made with; "
            "name the right model with --model"
        )

    def told(done: int, total: int, last: str) -> None:
        if done == 0:
            progress.begin("probing", total, "classes")
        else:
            progress.advance(1, last)
        if done == total:
            progress.end()

    if settings.probing == "saebench":
        model = LanguageModel.load(name, revision, device=device, attention=manifest.attention)
        if model.facts.config_hash != manifest.model_config_hash:
            raise StoreMismatchError(
                f"{name} is not the model that {store.root} was made with; name the right one with --model"
            )
        return probe_saebench(
            lambda tokens: model.activations(tokens, [layer])[layer],
            autoencoder,
            tokenizer,
            first=manifest.first_token,
            context_length=store.context_length,
            device=device,
            told=told,
        )
    documents = None
    if manifest.dataset == "stdlib" and manifest.dataset_revision != stdlib_revision():
        progress.say(f"the text, {manifest.dataset_revision}, is not on this machine: probing tokens alone")
    elif manifest.dataset == "stdlib" and tokenizer.is_fast:
        documents = stdlib_files(manifest.dataset_split or "all")
    return probe_store(
        store,
        layer,
        autoencoder,
        tokenizer,
        documents,
        held_out=held_out,
        leave_out=leave_out,
        device=device,
        told=told,
    )


def _check_same(run: Run, store: ActivationStore, config: dict[str, Any]) -> None:
    read, now = config["store"].get("read"), store.digests(config["settings"]["layer"])
    if read and now and read != now:
        differ = ", ".join(name for name in now if now[name] != read.get(name))
        raise RunMismatchError(
            f"{store.root} is not the store that {run.folder} was trained from: {differ} differ; "
            "name the right one with --store"
        )
    if store.d_model != config["store"]["d_model"]:
        raise RunMismatchError(
            f"{store.root} has d_model {store.d_model}, and the run {config['store']['d_model']}; "
            "name the store that it was trained from with --store"
        )
