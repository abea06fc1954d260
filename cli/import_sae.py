"""``posae import-sae``: make a run of an autoencoder that another program trained."""

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
    folder: Annotated[Path, typer.Argument(help="Folder saved by SAELens 6, or a run of posae.")],
    run: Annotated[Path, typer.Argument(callback=on_this_machine, help="Folder of the new run.")],
    store: Annotated[str, typer.Option("--store", help="Store to evaluate it on, a folder or a URL.")],
    options: dict[str, Any],
    config: Config = None,
    cache: Cache = None,
    cache_size: CacheSize = None,
) -> None:
    """Import an autoencoder that was trained elsewhere as a run, to evaluate it on a store.

    Reads standard, topk, jumprelu and batchtopk of SAELens 6; SAELens need not be installed.

    Example: posae import-sae downloads/sae runs/theirs --store pile.zarr --layer 12
    """
    settings = resolve_settings(ImportSaeSettings, presets={}, config=config, options=options)
    opened = ActivationStore.open(store)
    from ..pipeline.interop.import_sae import import_sae as make_run

    done = make_run(folder, run, opened, settings)
    summary = f"{run}: {done.architecture} with {done.dictionary_size:,} features, layer {done.layer}"
    if done.model_name:
        summary += f", trained on {done.model_name}; the store holds activations of {opened.manifest.model}"
    console.print(Text(summary), soft_wrap=True)
    console.print(Text(f"score it with: posae evaluate {run}"), soft_wrap=True)
