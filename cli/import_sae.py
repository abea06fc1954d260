"""``posae import-sae``: an autoencoder that another program trained, made a run."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..pipeline.settings import ImportSaeSettings, resolve_settings
from ..store.reader import ActivationStore
from .display import console
from .options import Cache, CacheSize, Config, on_this_machine, with_settings


@with_settings(ImportSaeSettings)
def import_sae(
    folder: Annotated[Path, typer.Argument(help="Folder that SAELens 6 saved, or another posae's run.")],
    run: Annotated[Path, typer.Argument(callback=on_this_machine, help="Folder of the new run.")],
    store: Annotated[str, typer.Option("--store", help="Store to evaluate it on, a folder or a URL.")],
    options: dict[str, Any],
    config: Config = None,
    cache: Cache = None,
    cache_size: CacheSize = None,
) -> None:
    """Make a run of an autoencoder that was trained elsewhere, to evaluate it on a store.

    Standard, topk, jumprelu and batchtopk of SAELens 6; SAELens need not be installed.

    Example: posae import-sae downloads/sae runs/theirs --store pile.zarr --layer 12
    """
    settings = resolve_settings(ImportSaeSettings, presets={}, config=config, options=options)
    opened = ActivationStore.open(store)
    from ..pipeline.interop.import_sae import import_sae as make_run

    done = make_run(folder, run, opened, settings)
    told = f"{run}: {done.architecture} of {done.dictionary_size:,} features, layer {done.layer}"
    if done.model_name:
        told += f", trained on {done.model_name}; the store is of {opened.manifest.model}"
    console.print(Text(told), soft_wrap=True)
    console.print(Text(f"score it: posae evaluate {run}"), soft_wrap=True)
