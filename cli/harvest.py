"""``posae harvest``: write a language model's activations to a store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..pipeline.settings import HARVEST_PRESETS, HarvestSettings, resolve_settings
from ..store.plain_text import counted, layers_named
from ..store.writer import StoreWriter
from .display import LiveProgress, console, duration, errors, if_interrupted, quantity
from .options import Config, on_this_machine, with_settings


@with_settings(HarvestSettings)
def harvest(
    store: Annotated[
        Path, typer.Argument(callback=on_this_machine, help="Folder of the store, e.g. pile.zarr.")
    ],
    options: dict[str, Any],
    preset: Annotated[
        str | None, typer.Option("--preset", help=f"Settings to start from: {', '.join(HARVEST_PRESETS)}.")
    ] = None,
    config: Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option("--rate", help="Throughput in tokens per second that --dry-run assumes.", min=1),
    ] = None,
) -> None:
    """Run a language model over text and keep its activations in a store.

    Run again with the same options, it resumes where it stopped; --layers may add layers. Several processes
    may share a store: torchrun --nproc-per-node 8 -m posae harvest …

    Example: posae harvest pile.zarr --preset gemma-2-2b --tokens 22000000
    """
    settings = resolve_settings(
        HarvestSettings, presets=HARVEST_PRESETS, preset=preset, config=config, options=options
    )
    from ..pipeline.harvest.harvest import Harvest

    work = Harvest(store, settings)
    plan = work.plan()
    prints = work.processes.is_first
    if dry_run:
        if not prints:
            return
        lines = {
            "model": f"{plan.model}, {layers_named(plan.layers)}",
            "contexts": f"{plan.n_contexts:,} of {settings.context_length} tokens",
            "tokens": f"{plan.n_tokens:,}",
            "raw": quantity(plan.raw_bytes),
            "on disk, expected": f"{quantity(plan.expected_bytes)} ({settings.codec})",
            "free": quantity(plan.free_bytes),
            "time": f"{duration(plan.n_tokens / rate)} at {rate:,.0f} tokens/s" if rate else "give --rate",
        }
        for name, text in lines.items():
            console.print(f"{name:18} {text}")
        if plan.expected_bytes > plan.free_bytes:
            console.print("[bold red]this will not fit[/]: free some space, or lower --contexts")
        return
    if prints and plan.expected_bytes > plan.free_bytes and not store.exists():
        errors.print(
            f"warning: about {quantity(plan.expected_bytes)} will be written, "
            f"but only {quantity(plan.free_bytes)} are free"
        )
    sealed, incomplete = work.layers_held() if prints else ((), ())
    if incomplete:
        note = f"{layers_named(incomplete)}, begun earlier, will stay incomplete"
        note += f"; the store will hold {layers_named(sealed)}"
        console.print(Text(f"{store}: {note}"), soft_wrap=True)
    with (
        if_interrupted(lambda: _n_shards_written(store, work.layers) if prints else ""),
        LiveProgress() as progress,
    ):
        work.open_text(progress)
        done = work.run(progress)
    if not prints:
        return
    what = f"{counted(done.n_contexts, 'context')} in {layers_named(done.layers)}"
    before = "" if done.n_tokens else "already finished, "
    console.print(Text(f"{store}: {before}{what}, sealed as {done.identity[:16]}"), soft_wrap=True)


def _n_shards_written(store: Path, layers: Sequence[int]) -> str:
    from ..pipeline.harvest.harvest import committed_manifest

    manifest = committed_manifest(store)
    if manifest is None:
        return "no shards written yet; the same command starts over"
    n_written = len(StoreWriter(store, manifest).standing_shards(layers))
    n_shards = counted(manifest.n_shards, "shard")
    return f"{n_written:,} of {n_shards} written; run the same command again to resume"
