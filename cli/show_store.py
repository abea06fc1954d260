"""A store in the terminal: what it holds, norms by position, the text of one context."""

from typing import Any

from rich.table import Table
from rich.text import Text

from ..store.errors import SettingsError
from ..store.facts import facts as store_facts
from ..store.plain_text import counted, layers_named, printable
from ..store.reader import ActivationStore
from .display import console, duration, quantity, show_by_position


def show_damage(damaged: list[dict[str, Any]]) -> None:
    """One line for each damaged part."""
    for entry in damaged:
        place = entry["array"]
        for part in ("shard", "chunk"):
            place += f", {part} {entry[part]}" if entry[part] is not None else ""
        console.print(Text(f"damaged: {place}: {entry['problem']}", style="bold red"), soft_wrap=True)
    if damaged:
        console.print("restore these files from a copy of the store, or harvest again", soft_wrap=True)


def show_brief(store: ActivationStore, facts: dict[str, Any]) -> None:
    """Two lines: contents and size."""
    state = f"sealed as {facts['identity'][:16]}" if store.is_sealed else "unfinished"
    ratio = f"ratio {facts['ratio']:.3f}" if facts["ratio"] else "no complete shard yet"
    what = f"{store.manifest.model} on {store.manifest.dataset}"
    console.print(Text.assemble((str(store.root), "bold"), f": {what}, {state}"), soft_wrap=True)
    console.print(
        f"{layers_named(store.layers)}, {counted(facts['contexts'], 'context')} of "
        f"{store.context_length} tokens, {quantity(facts['total_bytes'])}, {ratio}",
        soft_wrap=True,
    )


def show_store(store: ActivationStore, facts: dict[str, Any]) -> None:
    """The facts of ``describe`` and ``--verify``, with a plot of norms by position for each layer."""
    manifest, files = store.manifest, quantity(facts["total_bytes"])
    state = "sealed"
    if not store.is_sealed:
        state = f"unfinished, last written {duration(facts['seconds_since_written'])} ago"
    rows = {"store": f"{store.root}, format {manifest.format}, {state}; {files} in all files"}
    rows |= store_facts(store, printable)
    if tokens := facts["corpus"].get("special_tokens"):
        rows["special tokens"] += "; " + ", ".join(f"{token} {n:,} times" for token, n in tokens.items())
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
            console.print("[bold green]verified[/]: all files are unchanged since they were written")
        show_damage(facts["damaged"])
        if facts["not_part_of_the_store"]:
            names = ", ".join(repr(name) for name in facts["not_part_of_the_store"][:8])
            console.print(Text(f"not part of the store and never read: {names}"), soft_wrap=True)


def _show_layer(store: ActivationStore, facts: dict[str, Any], layer: int) -> None:
    n_contexts = store.contexts_by_layer[layer]
    console.print()
    if not n_contexts:
        console.print(f"[bold]layer {layer}[/]  no complete shard yet")
        return
    norms = [value or 0.0 for value in facts["norms"][str(layer)]]
    rest = sum(norms[1:]) / max(1, len(norms) - 1)
    of_layer, outliers = facts["by_layer"][str(layer)], facts["outlier_share"][str(layer)]
    lines = [f"{counted(n_contexts, 'context')}, ratio {of_layer['ratio']:.3f}"]
    if of_layer["bound"] is not None:
        lines[0] += f", {of_layer['share_of_bound']:.1%} of the byte-plane bound {of_layer['bound']:.3f}"
    if of_layer["rounding_error"] is not None:
        lines.append(
            f"rounding changed activations by {of_layer['rounding_error']:.2%} on average"
            + (f", FVU {of_layer['rounding_fvu']:.1e}" if of_layer["rounding_fvu"] is not None else "")
        )
    if of_layer["position_r2"] is not None:
        lines.append(f"position explains {max(0.0, of_layer['position_r2']):.2%} of the variance")
    lines.append(
        f"norm at position 0: {norms[0]:.1f}, elsewhere {rest:.1f} on average "
        f"({norms[0] / rest if rest else 0:.2f}x)"
        + (f"; above 10x the median: {outliers:.2%} of tokens" if outliers is not None else "")
    )
    console.print(f"[bold]layer {layer}[/]  {lines[0]}", soft_wrap=True)
    for line in lines[1:]:
        console.print(f"  {line}", soft_wrap=True)
    show_by_position(norms)


def show_context(store: ActivationStore, context: int, tokenizer: str | None) -> None:
    """Print the tokens of one context, one line each, and its text.

    Raises:
        SettingsError: the store has no token ids, or does not record its tokenizer.
        ModelError: the tokenizer cannot be loaded.
        StoreMismatchError: the tokenizer is another one, or of a local model.
    """
    if "tokens" in store.manifest.unknown:
        raise SettingsError(
            f"{store.root} was imported without token ids, so the text of its contexts is not known"
        )
    if store.manifest.imported and tokenizer is None:
        raise SettingsError(
            f"{store.root} was imported and does not record its tokenizer; give it with --tokenizer"
        )
    tokens = store.tokens([context])[0]
    documents = store.documents([context])[0]
    from ..pipeline.harvest.tokenizer import load_tokenizer, tokenizer_of

    if store.manifest.imported:
        decoder: Any = load_tokenizer(str(tokenizer))
    else:
        decoder = tokenizer_of(store, tokenizer, option="--tokenizer")
    title = f"context {context}"
    if store.manifest.imported:
        title += f", decoded by {tokenizer}; an imported store cannot be checked against its tokenizer"
    table = Table(title=title, title_justify="left", pad_edge=False)
    for name in ("position", "document", "token", "text"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for position, (token, document) in enumerate(zip(tokens.tolist(), documents.tolist(), strict=True)):
        text = repr(_decoded(decoder, [token]))[1:-1]
        table.add_row(str(position), str(document), str(token), Text(text))
    console.print(table)
    console.print(Text(_decoded(decoder, tokens.tolist())), soft_wrap=True)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))
