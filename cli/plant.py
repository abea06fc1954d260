"""``posae plant``: copy a store and add a known effect of position to its activations."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..pipeline.settings import PlantSettings, resolve_settings
from ..store.plain_text import layers_named
from ..store.reader import ActivationStore
from .display import LiveProgress, console, if_interrupted, resumable
from .options import Cache, CacheSize, Config, on_this_machine, with_settings


@with_settings(PlantSettings)
def plant(
    store: Annotated[str, typer.Argument(help="Store to plant from, a folder or a URL; it is not changed.")],
    out: Annotated[Path, typer.Argument(callback=on_this_machine, help="Folder of the new store.")],
    options: dict[str, Any],
    config: Config = None,
    cache: Cache = None,
    cache_size: CacheSize = None,
) -> None:
    """Copy a store and plant a known effect of position, to test whether a method finds it.

    Run again with the same options, it resumes where it stopped; another --layer adds that layer.

    Example: posae plant data/demo.zarr rotated.zarr --effect rotation --rank 32
    """
    settings = resolve_settings(PlantSettings, presets={}, config=config, options=options)
    from ..pipeline.stores.plant import Planting

    work = Planting(ActivationStore.open(store), out, settings)
    with if_interrupted(resumable), LiveProgress() as progress:
        done = work.run(progress)
    before = "" if done.n_tokens else "already finished, "
    console.print(
        f"{out}: {before}{done.store.manifest.model}, {done.store.n_contexts:,} contexts in "
        f"{layers_named(done.store.layers)}, sealed as {str(done.store.identity)[:16]}",
        soft_wrap=True,
        markup=False,
    )
    for layer in done.layers:
        before, after = (max(0.0, store.position_r2(layer)) for store in (work.source, done.store))
        console.print(f"layer {layer}: position explains {after:.2%} of the variance, {before:.2%} before")
