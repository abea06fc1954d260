"""``posae inspect-store``: what a store holds, and whether it is whole."""

import json
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..store.errors import SettingsError, StoreDamagedError, StoreError, StoreFormatError
from ..store.reader import ActivationStore
from .display import LiveProgress, console, duration, plot, quantity


def inspect_store(
    store: Annotated[Path, typer.Argument(help="Folder of the store.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back and check it.")] = False,
    brief: Annotated[bool, typer.Option("--brief", help="Two lines: what, how much, where.")] = False,
    context: Annotated[
        int | None, typer.Option("--context", help="Show the text of this context.", min=0)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Hub id or folder of the tokenizer for --context."),
    ] = None,
) -> None:
    """Show what a store holds; with --verify, read it back and say what is damaged.

    Example: posae inspect-store pile.zarr --verify
    """
    try:
        opened = ActivationStore.open(store)
    except (StoreDamagedError, StoreFormatError) as error:
        if not (verify and (store / "zarr.json").exists()):
            raise
        _verify_what_will_not_open(store, error, as_json)
        raise typer.Exit(1) from None
    facts = describe(opened)
    if verify:
        facts |= _verified(opened)
    if as_json:
        typer.echo(json.dumps(facts))
    elif brief:
        _show_brief(opened, facts)
    elif context is None:
        _show(opened, facts)
    if context is not None and not as_json:
        _show_context(opened, context, tokenizer)
    if facts.get("damaged"):
        raise typer.Exit(1)


def describe(store: ActivationStore) -> dict[str, Any]:
    """Everything about a store, as JSON."""
    manifest = store.manifest
    raw = sum(store.raw_bytes(layer) for layer in store.layers)
    stored = sum(store.stored_bytes(layer) for layer in store.layers)
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
        "total_bytes": sum((store.root / path).lstat().st_size for path in store.files.walk()),
        "norms": {str(layer): _finite(found.mean) for layer, found in norms.items()},
        "median_norm": {str(layer): found.median for layer, found in norms.items()},
        "outlier_share": {str(layer): found.outlier_share for layer, found in norms.items()},
        "corpus": store.corpus,
        "manifest": manifest.model_dump(mode="json"),
    }


def _finite(values: Iterable[float]) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def _verified(store: ActivationStore) -> dict[str, Any]:
    from ..store.verify import verify

    with LiveProgress() as progress:
        progress.begin("verifying", _bytes_to_verify(store), "bytes")
        found = verify(store, progress.advance)
        progress.end()
    return {
        "verified": not found.damaged,
        "damaged": [damage._asdict() for damage in found.damaged],
        "not_part_of_the_store": found.foreign,
    }


def _bytes_to_verify(store: ActivationStore) -> int:
    if store.seal:
        return sum(file.n_bytes for file in store.seal.files.values())
    return sum(store.stored_bytes(layer) for layer in store.layers)


def _verify_what_will_not_open(store: Path, error: StoreError, as_json: bool) -> None:
    """What can be said of a store whose metadata is damaged."""
    where = error.array if isinstance(error, StoreDamagedError) else "zarr.json"
    what = error.problem if isinstance(error, StoreDamagedError) else str(error)
    damaged = [{"array": where, "shard": None, "chunk": None, "problem": what}]
    with suppress(StoreError):
        damaged = _verified(ActivationStore(store))["damaged"] or damaged
    if as_json:
        typer.echo(json.dumps({"verified": False, "damaged": damaged}))
    else:
        _show_damage(damaged)


def _show_damage(damaged: list[dict[str, Any]]) -> None:
    for entry in damaged:
        place = entry["array"]
        for part in ("shard", "chunk"):
            place += f", {part} {entry[part]}" if entry[part] is not None else ""
        console.print(Text(f"damaged: {place}: {entry['problem']}", style="bold red"), soft_wrap=True)
    if damaged:
        console.print("restore these files from a copy of the store, or harvest it anew", soft_wrap=True)


def _show_brief(store: ActivationStore, facts: dict[str, Any]) -> None:
    state = f"sealed as {facts['identity'][:16]}" if store.is_sealed else "unfinished"
    ratio = f"ratio {facts['ratio']:.3f}" if facts["ratio"] else "nothing committed yet"
    what = f"{store.manifest.model} on {store.manifest.dataset}"
    console.print(Text.assemble((str(store.root), "bold"), f": {what}, {state}"), soft_wrap=True)
    console.print(
        f"layers {', '.join(map(str, store.layers))}, {facts['contexts']:,} contexts of "
        f"{store.context_length} tokens, {quantity(facts['total_bytes'])}, {ratio}",
        soft_wrap=True,
    )


def _show(store: ActivationStore, facts: dict[str, Any]) -> None:
    manifest = store.manifest
    state = f"sealed as {facts['identity'][:16]}" if store.is_sealed else "unfinished"
    if not store.is_sealed:
        newest = max(((store.root / path).lstat().st_mtime for path in store.files.walk()), default=0.0)
        state += f", last written {duration(time.time() - newest)} ago"
    revision = f" @ {manifest.dataset_revision}" if manifest.dataset_revision else ""
    split = f" ({manifest.dataset_split})" if manifest.dataset_split else ""
    percent = facts["contexts"] / manifest.n_contexts
    held = manifest.held_out[1] - manifest.held_out[0]
    corpus = facts["corpus"]
    rows = {
        "store": f"{store.root}, format {manifest.format}, {state}",
        "model": f"{manifest.model} @ {manifest.model_revision}, {manifest.hook_point}, {manifest.dtype}, "
        f"{manifest.attention} attention on {manifest.device}",
        "text": f"{manifest.dataset}{split}{revision}",
        "contexts": f"{facts['contexts']:,} of {manifest.n_contexts:,} committed ({percent:.0%}), "
        f"{manifest.context_length} tokens each, {manifest.packing}; the last {held:,} held out",
        "tokens": f"{facts['tokens']:,} in each layer",
        "chunks": f"{manifest.chunk_contexts} contexts to a chunk, {manifest.shard_contexts} to a shard; "
        f"codec {manifest.codec}",
    }
    if corpus:
        rows["corpus"] = (
            f"{corpus['documents']:,} documents ({corpus['documents_left_out']:,} left out), "
            f"{corpus['duplicate_contexts']:,} contexts that repeat another, special tokens "
            + ", ".join(f"{token}: {count:,}" for token, count in corpus["special_tokens"].items())
        )
    if facts["ratio"]:
        rows["size"] = (
            f"{quantity(facts['stored_bytes'])} for {quantity(facts['raw_bytes'])} of activations, "
            f"ratio {facts['ratio']:.3f}; {quantity(facts['total_bytes'])} with all files"
        )
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, Text(text))
    console.print(table)
    for layer in store.layers:
        _show_layer(store, facts, layer)
    if "verified" in facts:
        if facts["verified"]:
            console.print("[bold green]verified[/]: every byte is as it was written")
        _show_damage(facts["damaged"])
        if facts["not_part_of_the_store"]:
            names = ", ".join(repr(name) for name in facts["not_part_of_the_store"][:8])
            console.print(Text(f"not part of the store, and never read: {names}"), soft_wrap=True)


def _show_layer(store: ActivationStore, facts: dict[str, Any], layer: int) -> None:
    n_contexts = store.contexts_by_layer[layer]
    console.print()
    if not n_contexts:
        console.print(f"[bold]layer {layer}[/]  nothing committed yet")
        return
    norms = [value or 0.0 for value in facts["norms"][str(layer)]]
    rest = sum(norms[1:]) / max(1, len(norms) - 1)
    ratio = store.raw_bytes(layer) / max(1, store.stored_bytes(layer))
    console.print(
        f"[bold]layer {layer}[/]  {n_contexts:,} contexts, ratio {ratio:.3f}; norm at position 0: "
        f"{norms[0]:.1f}, elsewhere {rest:.1f} on average ({norms[0] / rest if rest else 0:.2f} x); "
        f"over 10 x the median: {facts['outlier_share'][str(layer)]:.2%} of tokens",
        soft_wrap=True,
    )
    lines = plot(norms, width=max(8, min(64, console.width - 22)))
    for number, line in enumerate(lines):
        label = f"{max(norms):8.1f}" if number == 0 else f"{0:8.1f}" if number == len(lines) - 1 else " " * 8
        console.print(f"{label} ┤[cyan]{line}[/]")
    end = f"{store.context_length - 1}"
    console.print(f"{'':9} 0{end:>{max(1, len(lines[0]) - 1)}}  position")


def _show_context(store: ActivationStore, context: int, tokenizer: str | None) -> None:
    tokens = store.tokens([context])[0]
    documents = store.documents([context])[0]
    from ..pipeline.language_model import load_tokenizer
    from ..pipeline.text.contexts import tokenizer_hash

    source = tokenizer or store.manifest.model
    if tokenizer is None and (store.manifest.model_revision or "").startswith("sha256:") and source != "demo":
        raise SettingsError(
            f"this store was made with a model in a local folder, {source}; name that folder with --tokenizer"
        )
    decoder = load_tokenizer(source, None if tokenizer else store.manifest.model_revision)
    if tokenizer_hash(decoder) != store.manifest.tokenizer_hash:
        raise StoreFormatError(
            f"{source} has another tokenizer than this store was made with; "
            "name the right one with --tokenizer"
        )
    table = Table(title=f"context {context}", title_justify="left", pad_edge=False)
    for name in ("position", "document", "token", "text"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for position, (token, document) in enumerate(zip(tokens.tolist(), documents.tolist(), strict=True)):
        text = repr(_decoded(decoder, [token]))[1:-1]
        table.add_row(str(position), str(document), str(token), Text(text))
    console.print(table)
    console.print(Text(_decoded(decoder, tokens.tolist())), soft_wrap=True)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))
