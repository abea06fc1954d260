"""``posae plant``: a known effect of position, put into a copy of a store."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..pipeline.settings import PlantSettings, resolve_settings
from ..store.reader import ActivationStore
from .display import LiveProgress, console, goes_on, if_interrupted
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
    """Copy a store and plant a known effect of position, to see whether a training finds it.

    Run again with the same words it goes on where it stopped; another --layer adds that layer.

    Example: posae plant data/demo.zarr rotated.zarr --effect rotation --rank 32
    """
    settings = resolve_settings(PlantSettings, presets={}, config=config, options=options)
    from ..pipeline.stores.plant import Planting

    work = Planting(ActivationStore.open(store), out, settings)
    with if_interrupted(goes_on), LiveProgress() as progress:
        done = work.run(progress)
    before = "" if done.n_tokens else "finished before, "
    console.print(
        f"{out}: {before}{done.store.manifest.model}, {done.store.n_contexts:,} contexts in layers "
        f"{', '.join(map(str, done.store.layers))}, sealed as {str(done.store.identity)[:16]}",
        soft_wrap=True,
        markup=False,
    )
    for layer in done.layers:
        was, now = work.source.position_r2(layer), done.store.position_r2(layer)
        told = f"position explains {max(0.0, now):.2%} of the variance, {max(0.0, was):.2%} before"
        console.print(f"layer {layer}: {told}")
