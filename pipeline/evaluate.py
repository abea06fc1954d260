"""Scores of a run on contexts that it never saw: the held-out part of its store.

One pass over the held-out part, in order, in bounded memory; written into the run as
``evaluation.json``. Special tokens are left out as they were in training.
"""

import math
from pathlib import Path
from typing import Any

import torch

from ..store.errors import RunMismatchError, RunNotFoundError, StoreIncompleteError
from ..store.ranges import parse_ranges
from ..store.reader import ActivationStore
from .batches import ordered_batches
from .device import choose_device
from .metrics import ScoreKeeper, Scores
from .progress import Progress, Silent
from .runs import EVALUATION, Run
from .sae.saving import load_autoencoder
from .settings import EvaluateSettings


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
    run.write_json(EVALUATION, found)
    return found


def as_json(scores: Scores) -> dict[str, Any]:
    """Scores as JSON; what cannot be told is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, tuple):
            return [finite(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: finite(value) for name, value in scores._asdict().items()}


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
