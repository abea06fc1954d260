"""``posae copy``: a store, or a part of it, to another place."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..pipeline.settings import CopySettings, resolve_settings
from ..store.plain_text import layers_named
from ..store.reader import ActivationStore
from ..store.remote.folder import refuse_half_url
from .display import LiveProgress, console, if_interrupted, quantity, resumable
from .options import Cache, CacheSize, Config, on_this_machine, with_settings


@with_settings(CopySettings)
def copy(
    source: Annotated[str, typer.Argument(help="Store to copy: a folder, or a URL.")],
    destination: Annotated[
        str,
        typer.Argument(help="Destination: a folder, or hf://datasets/team/name, s3://, gs:// or az://."),
    ],
    options: dict[str, Any],
    config: Config = None,
    cache: Cache = None,
    cache_size: CacheSize = None,
) -> None:
    """Copy a store, or a part of it, to a folder or a server.

    Each file that is copied is checked against the seal. A part on the same file system shares whole shards
    with its source, as hard links, which are not read: inspect-store --verify reads them. Run again with the
    same options it resumes where it stopped. A part is itself a whole store.

    Example: posae copy https://example.org/pile.zarr pile.zarr --layers 12
    """
    refuse_half_url(destination)
    if "://" not in destination:
        on_this_machine(Path(destination))
    settings = resolve_settings(CopySettings, presets={}, config=config, options=options)
    from ..pipeline.stores.copy import copy as copy_to

    with if_interrupted(resumable), LiveProgress() as progress:
        done = copy_to(ActivationStore.open(source), destination, settings, progress)
    store = done.store
    before = "already there, " if done.was_there else ""
    console.print(
        f"{done.place}: {before}{store.manifest.model}, {layers_named(store.layers)}, "
        f"{store.n_contexts:,} contexts, {quantity(done.n_bytes)}, sealed as {str(store.identity)[:16]}",
        soft_wrap=True,
        markup=False,
    )
