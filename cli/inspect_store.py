"""``posae inspect-store``: what a store holds, and whether it is intact."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ..store.errors import StoreDamagedError, StoreError, StoreFormatError
from ..store.reader import ActivationStore
from ..store.remote.folder import is_url
from .display import LiveProgress
from .options import Cache, CacheSize
from .show_store import show_brief, show_context, show_damage, show_store


def inspect_store(
    store: Annotated[str, typer.Argument(help="Folder of the store, or its URL.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back and check it.")] = False,
    brief: Annotated[bool, typer.Option("--brief", help="Print two lines: contents and size.")] = False,
    context: Annotated[
        int | None, typer.Option("--context", help="Show the text of this context.", min=0)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Hub id or folder of the tokenizer for --context."),
    ] = None,
    cache: Cache = None,
    cache_size: CacheSize = None,
) -> None:
    """Show what a store holds; with --verify, read it back and list what is damaged.

    Example: posae inspect-store pile.zarr --verify
    """
    try:
        opened = ActivationStore.open(store)
    except (StoreDamagedError, StoreFormatError) as error:
        root = Path(store) / "zarr.json"
        # Where it is a link, so are all files, and nothing is damaged.
        if is_url(store) or not (verify and os.path.lexists(root)) or root.is_symlink():
            raise
        _verify_what_will_not_open(Path(store), error, as_json)
        raise typer.Exit(1) from None
    facts = describe(opened)
    if verify:
        facts |= _verified(opened)
    if as_json:
        typer.echo(json.dumps(facts))
    elif brief:
        show_brief(opened, facts)
    elif context is None:
        show_store(opened, facts)
    if context is not None and not as_json:
        show_context(opened, context, tokenizer)
    if facts.get("damaged"):
        raise typer.Exit(1)


def describe(store: ActivationStore) -> dict[str, Any]:
    """Everything about a store, as JSON."""
    manifest = store.manifest
    raw = sum(store.raw_bytes(layer) for layer in store.layers)
    stored = sum(store.stored_bytes(layer) for layer in store.layers)
    files = list(_all_files(store))
    norms = {layer: store.norms(layer) for layer in store.layers if store.contexts_by_layer[layer]}
    return {
        "format": manifest.format,
        "model": manifest.model,
        "dataset": manifest.dataset,
        "hook_point": manifest.hook_point,
        "layers": list(store.layers),
        "d_model": manifest.d_model,
        "context_length": manifest.context_length,
        "contexts": store.n_contexts,
        "contexts_by_layer": {str(layer): n for layer, n in store.contexts_by_layer.items()},
        "contexts_planned": manifest.n_contexts,
        "held_out": list(manifest.held_out),
        "tokens": store.n_contexts * manifest.context_length,
        "complete": store.is_sealed,
        "identity": store.identity,
        "codec": manifest.codec,
        "chunk_contexts": manifest.chunk_contexts,
        "shard_contexts": manifest.shard_contexts,
        "raw_bytes": raw,
        "stored_bytes": stored,
        "ratio": raw / stored if stored else None,
        "total_bytes": sum(file.st_size for file in files) if files else sealed_bytes(store),
        "seconds_since_written": None if store.is_sealed else _seconds_since(files),
        "mantissa_bits": manifest.mantissa_bits,
        "by_layer": {str(layer): describe_layer(store, layer) for layer in norms},
        "norms": {str(layer): [_finite(x) for x in of_layer.mean] for layer, of_layer in norms.items()},
        "median_norm": {str(layer): _finite(of_layer.median) for layer, of_layer in norms.items()},
        "outlier_share": {str(layer): _finite(of_layer.outlier_share) for layer, of_layer in norms.items()},
        "corpus": store.corpus,
        "manifest": manifest.model_dump(mode="json"),
    }


def _all_files(store: ActivationStore) -> Iterator[os.stat_result]:
    """The files of a local store; those on a server are listed by the seal."""
    if isinstance(store.root, Path):
        for path in store.files.walk():
            with suppress(FileNotFoundError):  # a running harvest renames its files
                yield (store.root / path).lstat()


def sealed_bytes(store: ActivationStore) -> int:
    """Bytes of all files that the seal names."""
    return sum(file.n_bytes for file in store.seal.files.values()) if store.seal else 0


def _seconds_since(files: Iterable[os.stat_result]) -> float:
    # The clock that stamped the files may be ahead of ours.
    return max(0.0, time.time() - max((file.st_mtime for file in files), default=0.0))


def describe_layer(store: ActivationStore, layer: int) -> dict[str, Any]:
    """Statistics of one layer: its compression, the bound on that, the variance that position explains."""
    bound, rounding = store.compression_bound(layer), store.rounding_error(layer)
    ratio = store.raw_bytes(layer) / max(1, store.stored_bytes(layer))
    return {
        "ratio": ratio,
        "bound": _finite(bound),
        "share_of_bound": _finite(ratio / bound) if bound else None,
        "position_r2": _finite(store.position_r2(layer)),
        "rounding_error": _finite(rounding.relative) if rounding else None,
        "rounding_fvu": _finite(rounding.fvu) if rounding else None,
    }


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _verified(store: ActivationStore) -> dict[str, Any]:
    from ..store.verify import verify

    with LiveProgress() as progress:
        progress.begin("verifying", _bytes_to_verify(store), "bytes")
        checked = verify(store, progress.advance)
        progress.end()
    return {
        "verified": not checked.damaged,
        "damaged": [damage._asdict() for damage in checked.damaged],
        "not_part_of_the_store": checked.foreign,
    }


def _bytes_to_verify(store: ActivationStore) -> int:
    if store.seal:
        return sealed_bytes(store)
    return sum(store.stored_bytes(layer) for layer in store.layers)


def _verify_what_will_not_open(store: Path, error: StoreError, as_json: bool) -> None:
    """Report what can be checked of a store whose metadata is damaged."""
    where = error.array if isinstance(error, StoreDamagedError) else "zarr.json"
    what = error.problem if isinstance(error, StoreDamagedError) else str(error)
    damaged = [{"array": where, "shard": None, "chunk": None, "problem": what}]
    with suppress(StoreError):
        damaged = _verified(ActivationStore(store))["damaged"] or damaged
    if as_json:
        typer.echo(json.dumps({"verified": False, "damaged": damaged}))
    else:
        show_damage(damaged)
