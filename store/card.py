"""A store's card: ``README.md``, which tells people what the store holds and how to open it.

In the form of a dataset card of the Hugging Face Hub: metadata in YAML, then Markdown. It is made from the
store's bytes alone, so that equal stores have equal cards. Its last line holds a digest of all before it: a
card that anybody edited is no longer ours and is left as it is. Names in a store may be a stranger's: they
are shown as code, where no character means anything. Reads each layer's statistics of norms, and of 16 shards
the sums, once for each seal.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import StoreDamagedError
from .files import StoreFiles
from .manifest import Manifest
from .plain_text import plot, quantity
from .readable import ReadableFiles
from .reader import ActivationStore
from .seal import CARD_PATH
from .stats import NormStats

MAX_CARD_BYTES = 1 << 20
_MOST_IDS = 16
_CATEGORIES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_MARK = "<!-- posae wrote this card and renews it with the seal. Once edited it is yours. %s -->\n"
_LAST_LINE = re.compile(re.escape(_MARK).replace("%s", "([0-9a-f]{64})").encode())


def write_card(store: ActivationStore) -> None:
    """Write the card where there is none, or one of ours that is of an earlier seal.

    Raises:
        StoreDamagedError: the statistics are not what was written.
        StoreWriteError: the disk refused.
    """
    try:
        found = read_card(store.files)
    except StoreDamagedError:
        return  # a link, a folder, or longer than any card: somebody's
    if found is None or (is_ours(found) and str(store.identity).encode() not in found):
        assert isinstance(store.files, StoreFiles)
        store.files.write(CARD_PATH, card(store).encode())


def read_card(files: ReadableFiles) -> bytes | None:
    """The card that lies in a store; None where there is none.

    Raises:
        StoreDamagedError: something else stands there, or it is longer than any card.
        StoreRemoteError: the server refused, or does not answer.
    """
    try:
        return files.read(CARD_PATH, MAX_CARD_BYTES)
    except FileNotFoundError:
        return None


def is_ours(data: bytes) -> bool:
    """Whether this is, byte for byte, a card that posae wrote."""
    start = data.rfind(b"\n", 0, -1) + 1
    last = _LAST_LINE.fullmatch(data, start)
    return last is not None and last[1].decode() == hashlib.sha256(data[:start]).hexdigest()


def card(store: ActivationStore) -> str:
    """The card of a sealed store that has a layer.

    Raises:
        StoreDamagedError: the statistics are not what was written.
    """
    manifest = store.manifest
    norms = {layer: store.norms(layer) for layer in store.layers}
    parts = [
        _metadata(manifest),
        f"# Activations of {_code(manifest.model)} on {_code(manifest.dataset)}",
        *([_PLANTED] if manifest.planted else []),
        *([_imported(manifest)] if manifest.imported else []),
        "\n".join(f"- **{name}**: {words}" for name, words in _facts(store)),
        "## Layers",
        "\n".join(_layers(store, norms)),
        "Over 10 x the median: the share of tokens with such a norm. Position R²: the share of the variance "
        "that position alone explains, of a sample.",
        "## Norms by position",
        "Mean norm of all tokens at each position, on a logarithmic scale; a bar over several positions is "
        "the greatest of them. A position far above all others is an attention sink.",
        "```\n" + "\n\n".join("\n".join(_bars(layer, norms[layer].mean)) for layer in norms) + "\n```",
        "## How to open it",
        _how_to_open(store),
        "## Licences",
        _LICENCES,
    ]
    text = "\n\n".join(parts) + "\n\n"
    return text + _MARK % hashlib.sha256(text.encode()).hexdigest()


_PLANTED = (
    "**This is no harvest.** An effect of position was planted into the activations on purpose, to see "
    "whether a method finds it."
)


def _imported(manifest: Manifest) -> str:
    return (
        "**This was imported** from files of another program. Not known: "
        f"{_code(', '.join(manifest.unknown).replace('_', ' ') or 'nothing')}."
    )


_LICENCES = """\
To be filled in by the owner, here and at `license` at the top. Activations come from a model and from text; \
the licences of both bind whoever shares them.

- licence of the model:
- licence of the text:
- licence of this store:"""


def _metadata(manifest: Manifest) -> str:
    """What the Hub reads: YAML, with every string of the store as a JSON string, which YAML is a form of."""
    above = next((i for i, most in enumerate(_CATEGORIES) if manifest.n_contexts < _number(most)), None)
    if above is None:
        size = f"n>{_CATEGORIES[-1]}"
    else:
        size = f"{_CATEGORIES[above - 1]}<n<{_CATEGORIES[above]}" if above else f"n<{_CATEGORIES[0]}"
    name = f"Activations of {_printable(manifest.model)} on {_printable(manifest.dataset)}"
    lines = [
        "---",
        f"pretty_name: {json.dumps(name, ensure_ascii=False)}",
        "license: unknown  # to be filled in by the owner: see Licences below",
        "tags: [activations, interpretability, sparse-autoencoder, zarr, posae]",
        f'size_categories: ["{size}"]',
    ]
    if _is_on_hub(manifest.dataset, manifest.dataset_revision):
        lines.append(f"source_datasets: [{json.dumps(manifest.dataset)}]")
    # The Hub would show zarr.json as a table.
    return "\n".join([*lines, "viewer: false", "---"])


def _number(category: str) -> int:
    return int(category[:-1]) * 1000 ** (1 + "KMBT".index(category[-1]))


def _facts(store: ActivationStore) -> Iterator[tuple[str, str]]:
    """What it is, a line each: a name and Markdown."""
    manifest = store.manifest
    yield "model", _named("", manifest.language_model, manifest.model_revision)
    if manifest.planted:
        yield (
            "planted",
            ", ".join(f"{_code(key)} {_code(value)}" for key, value in sorted(manifest.planted.items())),
        )
    text = _named("datasets/", manifest.dataset, manifest.dataset_revision)
    for what, value in (
        ("configuration", manifest.dataset_config),
        ("split", manifest.dataset_split),
        ("column", manifest.dataset_column),
    ):
        text += f", {what} {_code(value)}" if value is not None else ""
    yield "text", text
    layers = ", ".join(map(str, store.layers))
    yield (
        "hook point",
        f"`{manifest.hook_point}`, the residual stream after a block; layers {layers} of "
        f"{manifest.model_layers}, counted from 0",
    )
    packing = {"pack": "documents are joined", "truncate": "the first tokens of each document"}
    yield (
        "contexts",
        f"{manifest.n_contexts:,} of {manifest.context_length:,} tokens, "
        + (
            "in the order of those files"
            if manifest.imported
            else f"in random order; {packing[manifest.packing]}"
        ),
    )
    yield "tokens", f"{manifest.n_contexts * manifest.context_length:,} in each layer"
    start, stop = manifest.held_out
    held_out = f"the last {stop - start:,} contexts, from {start:,} on; training never reads them"
    yield "held out", held_out if start < stop else "none"
    yield "special tokens", _special_tokens(manifest)
    if corpus := store.corpus:
        yield (
            "documents",
            f"{corpus['documents']:,}, {corpus['documents_left_out']:,} of them left out; "
            f"{corpus['duplicate_contexts']:,} contexts repeat another",
        )
    yield "type", _type(manifest)
    raw, stored = (sum(map(size, store.layers)) for size in (store.raw_bytes, store.stored_bytes))
    yield (
        "size",
        f"{quantity(stored)} for {quantity(raw)} of activations, ratio {_ratio(raw, stored)} "
        f"(codec `{manifest.codec}`)",
    )
    yield "identity", f"`{store.identity}`, the SHA-256 of `seal.json`"


def _named(kind: str, name: str, revision: str | None) -> str:
    """A model or data set with its revision; a link where it lies on the Hub."""
    at = f" at revision {_code(revision)}" if revision is not None else ""
    if _is_on_hub(name, revision):
        return f"[{_code(name)}](https://huggingface.co/{kind}{name}/tree/{revision}){at}"
    return _code(name) + at


def _is_on_hub(name: str, revision: str | None) -> bool:
    # Local files have a digest of another form in place of a commit.
    return bool(_COMMIT.fullmatch(revision or "") and _HUB_ID.fullmatch(name))


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


def _type(manifest: Manifest) -> str:
    if manifest.imported:
        return f"{manifest.dtype}, from {_code(manifest.imported.dtype)}"
    if manifest.mantissa_bits is None:
        return f"{manifest.dtype}, as the model gave it"
    return f"{manifest.dtype}, rounded to {manifest.mantissa_bits} of 7 bits of mantissa"


def _ratio(raw: int, stored: int) -> str:
    return f"{raw / max(1, stored):.3f}"


def _layers(store: ActivationStore, norms: Mapping[int, NormStats]) -> Iterator[str]:
    """A table of numbers, a line for each layer."""
    rounded = store.manifest.mantissa_bits is not None
    columns = ["layer", "raw", "stored", "ratio", "median norm", "over 10 x the median", "position R²"]
    columns += ["rounding changed"] if rounded else []
    yield _row(columns)
    yield _row(["---:"] * len(columns))
    for layer in store.layers:
        raw, stored = store.raw_bytes(layer), store.stored_bytes(layer)
        r2, error = store.position_r2(layer), store.rounding_error(layer)
        cells = [str(layer), quantity(raw), quantity(stored), _ratio(raw, stored)]
        cells += [f"{norms[layer].median:.4g}", f"{norms[layer].outlier_share:.2%}"]
        cells += [f"{max(0.0, r2):.2%}" if math.isfinite(r2) else "-"]
        yield _row([*cells, f"{error.relative:.2%}"] if error else cells)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bars(layer: int, mean_norms: NDArray[np.float64]) -> Iterator[str]:
    """Norms [positions] over whole octaves, at least four of them, so that noise does not look like much."""
    norms: list[float] = mean_norms.tolist()
    octaves = [math.log2(norm) if 0 < norm < math.inf else -math.inf for norm in norms]
    finite = [octave for octave in octaves if octave > -math.inf]
    if not finite:
        yield f"layer {layer}: no norm above 0"
        return
    top = min(math.ceil(max(finite)), 1023)
    bottom = min(math.floor(min(finite)) - 1, top - 4)
    greatest = max(range(len(norms)), key=octaves.__getitem__)
    yield f"layer {layer}: greatest {norms[greatest]:.4g}, at position {greatest}"
    lines = plot([max(0.0, octave - bottom) for octave in octaves], top=top - bottom)
    ends = {0: f"{2.0**top:.4g}", len(lines) - 1: f"{2.0**bottom:.4g}"}
    for number, line in enumerate(lines):
        yield f"{ends.get(number, ''):>9} ┤{line}".rstrip()
    yield f"{'':10} 0{len(norms) - 1:>{max(2, len(lines[0]) - 1)}}  position"


def _how_to_open(store: ActivationStore) -> str:
    n = min(8, store.manifest.n_contexts)
    layer = store.layer_or_middle(None)
    return f"""\
`STORE` stands for the folder of this store. Each way gives `activations` [contexts, positions, features] \
and `tokens` [contexts, positions]. With posae, which checks what it reads:

```sh
posae inspect-store STORE --verify
posae train STORE RUN --layer {layer}
```

```python
from posae.store import ActivationStore

store = ActivationStore.open("STORE")
activations = store.read(layer={layer}, contexts=slice(0, {n}), dtype="float32")
tokens = store.tokens(slice(0, {n}))
```

With zarr-python, which has to be told what bfloat16 is, and gives its bits:

```python
import numpy as np
import zarr
from posae.store import register_bfloat16

register_bfloat16()
group = zarr.open_group("STORE", mode="r")
bits = group["layer_{layer}"][:{n}]
activations = (bits.astype(np.uint32) << 16).view(np.float32)
tokens = group["tokens"][:{n}]
```

With tensorstore, without posae:

```python
import tensorstore

def opened(array):
    kvstore = {{"driver": "file", "path": f"STORE/{{array}}/"}}
    return tensorstore.open({{"driver": "zarr3", "kvstore": kvstore}}, read=True).result()

activations = opened("layer_{layer}")[:{n}].read().result().astype("float32")
tokens = opened("tokens")[:{n}].read().result()
```"""


def _printable(text: str) -> str:
    """The text, with a mark for each character that is not seen, such as one that turns the line around."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _code(text: str) -> str:
    """The text as a code span of Markdown, where nothing but a run of as many backticks has a meaning.

    >>> _code("a`b``c"), _code("<b>|")
    ('``` a`b``c ```', '`<b>|`')
    """
    text = _printable(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"{fence}{text}{fence}"
