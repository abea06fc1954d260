"""What a training can be told; each setting is declared as in ``stages``."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from .stages import Settings


class TrainSettings(Settings):
    """Settings of ``posae train``: one autoencoder on one layer of a store."""

    table: ClassVar[str] = "train"

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

    precision: Literal["float32", "tf32", "bfloat16"] | None = None
    """Of the products; weights and sums are float32. By default tf32 on NVIDIA GPUs, which rounds factors to
    10 bits, and float32 elsewhere. bfloat16: torch's autocast; topk and batchtopk become slower by it on a
    CPU, as codes are dense then."""

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
    """Device to train on: cuda, cpu, or auto."""

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
