"""``posae import``: make a store of activations that another program saved."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..pipeline.settings import ImportSettings, resolve_settings
from .display import LiveProgress, console, if_interrupted, resumable
from .options import Config, on_this_machine, with_settings


@with_settings(ImportSettings)
def import_activations(
    source: Annotated[
        Path,
        typer.Argument(help="File or folder: SAELens' cached activations, .safetensors, .npy or .pt."),
    ],
    store: Annotated[Path, typer.Argument(callback=on_this_machine, help="Folder of the new store.")],
    options: dict[str, Any],
    config: Config = None,
) -> None:
    """Make a store of activations that another program saved.

    What is not known about them, e.g. positions, is recorded in the store. Nothing is unpickled. Run again
    with the same options, it resumes where it stopped.

    Example: posae import cached_activations theirs.zarr --layer 12
    """
    settings = resolve_settings(ImportSettings, presets={}, config=config, options=options)
    from ..pipeline.stores.import_activations import Import

    work = Import(source, store, settings)
    with if_interrupted(resumable), LiveProgress() as progress:
        done = work.run(progress)
    before = "" if done.n_tokens else "already finished, "
    manifest = done.store.manifest
    summary = (
        f"{store}: {before}{manifest.n_contexts:,} contexts of {manifest.context_length} tokens in layer "
        f"{work.layer}, sealed as {str(done.store.identity)[:16]}"
    )
    console.print(Text(summary), soft_wrap=True)
    console.print(Text(f"not known: {', '.join(work.unknown).replace('_', ' ')}"), soft_wrap=True)
    if done.n_left_out:
        console.print(
            f"{done.n_left_out} rows at the end do not fill a context and were left out", soft_wrap=True
        )
