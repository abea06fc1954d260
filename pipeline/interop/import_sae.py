"""Importing an autoencoder of another program as a run, to evaluate it on a store.

The run has the weights, a ``config.json`` that records their source, and no metrics. It is not known whether
the autoencoder was trained on the store's held-out part. Costs twice the weights in memory for a moment; only
the manifest of the store is read.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import __version__
from ...store.errors import SettingsError
from ...store.reader import ActivationStore
from ..errors import RunMismatchError
from ..harvest.hooks import layer_of
from ..ranges import PositionRange, parse_ranges
from ..runs import WEIGHTS, Run
from ..sae.foreign import read_foreign, read_metadata
from ..sae.saving import load_autoencoder, save_autoencoder
from ..settings import ImportSaeSettings


class ImportedSae(NamedTuple):
    """The result of an import."""

    run: Run
    architecture: str
    dictionary_size: int
    layer: int
    model_name: str | None
    """The language model that the file names; None if it names none."""


def import_sae(
    folder: Path, destination: Path, store: ActivationStore, settings: ImportSaeSettings
) -> ImportedSae:
    """Make a run of the autoencoder in ``folder``; repeated with the same options it changes nothing.

    Args:
        folder: saved by SAELens 6, or a run of posae, of which only the weights are used.
        destination: folder of the new run.
        store: the store to evaluate on.
        settings: its layer, and the position ranges of scores.

    Raises:
        RunNotFoundError: there is no autoencoder in ``folder``.
        RunError: a file is damaged, or posae has no such autoencoder; the destination holds something else.
        RunMismatchError: its activations are not those of the store, or the destination is another run.
        SettingsError: its layer is unknown, or not the given one.
        StoreIncompleteError: the store lacks the layer.
        StoreWriteError: the disk refused.
    """
    length = store.context_length
    said = read_metadata(folder)
    if said.is_of_posae:
        if settings.ranges is not None:
            raise SettingsError(f"{folder} is a run of posae, with its own ranges; leave out --ranges")
        autoencoder = load_autoencoder(folder)
    else:
        count = str(min(4, length))
        autoencoder = read_foreign(folder, parse_ranges(settings.ranges or count, length))
    layer = _layer(folder, settings.layer, said.hook_name)
    ranges = autoencoder.ranges
    if ranges[-1].stop != length:
        raise RunMismatchError(
            f"{folder} is of contexts of {ranges[-1].stop} tokens, and {store.root} has {length}; "
            "name a store of such contexts"
        )
    if autoencoder.d_model != store.d_model:
        raise RunMismatchError(
            f"{folder} is of activations of {autoencoder.d_model} numbers, and {store.root} has "
            f"{store.d_model}; name a store of its language model"
        )
    store.check_layer(layer)
    run = Run(destination)
    run.begin(_config(folder, store, settings, layer, autoencoder.architecture, ranges))
    manifest = store.manifest
    metadata = {
        "model_name": said.model_name or manifest.language_model,
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "context_size": length,
        "prepend_bos": manifest.first_token is not None,
    }
    save_autoencoder(autoencoder, destination, metadata)
    return ImportedSae(
        run,
        autoencoder.architecture,
        autoencoder.dictionary_size,
        layer,
        said.model_name,
    )


def _digest(folder: Path) -> str:
    """A digest that identifies the autoencoder."""
    digest = hashlib.sha256()
    for name in ("cfg.json", WEIGHTS):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"


def _layer(folder: Path, wanted: int | None, hook_name: str | None) -> int:
    if hook_name is None:
        if wanted is None:
            raise SettingsError(f"{folder} does not record its layer; give it with --layer")
        return wanted
    found = layer_of(hook_name)
    if found is None:
        raise SettingsError(
            f"{folder} was trained at {hook_name}, but a store holds the residual stream after a block; "
            "import one that was trained there"
        )
    if wanted not in (None, found):
        raise SettingsError(f"{folder} was trained at {hook_name}, which is layer {found}; leave out --layer")
    return found


def _config(
    folder: Path,
    store: ActivationStore,
    settings: ImportSaeSettings,
    layer: int,
    architecture: str,
    ranges: tuple[PositionRange, ...],
) -> dict[str, Any]:
    """The content of ``config.json``: what ``evaluate`` needs, and that posae did not train this."""
    manifest = store.manifest
    return {
        "posae": __version__,
        "torch": torch.__version__,
        "imported": folder.absolute().name,
        "imported_digest": _digest(folder),
        "settings": {"architecture": architecture, "layer": layer, "ranges": ",".join(map(str, ranges))},
        "store": {
            "path": store.address,
            "read": {},  # what it was trained on nobody knows
            "model": manifest.model,
            "dataset": manifest.dataset,
            "hook_point": manifest.hook_point,
            "context_length": store.context_length,
            "d_model": store.d_model,
            "training_contexts": store.training_contexts(layer),
            "left_out_ids": [] if settings.special_tokens else list(manifest.special_token_ids),
        },
    }
