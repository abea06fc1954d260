"""What a store is, a line each: one list for its card, for a terminal and for a notebook.

Names in a store may be a stranger's; they are kept apart from our own words, so that whoever shows them can
show them as code, or escaped. Reads the sizes of files, and the small file of the corpus.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from .arrays import StoreArrays
from .manifest import Manifest
from .plain_text import counted, quantity

_MOST_IDS = 16
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_PACKING = {"pack": "documents are joined", "truncate": "the first tokens of each document"}


class Name(NamedTuple):
    """Text that is not ours."""

    text: str
    url: str | None = None
    """Where it lies on the Hugging Face Hub."""


class Fact(NamedTuple):
    """A line: its name, and words of ours and of others."""

    name: str
    words: tuple[str | Name, ...]

    def plain(self) -> str:
        """The words as they are; not to be shown where some characters mean something."""
        return "".join(word if isinstance(word, str) else word.text for word in self.words)


def facts(store: StoreArrays) -> Iterator[Fact]:
    """What a store is, of itself alone: equal stores have equal facts."""
    manifest, n_contexts, length = store.manifest, store.n_contexts, store.context_length
    yield Fact("model", _named("", manifest.language_model, manifest.model_revision))
    if manifest.planted:
        pairs = sorted(manifest.planted.items())
        words = [word for key, value in pairs for word in (", ", Name(key), " ", Name(value))]
        yield Fact("planted", tuple(words[1:]))
    if manifest.imported:
        unknown = ", ".join(manifest.unknown).replace("_", " ")
        words = "from ", Name(manifest.imported.kind), " of ", Name(manifest.imported.dtype)
        yield Fact("imported", (*words, "; not known: ", unknown or "nothing"))
    yield Fact("text", tuple(_text(manifest)))
    layers = ", ".join(map(str, store.layers)) or "none"
    yield Fact(
        "hook point",
        (
            Name(manifest.hook_point),
            f", the residual stream after a block, {store.d_model:,} wide; layers {layers} of "
            f"{manifest.model_layers}, counted from 0",
        ),
    )
    planned = "" if store.is_sealed else f" and {manifest.n_contexts:,} planned"
    packing = f"in random order; {_PACKING[manifest.packing]}"
    order = "in the order of those files" if manifest.imported else packing
    yield Fact("contexts", (f"{n_contexts:,} of {length:,} tokens{planned}, {order}",))
    yield Fact("tokens", (f"{n_contexts * length:,} in each layer",))
    start, stop = manifest.held_out
    held_out = f"the last {stop - start:,} contexts, from {start:,} on; training never reads them"
    yield Fact("held out", (held_out if start < stop else "none",))
    yield Fact("special tokens", (_special_tokens(manifest),))
    if corpus := store.corpus:
        n, left_out, repeated = (
            corpus[name] for name in ("documents", "documents_left_out", "duplicate_contexts")
        )
        yield Fact(
            "documents", (f"{n:,}, {left_out:,} of them left out; {repeated:,} contexts repeat another",)
        )
    if manifest.origin:
        pieces = zip(manifest.origin.contexts, manifest.origin.stores, strict=False)
        words = [
            word for contexts, whole in pieces for word in (", ", Name(contexts), " of ", Name(whole[:16]))
        ]
        yield Fact("made of", tuple(words[1:]))
    yield Fact("type", _type(manifest))
    chunk, shard = counted(manifest.chunk_contexts, "context"), f"{manifest.shard_contexts:,}"
    yield Fact("chunks", (f"{chunk} to a chunk, {shard} to a shard",))
    raw, stored = (sum(map(size, store.layers)) for size in (store.raw_bytes, store.stored_bytes))
    size = f"{quantity(stored)} for {quantity(raw)} of activations, ratio {_ratio(raw, stored)} (codec "
    yield Fact("size", (size, Name(manifest.codec), ")"))
    identity = (
        (Name(store.identity), ", the SHA-256 of ", Name("seal.json")) if store.identity else ("unfinished",)
    )
    yield Fact("identity", identity)


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


def _named(kind: str, name: str, revision: str | None) -> tuple[str | Name, ...]:
    """A model or data set with its revision."""
    url = f"https://huggingface.co/{kind}{name}/tree/{revision}" if is_on_hub(name, revision) else None
    at = (" at revision ", Name(revision)) if revision is not None else ()
    return (Name(name, url), *at)


def _text(manifest: Manifest) -> Iterator[str | Name]:
    yield from _named("datasets/", manifest.dataset, manifest.dataset_revision)
    for what, value in (
        ("configuration", manifest.dataset_config),
        ("split", manifest.dataset_split),
        ("column", manifest.dataset_column),
    ):
        if value is not None:
            yield from (f", {what} ", Name(value))


def _special_tokens(manifest: Manifest) -> str:
    ids = manifest.special_token_ids
    if not ids:
        return "none"
    told = f"ids {', '.join(map(str, ids[:_MOST_IDS]))}"
    told += f" and {len(ids) - _MOST_IDS:,} more" if len(ids) > _MOST_IDS else ""
    if manifest.first_token is not None:
        told += f"; every context begins with {manifest.first_token}"
    if manifest.separator_token is not None:
        told += f"; {manifest.separator_token} stands between documents"
    return f"{told}; training leaves them out by default"


def _type(manifest: Manifest) -> tuple[str | Name, ...]:
    if manifest.imported:
        return (f"{manifest.dtype}, from ", Name(manifest.imported.dtype))
    bits = manifest.mantissa_bits
    kind = "as the model gave it" if bits is None else f"rounded to {bits} of 7 bits of mantissa"
    on = (" with ", Name(manifest.attention), " attention on ", Name(manifest.device))
    return (f"{manifest.dtype}, {kind}", *on)
