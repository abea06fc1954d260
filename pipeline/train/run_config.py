"""What a run records in ``config.json`` and ``cfg.json``, and how a resumed run is compared with it."""

from collections.abc import Sequence
from typing import Any

import torch

from ... import __version__
from ...store.reader import ActivationStore
from ..errors import RunMismatchError
from ..runs import Run, digest_of
from ..sae.run_settings import as_in_run
from ..settings import TrainSettings


def run_config(
    store: ActivationStore,
    layer: int,
    settings: TrainSettings,
    *,
    device: torch.device,
    n_contexts: int,
    left_out_ids: Sequence[int],
) -> dict[str, Any]:
    """What ``config.json`` says: everything that the weights depend on.

    Args:
        store: that the run reads.
        layer: of the store.
        settings: resolved.
        device: that the run trains on.
        n_contexts: training contexts, the first of the store.
        left_out_ids: token ids that the run leaves out.
    """
    manifest = store.manifest
    return {
        "posae": __version__,
        "torch": torch.__version__,
        "settings": settings.model_dump(mode="json"),
        "device": device.type,
        "store": {
            "path": store.address,
            "read": store.digests(layer),
            "manifest": digest_of(manifest),
            "model": manifest.model,
            "model_revision": manifest.model_revision,
            "dataset": manifest.dataset,
            "hook_point": manifest.hook_point,
            "context_length": manifest.context_length,
            "d_model": manifest.d_model,
            "training_contexts": n_contexts,
            "left_out_ids": list(left_out_ids),
        },
    }


def comparable_config(
    config: dict[str, Any], settings: TrainSettings, run: Run, store: ActivationStore, layer: int
) -> dict[str, Any]:
    """``config`` as the run must have recorded it, with what may differ taken from the record.

    Args:
        config: ``run_config``; changed in place.
        settings: that it was made with.
        run: a new one, or one to resume.
        store: that it reads.
        layer: of the store.

    Raises:
        RunMismatchError: the run was begun on a store with other contents.
    """
    if not run.is_begun:
        return config
    begun = run.config
    config["posae"] = begun.get("posae")
    recorded = begun.get("settings", {})
    config["settings"] = as_in_run(settings, recorded)
    # The store may have moved; its contents must be the same, by their digests. Digests of another layer say
    # nothing: that is another setting.
    if recorded.get("layer") == layer:
        run.check_read(store, layer, "give that one to resume")
    for key in ("path", "read", "manifest", "model_revision"):
        config["store"][key] = begun.get("store", {}).get(key)
    return config


def training_contexts(run: Run, store: ActivationStore, layer: int) -> int:
    """How many contexts a run reads: as many as when it was begun, even if the store has grown since.

    Raises:
        RunMismatchError: the store has fewer.
    """
    begun: int = run.config.get("store", {}).get("training_contexts", 0) if run.is_begun else 0
    n_contexts = store.contexts_by_layer[layer]
    if begun > n_contexts:
        raise RunMismatchError(
            f"{run.folder} was begun on {begun} contexts, and {store.root} has {n_contexts}; "
            "give the store that it was begun on"
        )
    return begun or store.training_contexts(layer)


def sae_lens_metadata(store: ActivationStore, layer: int, settings: TrainSettings) -> dict[str, Any]:
    """What ``cfg.json`` records about the activations, under SAELens' keys."""
    manifest = store.manifest
    return {
        "model_name": manifest.model,
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "hook_head_index": None,
        "context_size": manifest.context_length,
        "dataset_path": manifest.dataset,
        "prepend_bos": manifest.first_token is not None,
        "exclude_special_tokens": not settings.special_tokens,
        "model_class_name": "AutoModelForCausalLM",
        "seqpos_slice": [None],
        "model_from_pretrained_kwargs": {},
    }
