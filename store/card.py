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
from .facts import facts, is_on_hub, layer_sizes
from .files import StoreFiles
from .manifest import Manifest
from .plain_text import plot, printable
from .readable import ReadableFiles
from .reader import ActivationStore
from .seal import CARD_PATH
from .stats import NormStats

MAX_CARD_BYTES = 1 << 20
_CATEGORIES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")

_MARK = "<!-- posae wrote this card and renews it with the seal. Once edited it is yours. %s -->\n"
_LAST_LINE = re.compile(re.escape(_MARK).replace("%s", "([0-9a-f]{64})").encode())


def write_card(store: ActivationStore) -> None:
    """Write the card if there is none, or only one that posae wrote for an earlier seal.

    Raises:
        StoreDamagedError: the statistics are not what was written.
        StoreWriteError: the disk refused.
    """
    try:
        existing = read_card(store.files)
    except StoreDamagedError:
        return  # a link, a folder, or longer than any card: not ours
    if existing is None or (is_ours(existing) and str(store.identity).encode() not in existing):
        assert isinstance(store.files, StoreFiles)
        store.files.write(CARD_PATH, card(store).encode())


def read_card(files: ReadableFiles) -> bytes | None:
    """The card of a store; None if there is none.

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
        *([_IMPORTED] if manifest.imported else []),
        "\n".join(f"- **{name}**: {line}" for name, line in facts(store, _code, linked=True).items()),
        "## Layers",
        "\n".join(_layers(store, norms)),
        "Above 10x the median: the share of tokens with such a norm. Position R²: the share of the variance "
        "that position alone explains, estimated on a sample.",
        "## Norms by position",
        "Mean norm of all tokens at each position, on a logarithmic scale; a bar over several positions is "
        "their maximum. A position far above all others is an attention sink.",
        "```\n" + "\n\n".join("\n".join(_bars(layer, norms[layer].mean)) for layer in norms) + "\n```",
        "## How to open it",
        _how_to_open(store),
        "## Licences",
        _LICENCES,
    ]
    text = "\n\n".join(parts) + "\n\n"
    return text + _MARK % hashlib.sha256(text.encode()).hexdigest()


_PLANTED = (
    "**These activations were modified.** An effect of position was planted into them on purpose, to test "
    "whether a method finds it."
)
_IMPORTED = "**These activations were imported** from files of another program."

_LICENCES = """\
To be filled in by the owner, here and at `license` at the top. Activations come from a model and from text; \
the licences of both bind anyone who shares them.

- licence of the model:
- licence of the text:
- licence of this store:"""


def _metadata(manifest: Manifest) -> str:
    """What the Hub reads: YAML, with every string of the store as a JSON string, which YAML is a form of."""
    reached = [name for power, name in enumerate(_CATEGORIES, 3) if manifest.n_contexts >= 10**power]
    if not reached:
        size = f"n<{_CATEGORIES[0]}"
    elif len(reached) == len(_CATEGORIES):
        size = f"n>{_CATEGORIES[-1]}"
    else:
        size = f"{reached[-1]}<n<{_CATEGORIES[len(reached)]}"
    name = f"Activations of {printable(manifest.model)} on {printable(manifest.dataset)}"
    lines = [
        "---",
        f"pretty_name: {json.dumps(name, ensure_ascii=False)}",
        "license: unknown  # to be filled in by the owner: see Licences below",
        "tags: [activations, interpretability, sparse-autoencoder, zarr, posae]",
        f'size_categories: ["{size}"]',
    ]
    if is_on_hub(manifest.dataset, manifest.dataset_revision):
        lines.append(f"source_datasets: [{json.dumps(manifest.dataset)}]")
    # The Hub would show zarr.json as a table.
    return "\n".join([*lines, "viewer: false", "---"])


def _layers(store: ActivationStore, norms: Mapping[int, NormStats]) -> Iterator[str]:
    """A table of numbers, a line for each layer."""
    rounded = store.manifest.mantissa_bits is not None
    names, *sizes = layer_sizes(store)
    names = [*names, "median norm", "above 10x the median", "position R²"]
    names += ["rounding changed"] if rounded else []
    yield _row(names)
    yield _row(["---:"] * len(names))
    for layer, cells in zip(store.layers, sizes, strict=True):
        r2, error = store.position_r2(layer), store.rounding_error(layer)
        cells = [*cells, f"{norms[layer].median:.4g}", f"{norms[layer].outlier_share:.2%}"]
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
    yield f"layer {layer}: maximum {norms[greatest]:.4g}, at position {greatest}"
    lines = plot([max(0.0, octave - bottom) for octave in octaves], top=top - bottom)
    ends = {0: f"{2.0**top:.4g}", len(lines) - 1: f"{2.0**bottom:.4g}"}
    for number, line in enumerate(lines):
        yield f"{ends.get(number, ''):>9} ┤{line}".rstrip()
    yield f"{'':10} 0{len(norms) - 1:>{max(2, len(lines[0]) - 1)}}  position"


def _how_to_open(store: ActivationStore) -> str:
    n = min(8, store.manifest.n_contexts)
    layer = store.layer_or_middle(None)
    return f"""\
`STORE` stands for the folder of this store. Each returns `activations` [contexts, positions, features] \
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

With zarr-python, which needs bfloat16 registered and returns its bits:

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


def _code(text: str) -> str:
    """The text as a code span of Markdown, where nothing but a run of as many backticks has a meaning.

    >>> _code("a`b``c"), _code("<b>|")
    ('``` a`b``c ```', '`<b>|`')
    """
    text = printable(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"{fence}{text}{fence}"
