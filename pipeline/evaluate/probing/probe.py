"""Sparse probing of a run, as ``posae evaluate --probing`` does it."""

from typing import Literal

from ...harvest.language_model import LanguageModel
from ...harvest.text.stdlib import stdlib_files, stdlib_revision
from ...harvest.tokenizer import tokenizer_of
from ...progress import Progress, Silent
from ..held_out import HeldOut
from ..model_of_store import model_of, refuse_imported
from .hub import probe_saebench
from .offline import probe_store
from .results import ProbingResult


def probe(
    held_out: HeldOut, source: Literal["offline", "saebench"], model: str | None, progress: Progress
) -> ProbingResult:
    """Probe the activations of a run's store and their codes.

    Args:
        held_out: the run and its store.
        source: ``offline``, tasks made from the store; ``saebench``, SAEBench's datasets.
        model: folder or hub id of the store's model; by default what the store records.
        progress: of the probes, one per class.

    Raises:
        ModelError: the language model is not the store's.
        StoreMismatchError: the tokenizer is not the store's.
    """
    store, layer, autoencoder, device = held_out.store, held_out.layer, held_out.autoencoder, held_out.device
    manifest = store.manifest
    refuse_imported(store)
    tokenizer = tokenizer_of(store, model, option="--model", progress=progress)

    def report(done: int, total: int, last: str) -> None:
        if done == 0:
            progress.begin("probing", total, "classes")
        else:
            progress.advance(1, last)
        if done == total:
            progress.end()

    if source == "saebench":
        name, facts = model_of(store, model, Silent())
        loaded = LanguageModel.load(name, facts.revision, device=device, attention=manifest.attention)
        return probe_saebench(
            lambda tokens: loaded.activations(tokens, [layer])[layer],
            autoencoder,
            tokenizer,
            first=manifest.first_token,
            context_length=store.context_length,
            device=device,
            told=report,
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
        held_out=store.held_out_part(layer),
        leave_out=held_out.left_out_ids.tolist(),
        device=device,
        told=report,
    )
