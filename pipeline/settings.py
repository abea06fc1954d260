"""The settings of each stage: one declaration makes an option, a key of a TOML file and its help.

A class per stage, frozen; the string under a field is its only description. Values come, later
ones first, from: default < preset < TOML file < option. What contradicts itself is refused here,
before anything is loaded. No torch: ``posae --help`` stays quick.
"""

import math
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..store.errors import SettingsError


class Settings(BaseModel):
    """What all stages' settings share."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class HarvestSettings(Settings):
    """Settings of ``posae harvest``: what is harvested from what."""

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
    """Tokens to a context."""

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
    """Contexts to a forward pass; part of what the bytes depend on."""

    attention: Literal["eager", "sdpa"] = "eager"
    """Attention implementation; Gemma 2 needs eager for its soft-capping."""

    device: str = "auto"
    """Device to run the model on: cuda, mps, cpu, or auto."""

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


class TrainSettings(Settings):
    """Settings of ``posae train``: one autoencoder on one layer of a store."""

    layer: int | None = Field(default=None, ge=0)
    """Layer to train on; by default the middle one of the store."""

    architecture: Literal[
        "standard", "hierarchical", "topk", "batchtopk", "jumprelu", "masked", "separate"
    ] = "hierarchical"
    """standard (ReLU and L1), topk or batchtopk (the largest activations of a token or of a batch), jumprelu
    (a threshold for each feature), hierarchical (the paper's adapters by position range), or what the paper
    calls failed: masked (features for some positions only), separate (an encoder for each range)."""

    dictionary_size: int | None = Field(default=None, ge=1)
    """Features; by default as many as the model is wide, as in the paper, and 8 times as many for topk,
    batchtopk and jumprelu."""

    position_mean: str = "none"
    """What is taken from activations by their position before encoding, and added back after decoding, from
    the store's own means: none, range, exact, or lowrank:16 (any rank)."""

    position_adapter: str = "none"
    """What is learned for each position range besides, with any architecture: none, or some of bias, gate,
    table and decoder:8 (any rank), joined by +."""

    shared_adapters: bool = False
    """Give all ranges the same adapters (mask, encoder): a control, which cannot know the position."""

    shuffle_positions: bool = False
    """Give each token the position of another while training: a control, to which position tells nothing."""

    target_l0: int = Field(default=32, ge=1)
    """Features active on a token with topk, and on average with batchtopk and jumprelu."""

    l0_coefficient: float = Field(default=1.0, ge=0)
    """How strongly jumprelu is pulled to that."""

    bandwidth: float = Field(default=0.03, gt=0)
    """How wide jumprelu's step is for its gradient, as a share of sqrt(d_model)."""

    auxiliary_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of the loss that brings dead features back, with topk, batchtopk and jumprelu."""

    dead_after_tokens: int = Field(default=1_000_000, ge=1)
    """A feature silent for so many training tokens counts as dead."""

    ranges: str = "4"
    """Position ranges: a count of equal ones, or edges such as 0:1,1:4,4:128."""

    steps: int = Field(default=10_000, ge=1)
    """Updates of the weights."""

    batch_size: int = Field(default=2048, ge=1)
    """Tokens to a batch; batches of one window differ by at most one from their mean."""

    window_contexts: int = Field(default=2048, ge=8, multiple_of=8)
    """Contexts decoded at once, among which tokens are shuffled; two windows lie in memory."""

    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps with the base alone (alpha 0); by default the share below."""

    warmup_share: float = Field(default=0.1, ge=0, le=1)
    """The same as a share of the steps, rounded down; warmup_steps wins over it."""

    ramp_steps: int | None = Field(default=None, ge=1)
    """Steps over which alpha then rises to 1, and stays there; by default the rest."""

    ramp_share: float | None = Field(default=None, gt=0, le=1)
    """Instead of ramp_steps: a share of the steps, rounded down."""

    curriculum: Literal["linear", "cosine", "step", "plateau"] = "linear"
    """How alpha rises: in a line, as half a cosine, at once when the warm-up ends, or in a line that begins
    when the loss falls no more (then ramp_steps is a fifth of the steps by default)."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of AdamW; by default 3e-4, as in the paper, and 8e-4 · sqrt(16384 / dictionary size) for
    topk and batchtopk."""

    learning_rate_warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""

    learning_rate_decay: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps, the last, over which it falls to 0."""

    weight_decay: float = Field(default=1e-2, ge=0)
    """Weight decay of AdamW, on every parameter; with 0 it is Adam."""

    clip_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""

    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of the products; weights and sums are float32. tf32: on NVIDIA GPUs. bfloat16: torch's autocast;
    topk and batchtopk become slower by it on a CPU, as codes are dense then."""

    l1_coefficient: float = Field(default=0.04, ge=0)
    """Weight of the L1 norm of the code in the loss, lambda."""

    sparsity_warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps over which the penalty for density rises from 0; topk and batchtopk have none."""

    reconstruction_loss: Literal["squared", "norm"] = "squared"
    """squared norm of each token's error, as in the paper, or the norm itself, as in its scripts."""

    activation_scale: Literal["rms", "none"] = "rms"
    """rms scales activations to a root mean square norm of sqrt(d_model); none leaves them."""

    adapter_width: int | None = Field(default=None, ge=1)
    """Hidden width of each range's adapter; by default half the model's width, as in the paper."""

    adapter_share: float | None = Field(default=None, gt=0)
    """Instead of adapter_width: parameters that hierarchical's adapters add, as a share of the others."""

    adapter_gain: float = 1.0
    """Initial gain of the adapters' layer norm; narrow adapters need 0."""

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on the output of hierarchical's adapters."""

    layer_norm: Literal["both", "base", "adapter", "none"] = "both"
    """Where hierarchical has a layer norm."""

    layer_norm_affine: bool = True
    """Give layer norms a gain and a bias."""

    adapter_norm: Literal["after", "before"] = "after"
    """Whether an adapter's layer norm comes after it, as in the paper, or before, as in its scripts."""

    residual: bool = True
    """Add adapters to the base code; without, they replace it as alpha rises."""

    rectify: bool = False
    """Put a ReLU after hierarchical's adapters, so that no activation is negative."""

    penalty: Literal["text", "code", "base"] = "text"
    """What lambda is put on in hierarchical: the base code and what adapters change, as in the paper's text,
    the code that is decoded, or the base code alone, as in its scripts."""

    base_loss_coefficient: float = Field(default=0.0, ge=0)
    """Weight of a further loss of what hierarchical's base code alone reconstructs."""

    decoder_bias: bool = False
    """Give hierarchical a decoder bias; all others have one."""

    decoder_norm: Literal["features", "outputs"] = "features"
    """Keep the norm of each feature's direction at 1, or of each output's weights: the wrong axis, as in the
    paper's scripts."""

    project_gradient: bool = False
    """Leave out of the decoder's gradient what would change these norms."""

    mask: Literal["hard", "gaussian"] = "hard"
    """Which features a position may use with masked: those of its range, or weights that fall off over 1/8
    of the context."""

    mask_schedule: Literal["fixed", "curriculum"] = "fixed"
    """Whether the mask is there from the start, or comes in with alpha."""

    special_tokens: bool = False
    """Train on BOS and other special tokens too."""

    seed: int = Field(default=0, ge=0)
    """Seed of initialisation and dropout."""

    data_seed: int = Field(default=0, ge=0)
    """Seed of the order of tokens."""

    log_steps: int = Field(default=50, ge=1)
    """A line of metrics every so many steps."""

    checkpoint_steps: int = Field(default=1000, ge=1)
    """A checkpoint to resume from every so many steps."""

    device: str = "auto"
    """Device to train on: cuda, mps, cpu, or auto."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        warmup, ramp = self.warmup_steps, self.ramp_steps
        if warmup is not None and warmup > self.steps:
            raise ValueError(f"warmup_steps {warmup} does not fit into {self.steps} steps")
        if warmup is not None and ramp is not None and warmup + ramp > self.steps:
            raise ValueError(
                f"warmup_steps {warmup} and ramp_steps {ramp} do not fit into {self.steps} steps"
            )
        if warmup is None and ramp is not None and ramp > self.steps:
            raise ValueError(f"ramp_steps {ramp} does not fit into {self.steps} steps")
        if self.ramp_share is not None:
            if ramp is not None:
                raise ValueError("ramp_steps and ramp_share contradict each other; give one of them")
            share = self.warmup_share if warmup is None else warmup / self.steps
            if share + self.ramp_share > 1 + 1e-9:
                raise ValueError(
                    f"a warm-up of {share:g} of the steps and a ramp_share of {self.ramp_share:g} exceed 1"
                )
        if self.adapter_width is not None and self.adapter_share is not None:
            raise ValueError("adapter_width and adapter_share contradict each other; give one of them")
        if self.curriculum == "step" and (ramp is not None or self.ramp_share is not None):
            raise ValueError("curriculum step has no ramp; leave ramp_steps out, or take linear")
        if self.sparsity_warmup and self.architecture in ("topk", "batchtopk"):
            raise ValueError(
                f"sparsity_warmup means nothing to {self.architecture}, whose L0 is set; leave it out"
            )
        if self.learning_rate_warmup + self.learning_rate_decay > 1:
            raise ValueError(
                "learning_rate_warmup and learning_rate_decay are shares of the same steps; above 1"
            )
        return self


class EvaluateSettings(Settings):
    """Settings of ``posae evaluate``: scores on the held-out part of a store."""

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
    """Device to score on: cuda, mps, cpu, or auto."""


class CopySettings(Settings):
    """Settings of ``posae copy``: what part of a store is copied; by default all of it, byte for byte."""

    layers: tuple[int, ...] | None = None
    """Layers to copy, as 12 or 5,12."""

    contexts: str | None = Field(default=None, pattern=r"^\d+:\d+$")
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

    layers: tuple[int, ...] | None = None
    """Layers to take, as 5,12,19; by default all, and then every store must have the same."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError("layers are whole numbers from 0, at least one")
        return self


class ImportSettings(Settings):
    """Settings of ``posae import``: activations of another program made a store."""

    layer: int | None = Field(default=None, ge=0)
    """Layer that the activations are of; by default what the files say, if they do."""

    tensor: str | None = None
    """Name of the tensor, or column, of activations, where a file has several."""

    context_length: int | None = Field(default=None, ge=2)
    """Rows to a context, where the files have rows and no contexts; by default 128."""

    positions: bool | None = None
    """Whether a context's rows are the tokens of one context of the model, in order, so that their positions
    are known; by default so of activations with three axes, and not of rows."""

    model: str = Field(default="unknown", min_length=1)
    """Language model that they are of, for people to read."""

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

    layer: int | None = Field(default=None, ge=0)
    """Layer that it was trained on; by default what it says itself."""

    ranges: str | None = None
    """Position ranges that it is scored by: a count of equal ones, or edges such as 0:1,1:4,4:128. By
    default 4."""

    special_tokens: bool = False
    """Score special tokens (BOS, EOS …) as all others."""


PILE = {"dataset": "monology/pile-uncopyrighted", "attention": "eager"}

HARVEST_PRESETS: dict[str, dict[str, Any]] = {
    "gemma-2-2b": {"model": "google/gemma-2-2b", "layers": (5, 12, 19), **PILE},
    "gemma-2b": {"model": "google/gemma-2b", "layers": (3, 8, 13), **PILE},
}
"""``gemma-2-2b`` is the paper's setting: it says "Gemma-2B", but its width and layers are Gemma-2-2B's."""

PAPER = {
    "steps": 10_000,
    "batch_size": 2048,
    "learning_rate": 3e-4,
    "weight_decay": 1e-2,
    "clip_norm": 1.0,
    "l1_coefficient": 0.04,
}

TOPK = {
    "batch_size": 2048,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "learning_rate_warmup": 0.05,
    "learning_rate_decay": 0.2,
}

JUMPRELU = {**TOPK, "sparsity_warmup": 0.2}

HIERARCHICAL = {"architecture": "hierarchical", "ranges": "4", "dropout": 0.1, **PAPER}

PUBLISHED_CODE = {
    **HIERARCHICAL,
    "steps": 11_000,
    "warmup_share": 1 / 11,
    "learning_rate": 3e-5,
    "learning_rate_warmup": 1 / 11,
    "weight_decay": 0.0,
    "reconstruction_loss": "norm",
    "penalty": "base",
    "adapter_norm": "before",
    "decoder_bias": True,
    "decoder_norm": "outputs",
    "project_gradient": True,
    "activation_scale": "none",
    "special_tokens": True,
}

TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "paper": HIERARCHICAL,
    "paper-15pct": {**HIERARCHICAL, "adapter_share": 0.15, "adapter_gain": 0.0},
    "published-code": PUBLISHED_CODE,
    "paper-baseline": {"architecture": "standard", **PAPER},
    "topk": {"architecture": "topk", **TOPK},
    "batchtopk": {"architecture": "batchtopk", **TOPK},
    "jumprelu": {"architecture": "jumprelu", **JUMPRELU},
    "hard-mask": {"architecture": "masked", "mask": "hard", **PAPER},
    "gaussian-mask": {"architecture": "masked", "mask": "gaussian", **PAPER},
    "mask-schedule": {"architecture": "masked", "mask_schedule": "curriculum", **PAPER},
    "separate-encoders": {"architecture": "separate", **PAPER},
    "posae": {"architecture": "batchtopk", "position_mean": "lowrank:16", **TOPK},
}
"""``paper``: the text, to the letter. ``paper-15pct``: adapters as narrow as the 15 % that it claims.
``published-code``: what its scripts would have trained, with true positions. ``paper-baseline``: its settings
without adapters or layer norm. ``hard-mask`` to ``separate-encoders``: what it calls its failed approaches.
``posae``: what measurement favours so far, BatchTopK on activations less their position's mean. ``topk``,
``batchtopk``, ``jumprelu``: without position, to compare with."""

BEST_PRACTICE = {
    "hierarchical": "paper",
    "standard": "paper-baseline",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "jumprelu": "jumprelu",
    "masked": "hard-mask",
    "separate": "separate-encoders",
}
"""What ``--architecture X`` alone takes its settings from."""

Stage = TypeVar("Stage", bound=Settings)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at what ``word`` may have been meant to be, or at all there is."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"


def resolve_settings(
    stage: type[Stage],
    table: str,
    *,
    presets: Mapping[str, Mapping[str, Any]],
    preset: str | None = None,
    config: Path | None = None,
    options: Mapping[str, Any],
) -> Stage:
    """Settings of one stage: default < preset < TOML file < option.

    Args:
        stage: the settings class.
        table: name of the stage's table in the file.
        presets: presets by name.
        preset: one of them; a file's key ``preset`` counts where this is None.
        config: TOML file.
        options: what was given on the command line; None means not given.

    Raises:
        SettingsError: unknown key or preset, a value out of bounds, or a contradiction.
    """
    given = {name: value for name, value in options.items() if value is not None}
    from_file = read_config(config, table) if config else {}
    preset = preset if preset is not None else from_file.pop("preset", None)
    from_file.pop("preset", None)
    if preset is None and stage is TrainSettings:
        preset = BEST_PRACTICE.get(str(given.get("architecture", from_file.get("architecture", ""))), "paper")
    if preset is not None and str(preset) not in presets:
        raise SettingsError(f"there is no preset {preset!r}; {nearest(str(preset), presets)}")
    base = dict(presets[preset]) if preset is not None else {}
    wanted = {**from_file, **given}
    if "architecture" in base and wanted.get("architecture", base["architecture"]) != base["architecture"]:
        raise SettingsError(
            f"preset {preset!r} is of architecture {base['architecture']!r}, and "
            f"{wanted['architecture']!r} was asked for; leave one of them out"
        )
    return build(stage, {**base, **wanted}, place=f"[{table}]")


def train_words(trained: Mapping[str, Any], d_model: int) -> list[str] | None:
    """Words after ``posae train STORE RUN`` that give these settings again.

    The preset that leaves the fewest options to name; what the trainer fills in by itself is left out.

    Args:
        trained: all settings of a run, as its ``config.json`` has them; of one that an older posae did not
            have, its default.
        d_model: width of the activations that it was trained on.

    Returns:
        The words, or None where no words give them, or a setting is unknown.
    """
    defaults = {name: field.default for name, field in TrainSettings.model_fields.items()}
    if trained.keys() - defaults:
        return None
    wanted = defaults | dict(trained)
    found: list[list[str]] = []
    for name, values in TRAIN_PRESETS.items():
        preset = defaults | values
        differ = [
            key
            for key in wanted
            if wanted[key] != preset[key] and not _is_filled_in(key, wanted, preset, d_model)
        ]
        if wanted["architecture"] == preset["architecture"] and all(
            wanted[key] is not None for key in differ
        ):
            words = [word for key in differ for word in _option(key, wanted[key])]
            found.append(["--preset", name, *words])
    return min(found, key=len, default=None)


def _is_filled_in(name: str, wanted: Mapping[str, Any], preset: Mapping[str, Any], d_model: int) -> bool:
    """Whether the trainer gives a setting the wanted value where none is named."""
    if preset[name] is not None:
        return False
    if name == "adapter_width":
        return preset["adapter_share"] is None and wanted[name] == max(1, d_model // 2)
    steps, warmup, ramp = (wanted[key] or 0 for key in ("steps", "warmup_steps", "ramp_steps"))
    is_usual_ramp = wanted["curriculum"] != "plateau" and ramp == max(1, steps - warmup)
    if name == "warmup_steps":  # where a ramp is named, the warm-up is what is left
        return is_usual_ramp and warmup == math.floor(steps * wanted["warmup_share"] + 1e-6)
    return name == "ramp_steps" and is_usual_ramp


def _option(name: str, value: Any) -> list[str]:
    """One setting as it is written on the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{flag}"]
    return [f"--{flag}", str(value)]


def build(stage: type[Stage], values: Mapping[str, Any], place: str) -> Stage:
    """The settings of these values.

    Raises:
        SettingsError: one clear line for the first thing that is wrong.
    """
    for name in values:
        if name not in stage.model_fields:
            hint = nearest(name, stage.model_fields)
            raise SettingsError(f"{place} has no setting {name!r}; {hint}")
    try:
        return stage.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise SettingsError(f"{name}: {message}, got {first['input']!r}" if name else message) from None


def read_config(path: Path, table: str) -> dict[str, Any]:
    """One table of a TOML file.

    Raises:
        SettingsError: no such file, no TOML, or tables that posae does not have.
    """
    tables = ("harvest", "train", "evaluate", "plant", "merge", "import", "import-sae")
    parsed = read_toml(path)
    for name in parsed:
        if name not in tables:
            raise SettingsError(f"{path} has a table or key {name!r} outside all; {nearest(name, tables)}")
    found = parsed.get(table, {})
    if not isinstance(found, dict):
        raise SettingsError(f"{path}: {table} should be a table: [{table}]")
    return cast("dict[str, Any]", found)


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        SettingsError: no such file, or no TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise SettingsError(f"there is no file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise SettingsError(f"{path} cannot be read as TOML: {error}") from None
