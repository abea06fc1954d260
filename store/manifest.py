"""The manifest: settings and sources of a store, in the attributes of its root ``zarr.json``.

It holds everything that the bytes of a store depend on, and nothing that differs between two harvests with
the same options: no time, host, user or absolute path. It never changes after the tokens are committed;
layers and committed contexts are read from the files. docs/format.md is normative for its keys; a test
compares the two.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from .codecs import CODECS
from .errors import StoreFormatError
from .layout import FORMAT, MAX_SHARDS, ArraySpec, Json, refuse_newer
from .rounding import MANTISSA_BITS

_ADDED = {"mantissa_bits": None, "byte_counts": False, "planted": None, "origin": None, "imported": None}
"""Keys that the first stores lack, with the values that their absence means; such values are not written."""

MAX_TEXT = 4096
MAX_LAYERS = 2**16
MAX_PIECES = 8192

# No control characters: these strings are printed on terminals.
Text = Annotated[str, Field(max_length=MAX_TEXT, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Count = Annotated[int, Field(ge=0, lt=2**48, strict=True)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Versions = Annotated[dict[Annotated[str, Field(max_length=MAX_TEXT)], Text], Field(max_length=64)]
Interval = Annotated[str, Field(pattern=r"^[0-9]{1,14}:[0-9]{1,14}$")]


_LAYER = re.compile(r"layer_(0|[1-9][0-9]{0,5})", re.ASCII)
_VERSIONS = TypeAdapter[dict[str, str]](Versions)


class Origin(BaseModel):
    """The pieces of other stores that a store consists of, in order along axis 0."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    stores: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MAX_PIECES)]
    """Identity of the store that each piece was taken from."""

    contexts: Annotated[tuple[Interval, ...], Field(min_length=1, max_length=MAX_PIECES)]
    """Contexts of that store which each piece is, as ``0:512``."""

    corpus: Annotated[tuple[Interval, ...], Field(min_length=1, max_length=MAX_PIECES)]
    """Contexts of the corpus that the pieces' stores were harvested from, in rising order."""


class Imported(BaseModel):
    """The files of another program that a store was imported from, and what is not known about them."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    kind: Text
    """Kind of the files: ``saelens``, ``safetensors``, ``npy`` or ``pt``."""

    dtype: Text
    """Type of the values in the files, before conversion to bfloat16."""

    unknown: Annotated[tuple[Text, ...], Field(max_length=64)]
    """What is not known: of ``documents``, ``model``, ``positions``, ``special_tokens``, ``tokens``."""


class Manifest(BaseModel):
    """The model, the text and the settings of a harvest."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT, strict=True)] = FORMAT
    """Version of the store's format."""

    model: Text
    """Language model: hub id, base name of a local folder, or ``demo``."""

    model_revision: Text | None
    """Commit on the hub, or a digest of the local files."""

    model_config_hash: Text
    """Digest of the model's configuration."""

    model_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS, strict=True)]
    """Blocks of the language model."""

    d_model: Annotated[int, Field(ge=1, lt=2**24, strict=True)]
    """Width of the residual stream."""

    dtype: Literal["bfloat16"] = "bfloat16"
    """Type in which the model ran and the activations are kept."""

    hook_point: Literal["resid_post"] = "resid_post"
    """Where in a block activations are read: ``resid_post``, the residual stream after it."""

    attention: Text
    """Attention implementation of transformers: ``eager``, ``sdpa``, …"""

    device: Text
    """Kind of device that the model ran on: ``cpu``, ``cuda``, ``mps``."""

    batch_contexts: Annotated[int, Field(ge=1, lt=2**24, strict=True)]
    """Contexts per forward pass; each shard starts a new batch."""

    n_contexts: Annotated[int, Field(ge=1, lt=2**48, strict=True)]
    """Contexts planned: axis 0 of every layer."""

    context_length: Annotated[int, Field(ge=2, lt=2**24, strict=True)]
    """Tokens per context, L: axis 1 of every layer."""

    skip_contexts: Count
    """Contexts of the corpus skipped before the first one taken."""

    held_out: tuple[Count, Count]
    """Contexts [start, stop) at the end of axis 0 that training never reads."""

    packing: Literal["pack", "truncate"]
    """``pack``: documents joined; ``truncate``: the first L tokens of each."""

    dataset: Text
    """Dataset: hub id, base name of a local file or folder, or ``stdlib``."""

    dataset_revision: Text | None
    """Commit on the hub, or a digest of the local files."""

    dataset_config: Text | None
    """Configuration (subset) of a hub dataset."""

    dataset_split: Text | None
    """Split of the dataset."""

    dataset_column: Text | None
    """Column that holds the text."""

    tokenizer_hash: Text
    """Digest of the tokenizer."""

    first_token: TokenId | None
    """Id that every context begins with: BOS, else CLS, else none."""

    separator_token: TokenId | None
    """Id between packed documents: EOS where there is one."""

    special_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=65536)]
    """Ids that readers leave out on request, and training by default."""

    vocabulary_size: Annotated[int, Field(ge=1, lt=2**31, strict=True)]
    """Token ids are below this."""

    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)]
    """Seed of the permutation of contexts."""

    codec: Literal["small", "fast", "raw"]
    """Preset of the layer arrays."""

    mantissa_bits: Annotated[int, Field(ge=1, lt=MANTISSA_BITS, strict=True)] | None = None
    """Mantissa bits that activations were rounded to; None: stored as the model gave them."""

    byte_counts: Annotated[bool, Field(strict=True)] = False
    """Whether ``stats/layer_N/byte_counts`` is kept."""

    planted: (
        Annotated[dict[Annotated[str, Field(max_length=MAX_TEXT)], Text], Field(max_length=64)] | None
    ) = None
    """The effect planted into the activations, also named in ``model``; None: none."""

    origin: Origin | None = None
    """The pieces of other stores that this one consists of; None: it was harvested."""

    imported: Imported | None = None
    """What is known about imported activations; None: they were harvested."""

    chunk_contexts: Annotated[int, Field(ge=1, lt=2**20, strict=True)]
    """Contexts per chunk."""

    shard_contexts: Annotated[int, Field(ge=1, lt=2**30, strict=True)]
    """Contexts per shard."""

    versions: Versions
    """Versions of the libraries that bytes depend on."""

    @model_validator(mode="after")
    def _agree(self) -> "Manifest":
        start, stop = self.held_out
        if not 0 < start <= stop == self.n_contexts:
            raise ValueError("held_out must be the last contexts, and not all of them")
        if self.shard_contexts % self.chunk_contexts:
            raise ValueError("a shard must be whole chunks")
        if self.n_shards > MAX_SHARDS:
            raise ValueError(f"more than {MAX_SHARDS:,} shards")
        return self

    @property
    def language_model(self) -> str:
        """The language model: ``model`` without the planted effect."""
        return (self.planted or {}).get("model", self.model)

    @property
    def unknown(self) -> tuple[str, ...]:
        """What is not known about imported activations; empty for a harvest."""
        return self.imported.unknown if self.imported else ()

    @property
    def corpus_contexts(self) -> list[range]:
        """The contexts of the corpus that include the store's; exactly these, unless it is a part."""
        if self.origin is None:
            return [range(self.skip_contexts, self.skip_contexts + self.n_contexts)]
        return [range(*map(int, interval.split(":"))) for interval in self.origin.corpus]

    @property
    def n_shards(self) -> int:
        """Shards of every layer."""
        return -(-self.n_contexts // self.shard_contexts)

    def contexts_of(self, shard: int) -> range:
        """The contexts of ``shard``."""
        start = shard * self.shard_contexts
        return range(start, min(start + self.shard_contexts, self.n_contexts))


def parse_manifest(root: Json) -> Manifest:
    """The manifest in a root ``zarr.json``.

    Raises:
        StoreFormatError: not a store of posae, one of a newer format, or an incomplete manifest.
    """
    attributes = root.get("attributes")
    found = cast("Json", attributes).get("posae") if isinstance(attributes, dict) else None
    named = root.get("zarr_format") == 3 and root.keys() == {"zarr_format", "node_type", "attributes"}
    if not isinstance(found, dict) or not named or root.get("node_type") != "group":
        raise StoreFormatError(
            "this is a Zarr group, not a store of posae: zarr.json has no manifest; read it with zarr-python"
        )
    versions = cast("Json", found).get("versions")
    written_by = cast("Json", versions).get("posae") if isinstance(versions, dict) else None
    refuse_newer(cast("Json", found).get("format"), written_by)
    missing = Manifest.model_fields.keys() - _ADDED.keys() - cast("Json", found).keys()
    if missing:
        raise StoreFormatError(
            f"the manifest in zarr.json lacks {', '.join(sorted(missing))}; "
            "restore it from a copy of the store"
        )
    try:
        return Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        # The key only: deeper places may contain hostile text.
        place = next((str(part) for part in first["loc"]), "manifest")
        raise StoreFormatError(
            f"the manifest in zarr.json is invalid: {place}: {first['msg']}; "
            "restore it from a copy of the store"
        ) from None


def parse_corpus(group: Json) -> Json:
    """The counts of the corpus in ``stats/zarr.json``; empty where there are none.

    Raises:
        StoreFormatError: not counts.
    """
    try:
        corpus: Json = group["attributes"].get("posae", {})
        if corpus:
            counts = [corpus[name] for name in ("documents", "documents_left_out", "duplicate_contexts")]
            counts += corpus["special_tokens"].values()
            if any(type(count) is not int or not 0 <= count < 2**63 for count in counts):
                raise ValueError("not counts")
            # They are printed.
            if not all(token.isascii() and token.isdecimal() for token in corpus["special_tokens"]):
                raise ValueError("not token ids")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise StoreFormatError(
            "stats/zarr.json does not hold the counts of a corpus; restore it from a copy of the store"
        ) from None
    return corpus


def parse_layer_versions(group: Json) -> dict[str, str]:
    """Versions that wrote a layer, where they differ from the manifest's, from ``stats/layer_N/zarr.json``.

    Raises:
        StoreFormatError: not versions.
    """
    try:
        return _VERSIONS.validate_python(group["attributes"].get("posae", {}).get("versions", {}))
    except (KeyError, AttributeError, ValidationError):
        raise StoreFormatError(
            "the zarr.json of a layer's statistics names no versions; restore it from a copy of the store"
        ) from None


def root_json(manifest: Manifest) -> Json:
    """The root ``zarr.json``."""
    written = manifest.model_dump(mode="json")
    return group_json({"posae": {k: v for k, v in written.items() if k not in _ADDED or v != _ADDED[k]}})


def group_json(attributes: Json) -> Json:
    """The ``zarr.json`` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def layer_path(layer: int) -> str:
    """Name of a layer's array."""
    return f"layer_{layer}"


def layers_in(names: Iterable[str], manifest: Manifest) -> tuple[int, ...]:
    """The layers whose folders are among ``names``, sorted."""
    numbers = (int(found[1]) for name in names if (found := _LAYER.fullmatch(name)))
    return tuple(sorted(layer for layer in numbers if layer < manifest.model_layers))


def layer_spec(manifest: Manifest, layer: int) -> ArraySpec:
    """The array of one layer; bfloat16 [contexts, positions, d_model]."""
    return ArraySpec(
        path=layer_path(layer),
        shape=(manifest.n_contexts, manifest.context_length, manifest.d_model),
        data_type="bfloat16",
        chunk_rows=manifest.chunk_contexts,
        shard_rows=manifest.shard_contexts,
        dimension_names=("context", "position", "feature"),
        codec=CODECS[manifest.codec],
        attributes={"layer": layer, "hook_point": manifest.hook_point, "codec": manifest.codec},
    )


def token_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """The arrays beside the layers: ``tokens``, ``document``, ``position``."""

    def by_context(path: str, data_type: str) -> ArraySpec:
        return ArraySpec(
            path=path,
            shape=(manifest.n_contexts, manifest.context_length),
            data_type=data_type,
            chunk_rows=manifest.chunk_contexts,
            shard_rows=manifest.shard_contexts,
            dimension_names=("context", "position"),
        )

    length = manifest.context_length
    position = ArraySpec(
        path="position",
        shape=(length,),
        data_type="int32",
        chunk_rows=length,
        shard_rows=length,
        dimension_names=("position",),
    )
    return {
        "tokens": by_context("tokens", "int32"),
        "document": by_context("document", "int64"),
        "position": position,
    }
