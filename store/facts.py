"""The facts about a store, one line each, for its card, a terminal and a notebook.

Names in a store may come from strangers, so the caller says how to show them. Reads the sizes of files and
the corpus counts.
"""

import re
from collections.abc import Callable, Iterator

from .arrays import StoreArrays
from .errors import StoreDamagedError, StoreFormatError
from .manifest import Manifest
from .plain_text import counted, numbers, quantity

_MOST_IDS = 16
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_PACKING = {"pack": "documents are joined", "truncate": "the first tokens of each document"}

Shown = Callable[[str], str]
"""How to show text from the store: as it is, or as code."""


def facts(store: StoreArrays, shown: Shown = str, linked: bool = False) -> dict[str, str]:
    """Facts that follow from the store alone: equal stores have equal facts.

    Args:
        store: an opened store.
        shown: how to show a name.
        linked: whether names on the Hugging Face Hub become Markdown links.

    Returns:
        Lines by their names.
    """
    return dict(_facts(store, shown, linked))


def _facts(store: StoreArrays, shown: Shown, linked: bool) -> Iterator[tuple[str, str]]:
    manifest, n_contexts, length = store.manifest, store.n_contexts, store.context_length

    def named(kind: str, name: str, revision: str | None) -> str:
        where = f"https://huggingface.co/{kind}{name}/tree/{revision}"
        link = f"[{shown(name)}]({where})" if linked and is_on_hub(name, revision) else shown(name)
        return link + (f" at revision {shown(revision)}" if revision is not None else "")

    yield "model", named("", manifest.language_model, manifest.model_revision)
    if manifest.planted:
        pairs = sorted(manifest.planted.items())
        yield "planted", ", ".join(f"{shown(key)} {shown(value)}" for key, value in pairs)
    if manifest.imported:
        unknown = ", ".join(manifest.unknown).replace("_", " ") or "nothing"
        kind, dtype = manifest.imported.kind, manifest.imported.dtype
        yield "imported", f"from {shown(kind)} of {shown(dtype)}; not known: {unknown}"
    text = named("datasets/", manifest.dataset, manifest.dataset_revision)
    for part in ("config", "split", "column"):
        value: str | None = getattr(manifest, f"dataset_{part}")
        text += f", {part} {shown(value)}" if value is not None else ""
    yield "text", text
    layers = numbers(store.layers) or "none"
    where = f"the residual stream after a block, {store.d_model:,} wide; layers {layers} of "
    yield "hook point", f"{shown(manifest.hook_point)}, {where}{manifest.model_layers}, counted from 0"
    planned = "" if store.is_sealed else f" and {manifest.n_contexts:,} planned"
    packing = f"in random order; {_PACKING[manifest.packing]}"
    order = "in the order of those files" if manifest.imported else packing
    yield "contexts", f"{n_contexts:,} of {length:,} tokens{planned}, {order}"
    yield "tokens", f"{n_contexts * length:,} in each layer"
    start, stop = manifest.held_out
    held_out = f"the last {stop - start:,} contexts, from context {start:,}; training never reads them"
    yield "held out", held_out if start < stop else "none"
    yield "special tokens", _special_tokens(manifest)
    if corpus := store.corpus:
        left_out, repeated = corpus["documents_left_out"], corpus["duplicate_contexts"]
        counts = f"{left_out:,} of them left out; {repeated:,} contexts repeat another"
        yield "documents", f"{corpus['documents']:,}, {counts}"
    if manifest.origin:
        pieces = zip(manifest.origin.contexts, manifest.origin.stores, strict=False)
        yield "made of", ", ".join(f"{shown(some)} of {shown(whole[:16])}" for some, whole in pieces)
    yield "type", _type(manifest, shown)
    for layer in store.layers:
        if versions := _other_versions(store, layer, shown):
            yield f"layer {layer}", f"written by other versions than the rest: {versions}"
    chunk = counted(manifest.chunk_contexts, "context")
    yield "chunks", f"{chunk} per chunk, {manifest.shard_contexts:,} per shard"
    raw, stored = (sum(map(size, store.layers)) for size in (store.raw_bytes, store.stored_bytes))
    ratio = f"ratio {_ratio(raw, stored)} (codec {shown(manifest.codec)})"
    yield "size", f"{quantity(stored)} for {quantity(raw)} of activations, {ratio}"
    yield "identity", shown(store.identity) if store.identity else "unfinished"


def layer_sizes(store: StoreArrays) -> list[list[str]]:
    """A table: what its columns are called, then a row for each layer."""
    rows = [["layer", "contexts", "stored", "raw", "ratio"]]
    for layer, n_contexts in store.contexts_by_layer.items():
        raw, stored = store.raw_bytes(layer), store.stored_bytes(layer)
        rows.append([str(layer), f"{n_contexts:,}", quantity(stored), quantity(raw), _ratio(raw, stored)])
    return rows


def _ratio(raw: int, stored: int) -> str:
    return f"{raw / stored:.3f}" if stored else "-"


def is_on_hub(name: str, revision: str | None) -> bool:
    """Whether a model or data set is one of the Hub's; local files have no commit but a digest."""
    return bool(_COMMIT.fullmatch(revision or "") and _HUB_ID.fullmatch(name))


def _other_versions(store: StoreArrays, layer: int, shown: Shown) -> str:
    try:
        versions = store.layer_versions(layer)
    except (StoreDamagedError, StoreFormatError):
        return ""  # found by --verify
    return ", ".join(f"{shown(name)} {shown(version)}" for name, version in sorted(versions.items()))


def _special_tokens(manifest: Manifest) -> str:
    ids = manifest.special_token_ids
    if not ids:
        return "none"
    told = f"ids {numbers(ids[:_MOST_IDS])}"
    told += f" and {len(ids) - _MOST_IDS:,} more" if len(ids) > _MOST_IDS else ""
    if manifest.first_token is not None:
        told += f"; every context begins with {manifest.first_token}"
    if manifest.separator_token is not None:
        told += f"; {manifest.separator_token} stands between documents"
    return f"{told}; training leaves them out by default"


def _type(manifest: Manifest, shown: Shown) -> str:
    if manifest.imported:
        return f"{manifest.dtype}, from {shown(manifest.imported.dtype)}"
    bits = manifest.mantissa_bits
    kind = "as the model gave it" if bits is None else f"rounded to {bits} of 7 bits of mantissa"
    where = f"with {shown(manifest.attention)} attention on {shown(manifest.device)}"
    return f"{manifest.dtype}, {kind} {where}"
