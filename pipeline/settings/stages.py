"""The settings of each stage except training.

A class per stage, frozen; the string under a field is its only description, and makes the help. What
contradicts itself is refused here, before anything is loaded.
"""

from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """What all stages' settings share."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    table: ClassVar[str] = ""
    """Name of a stage's table in a TOML file."""


class HarvestSettings(Settings):
    """Settings of ``posae harvest``: what is harvested from what."""

    table: ClassVar[str] = "harvest"

    model: str = "demo"
    """Language model: a hub id, a local folder, or demo (built in)."""

    model_revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    layers: tuple[int, ...] | None = None
    """Layers to harvest, as 5,12,19; by default an early, a middle and a late one."""

    dataset: str = "stdlib"
    """Text: a hub dataset's id, a local .txt, .jsonl or .parquet file or a folder of them, or stdlib."""

    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset."""

    dataset_revision: str | None = None
    """Branch, tag or commit of a hub dataset."""

    split: str | None = None
    """Split of the dataset; by default train, and all of stdlib."""

    column: str = "text"
    """Column of the dataset that holds the text."""

    contexts: int | None = Field(default=None, ge=1)
    """How many contexts to harvest; 4,096 where neither this nor tokens is given."""

    tokens: int | None = Field(default=None, ge=1)
    """How many tokens to harvest instead, rounded up to whole contexts; BOS is counted."""

    context_length: int = Field(default=128, ge=2)
    """Tokens per context."""

    skip_contexts: int = Field(default=0, ge=0)
    """Contexts of the corpus to pass over first."""

    packing: Literal["pack", "truncate"] = "pack"
    """pack joins documents, separated by EOS; truncate takes the first tokens of each."""

    held_out: float = Field(default=0.05, ge=0, le=0.5)
    """Share of the contexts that training never reads: the last of the corpus. Of a store harvested with 0
    training still leaves out the last 5 %."""

    seed: int = Field(default=0, ge=0)
    """Seed of the permutation of contexts."""

    codec: Literal["small", "fast", "raw"] = "small"
    """Compression: small (zstd), fast (lz4), or raw (none, rows readable from the memory map)."""

    mantissa_bits: int | None = Field(default=None, ge=1, le=6)
    """Round activations to so many mantissa bits (bfloat16 has 7) before compressing them: 5 gives about 1.78
    to 1 at an error of about 0.7 %. By default nothing is lost."""

    batch_contexts: int = Field(default=32, ge=8, multiple_of=8)
    """Contexts per forward pass; part of what the bytes depend on."""

    attention: Literal["eager", "sdpa"] = "eager"
    """Attention implementation; Gemma 2 needs eager for its soft-capping."""

    device: str = "auto"
    """Device to run the model on: cuda, mps, cpu, or auto."""

    allow_versions: bool = False
    """Add layers to a store that other versions of the libraries wrote; the store records which."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.contexts is not None and self.tokens is not None:
            raise ValueError("contexts and tokens contradict each other; give one of them")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError("layers are whole numbers from 0, at least one")
        if self.mantissa_bits is not None and self.codec == "raw":
            raise ValueError(
                "mantissa_bits saves nothing with codec raw, which compresses nothing; take small"
            )
        return self

    @property
    def n_contexts(self) -> int:
        """Contexts to harvest."""
        if self.tokens is not None:
            return -(-self.tokens // self.context_length)
        return self.contexts if self.contexts is not None else 4096


class EvaluateSettings(Settings):
    """Settings of ``posae evaluate``: scores on the held-out part of a store."""

    table: ClassVar[str] = "evaluate"

    store: str | None = None
    """Store to score on, a folder or a URL: the run's own in another place, or another one, which
    evaluation.json then says; by default the one that the run was trained from."""

    contexts: int | None = Field(default=None, ge=1)
    """How many held-out contexts to read; by default all."""

    ce_loss: bool = False
    """Also run the language model on held-out contexts with reconstructions in the activations' place."""

    ce_contexts: int = Field(default=64, ge=1)
    """How many held-out contexts it runs on."""

    probing: Literal["none", "offline", "saebench"] = "none"
    """Sparse probing: offline, on tasks made from the store alone, or on SAEBench's datasets, which are
    downloaded."""

    model: str | None = None
    """Language model of the store, a hub id or a local folder; by default what the store names."""

    device: str = "auto"
    """Device to score on: cuda, cpu, or auto."""


class CopySettings(Settings):
    """Settings of ``posae copy``: what part of a store is copied; by default all of it, byte for byte."""

    table: ClassVar[str] = "copy"

    layers: tuple[int, ...] | None = None
    """Layers to copy, as 12 or 5,12."""

    contexts: str | None = Field(default=None, pattern=r"^\d+:\d+$", examples=["0:100000"])
    """Contexts to copy, as 0:100000: from the first to the one before the second."""

    fraction: float | None = Field(default=None, gt=0, le=1)
    """Instead: the first part, in whole shards; contexts are permuted, so it is a random sample."""

    codec: Literal["small", "fast", "raw"] | None = None
    """Compress anew: small (zstd), fast (lz4), or raw (none)."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.contexts is not None and self.fraction is not None:
            raise ValueError("contexts and fraction contradict each other; give one of them")
        return self


class PlantSettings(Settings):
    """Settings of ``posae plant``: a known effect of position, put into a copy of a store."""

    table: ClassVar[str] = "plant"

    effect: Literal["additive", "rotation", "none"] = "additive"
    """additive (a vector for each position), rotation (of a subspace, another one in each position range but
    the first), or none (a copy, to see what is found where nothing is)."""

    strength: float | None = Field(default=None, ge=0, le=1)
    """additive: share of the planted store's variance that the vectors have, by default 0.12. rotation: how
    far angles go, with 1 (the default) up to half a turn."""

    ranges: str = "4"
    """Position ranges of a rotation: a count of equal ones, or edges such as 0:1,1:4,4:128."""

    rank: int | None = Field(default=None, ge=1)
    """Dimensions of the random subspace in which the effect lies; by default 8 for additive and 32 for
    rotation."""

    seed: int = Field(default=0, ge=0)
    """Seed of the subspace, and of the angles."""

    layer: int | None = Field(default=None, ge=0)
    """Layer to plant into; by default all of the store."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.effect == "none" and self.strength:
            raise ValueError("effect none has no strength; leave it out")
        if self.effect != "none" and self.strength == 0:
            raise ValueError("a strength of 0 plants nothing; take effect none")
        if self.effect == "additive" and self.strength == 1:
            raise ValueError("a strength of 1 would leave nothing but the position; take one below")
        if self.effect == "rotation" and self.rank == 1:
            raise ValueError("a rotation needs a rank of at least 2")
        return self


class MergeSettings(Settings):
    """Settings of ``posae merge``: several stores made one."""

    table: ClassVar[str] = "merge"

    layers: tuple[int, ...] | None = None
    """Layers to take, as 5,12,19; by default all, and then every store must have the same."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError("layers are whole numbers from 0, at least one")
        return self


class ImportSettings(Settings):
    """Settings of ``posae import``: activations of another program made a store."""

    table: ClassVar[str] = "import"

    layer: int | None = Field(default=None, ge=0)
    """Layer that the activations are of; by default what the files say, if they do."""

    tensor: str | None = None
    """Name of the tensor, or column, of activations, where a file has several."""

    context_length: int | None = Field(default=None, ge=2)
    """Rows per context, where the files have rows and no contexts; by default 128."""

    positions: bool | None = None
    """Whether a context's rows are the tokens of one context of the model, in order, so that their positions
    are known; by default so of activations with three axes, and not of rows."""

    model: str = Field(default="unknown", min_length=1)
    """Language model that they come from, shown in reports."""

    special_token_ids: tuple[int, ...] | None = None
    """Ids of special tokens (BOS, EOS …), as 0,1,2; training leaves them out."""

    held_out: float = Field(default=0.05, ge=0, le=0.5)
    """Share of the contexts that training never reads: the last."""

    codec: Literal["small", "fast", "raw"] = "small"
    """Compression: small (zstd), fast (lz4), or raw (none, rows readable from the memory map)."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.special_token_ids and not all(0 <= found < 2**31 - 1 for found in self.special_token_ids):
            raise ValueError("special token ids are whole numbers from 0 to 2^31 - 2")
        if not self.model.isprintable() or len(self.model) > 200:
            raise ValueError("a model is named in one printable line")
        return self


class ImportSaeSettings(Settings):
    """Settings of ``posae import-sae``: an autoencoder of another program made a run."""

    table: ClassVar[str] = "import-sae"

    layer: int | None = Field(default=None, ge=0)
    """Layer that it was trained on; by default what it says itself."""

    ranges: str | None = None
    """Position ranges that it is scored by: a count of equal ones, or edges such as 0:1,1:4,4:128. By
    default 4."""

    special_tokens: bool = False
    """Score special tokens (BOS, EOS …) as all others."""
