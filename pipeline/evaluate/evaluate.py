"""Scores of a run on contexts that it was not trained on: the held-out part of its store.

One pass over the held-out part, in order, in bounded memory; the result is written into the run as
``evaluation.json``, which ``docs/evaluation.md`` explains. Special tokens are left out, as in training, and
scored separately. The language model runs only for CE loss and SAEBench's probing.

Cost: encoding and decoding each row once, about the same again for what each feature did, then a few
seconds for nulls and groups. Memory: 16 bytes per feature and position, and one batch.
"""

from pathlib import Path
from typing import Any

import torch

from ...store.errors import StoreError
from ...store.reader import ActivationStore
from ..harvest.language_model import CausalLanguageModel
from ..metrics import null_if_not_finite
from ..progress import Progress, Silent
from ..runs import EVALUATION, Run
from ..settings import EvaluateSettings
from .earlier import kept_scores, set_aside
from .held_out import HeldOut
from .model_of_store import model_of
from .probing.probe import probe
from .scoring.base_phase import base_decoder, drift
from .scoring.evaluation import Evaluation
from .scoring.rows import RowScores, row_batches
from .scoring.seen import n_seen
from .scoring.splicing import measure_ce_loss


@torch.no_grad()
def evaluate(
    folder: Path,
    settings: EvaluateSettings,
    progress: Progress | None = None,
    store: ActivationStore | None = None,
) -> dict[str, Any]:
    """Score a finished run, and write ``evaluation.json`` into it.

    Earlier scores that are not asked for now (CE loss, probing) stay in it. Earlier scores on another store
    are set aside as ``evaluation-IDENTITY.json``, and restored when the run is scored on that store again.

    Args:
        folder: of the run.
        settings: what is scored, and on which store.
        progress: of each pass.
        store: the run's own store, if it is already open.

    Raises:
        RunNotFoundError: there is no finished run.
        RunError: a file of the run is damaged.
        RunMismatchError: the store is not the one that the run was trained from, and no other was named; or
            the named one has activations of another size.
        StoreIncompleteError: the store holds no contexts out of training.
        ModelError: the language model is not the store's, or does not predict the next token.
    """
    progress = progress or Silent()
    held_out = HeldOut.of(
        Run(folder),
        store=store,
        other_store=settings.store,
        n_contexts=settings.contexts,
        device=settings.device,
    )
    model = _load_model(held_out, settings, progress)  # first, so that a wrong --model fails early
    evaluation: dict[str, Any] = {
        **_about_run(held_out),
        **_score_rows(held_out, progress),
        **kept_scores(held_out),
        "contexts": [held_out.start, held_out.stop],
        "store": _about_store(held_out),
    }
    if model is not None:
        evaluation["ce_loss"] = measure_ce_loss(held_out, model, settings.ce_contexts, progress).model_dump()
    if settings.probing != "none":
        evaluation["probing"] = probe(held_out, settings.probing, settings.model, progress)
    written = Evaluation.model_validate(null_if_not_finite(evaluation)).model_dump(mode="json")
    set_aside(held_out, progress)
    held_out.run.write_json(EVALUATION, written)
    return written


def _load_model(
    held_out: HeldOut, settings: EvaluateSettings, progress: Progress
) -> CausalLanguageModel | None:
    """The store's language model, if CE loss is asked for; probing alone only checks that it can be had."""
    model = None
    if settings.ce_loss:
        name, facts = model_of(held_out.store, settings.model, progress)
        attention = held_out.store.manifest.attention
        model = CausalLanguageModel.load(name, facts.revision, device=held_out.device, attention=attention)
    if settings.probing == "saebench":
        model_of(held_out.store, settings.model, progress)
    return model


def _score_rows(held_out: HeldOut, progress: Progress) -> dict[str, Any]:
    length = held_out.store.context_length
    row_scores = RowScores(held_out)
    progress.begin("scoring", (held_out.stop - held_out.start) * length, "tokens")
    for batch in row_batches(held_out):
        row_scores.add(batch)
        progress.advance(len(set(batch.contexts.tolist())) * length)
    progress.end()
    return row_scores.scores()


def _about_run(held_out: HeldOut) -> dict[str, Any]:
    """The scores that need no rows."""
    autoencoder = held_out.autoencoder
    lines = held_out.run.metrics()
    before = base_decoder(held_out.run.folder)
    has_decoder = bool(torch.isfinite(autoencoder.W_dec).all())  # not if training diverged
    moved = drift(autoencoder.W_dec, before) if before is not None and has_decoder else None
    return {
        "architecture": autoencoder.architecture,
        "layer": held_out.layer,
        "dictionary_size": autoencoder.dictionary_size,
        "n_parameters": autoencoder.n_parameters(),
        "n_base_parameters": autoencoder.base_parameters(),
        "ranges": [str(r) for r in held_out.ranges],
        "drift": moved and {"cosine_mean": moved[0], "kept_share": moved[1]},
        "training_seconds": lines[-1].get("seconds") if lines else None,
        "training_cpu_seconds": lines[-1].get("cpu_seconds") if lines else None,
    }


def _about_store(held_out: HeldOut) -> dict[str, Any]:
    """Which store is scored on; null for what cannot be known without digests."""
    store, read, trained_from = held_out.store, held_out.store.digests(held_out.layer), held_out.trained_from
    differ = held_out.run.unlike(store, held_out.layer)
    is_known = bool(differ or (read and trained_from.read))
    return {
        "path": store.address,
        "identity": store.identity,
        "read": read,
        "trained_from": not differ if is_known else None,
        "same_model": _is_same(trained_from.model_revision, store.manifest.model_revision),
        # Of the run's own store, contexts that it was trained on are never scored.
        "seen_contexts": (_n_seen(held_out) if differ else 0) if is_known else None,
    }


def _is_same(one: str | None, other: str | None) -> bool | None:
    """Whether two revisions of models are the same; None for a digest and a commit, or if one is missing."""
    if one is None or other is None or one.startswith("sha256:") != other.startswith("sha256:"):
        return None
    return one == other


def _n_seen(held_out: HeldOut) -> int | None:
    """How many scored contexts the run was trained on; None if its own store is not on this machine."""
    trained_from = held_out.trained_from
    if "://" in trained_from.path:  # too slow for this alone
        return None
    try:
        own = ActivationStore.open(trained_from.path)
        if held_out.run.unlike(own, held_out.layer):
            return None
        scored = held_out.store.tokens(slice(held_out.start, held_out.stop))
        return n_seen(scored, own, trained_from.training_contexts)
    except StoreError:
        return None
