"""``posae merge``: join several harvests of one corpus into one store."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..pipeline.settings import MergeSettings, resolve_settings
from ..store.plain_text import layers_named
from ..store.reader import ActivationStore
from .display import LiveProgress, console, if_interrupted, resumable
from .options import Cache, CacheSize, Config, on_this_machine, with_settings


@with_settings(MergeSettings)
def merge(
    stores: Annotated[
        list[str], typer.Argument(help="Stores to merge, folders or URLs, two or more; they are not changed.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=on_this_machine, help="Folder of the new store.")
    ],
    options: dict[str, Any],
    config: Config = None,
    cache: Cache = None,
    cache_size: CacheSize = None,
) -> None:
    """Join harvests with the same settings and different contexts of the corpus into one store.

    On one file system whole shards are hard links to the files of the stores and take no space; the new store
    stays complete when the others are deleted. Run again with the same options, it resumes where it stopped.

    Example: posae merge first.zarr second.zarr --out both.zarr
    """
    settings = resolve_settings(MergeSettings, presets={}, config=config, options=options)
    from ..pipeline.stores.merge import Merge

    work = Merge([ActivationStore.open(store) for store in stores], out, settings)
    with if_interrupted(resumable), LiveProgress() as progress:
        done = work.run(progress)
    before = "" if done.n_tokens else "already finished, "
    summary = (
        f"{out}: {before}{done.store.n_contexts:,} contexts of {len(stores)} stores in "
        f"{layers_named(done.store.layers)}, sealed as {str(done.store.identity)[:16]}"
    )
    console.print(Text(summary), soft_wrap=True)
    if done.n_repeated:
        console.print(
            f"{done.n_repeated:,} contexts have the same tokens as a context of another store", soft_wrap=True
        )
