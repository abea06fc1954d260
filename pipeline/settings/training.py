"""The settings of a run that every architecture has; each adds its own in its file in ``pipeline/sae/``."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from .declared import Group, setting
from .stages import Settings


class TrainSettings(Settings):
    """Settings of ``posae train``: one autoencoder on one layer of a store.

    A subclass is of one architecture, whose name is the default of its field ``architecture``; the string
    under that field describes the architecture.
    """

    table: ClassVar[str] = "train"

    architecture: str = setting("", Group.BASICS)
    """What is trained."""

    layer: int | None = setting(None, Group.DATA, ge=0)
    """Layer to train on; by default the middle one of the store."""

    dictionary_size: int | None = setting(None, Group.ARCHITECTURE, ge=1)
    """Features; by default as many as the model is wide, as in the paper, and 8 times as many for topk,
    batchtopk and jumprelu."""

    position_mean: str = setting("none", Group.POSITION, needs_positions=True)
    """Mean by position that is subtracted before encoding and added after decoding, from the store's own
    statistics: none, range, exact, or lowrank:16 (any rank)."""

    position_adapter: str = setting("none", Group.POSITION, needs_positions=True)
    """What is learned for each position range besides, with any architecture: none, or some of bias, gate,
    table and decoder:8 (any rank), joined by +."""

    shared_adapters: bool = setting(False, Group.POSITION, needs_positions=True)
    """Give all ranges the same adapters (mask, encoder): a control, which cannot know the position."""

    shuffle_positions: bool = setting(False, Group.POSITION, needs_positions=True)
    """Give each token the position of another while training: a control, to which positions say nothing."""

    dead_after_tokens: int = setting(1_000_000, Group.SPARSITY, ge=1)
    """Training tokens without an activation after which a feature counts as dead."""

    ranges: str = setting("4", Group.POSITION)
    """Position ranges: a count of equal ones, or edges, e.g. 0:1,1:4,4:128."""

    steps: int = setting(10_000, Group.BASICS, ge=1)
    """Updates of the weights."""

    batch_size: int = setting(2048, Group.DATA, ge=1)
    """Tokens per batch; batches of one window differ by at most one from their mean."""

    window_contexts: int = setting(2048, Group.DATA, ge=8, multiple_of=8)
    """Contexts decoded at once, among which tokens are shuffled; two windows are in memory."""

    warmup_steps: int | None = setting(None, Group.POSITION, needs_positions=True, ge=0)
    """Steps with the base alone (alpha 0); by default the share below."""

    warmup_share: float = setting(0.1, Group.POSITION, needs_positions=True, ge=0, le=1)
    """The same as a share of the steps, rounded down; warmup_steps wins over it."""

    ramp_steps: int | None = setting(None, Group.POSITION, needs_positions=True, ge=1)
    """Steps over which alpha then rises to 1, and stays there; by default the rest."""

    ramp_share: float | None = setting(None, Group.POSITION, needs_positions=True, gt=0, le=1)
    """Instead of ramp_steps: a share of the steps, rounded down."""

    curriculum: Literal["linear", "cosine", "step", "plateau"] = setting(
        "linear", Group.POSITION, needs_positions=True
    )
    """How alpha rises: linearly, as half a cosine, at once when the warm-up ends, or linearly from when the
    loss stops falling (then ramp_steps is a fifth of the steps by default)."""

    learning_rate: float | None = setting(None, Group.OPTIMIZER, gt=0)
    """Learning rate of AdamW; by default 3e-4, as in the paper, and 8e-4 · sqrt(16384 / dictionary size) for
    topk and batchtopk."""

    learning_rate_warmup: float = setting(0.0, Group.OPTIMIZER, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""

    learning_rate_decay: float = setting(0.0, Group.OPTIMIZER, ge=0, le=1)
    """Share of the steps, the last, over which it falls to 0."""

    weight_decay: float = setting(1e-2, Group.OPTIMIZER, ge=0)
    """Weight decay of AdamW, on every parameter; with 0 it is Adam."""

    clip_norm: float = setting(1.0, Group.OPTIMIZER, gt=0)
    """Gradients are scaled down to this norm."""

    precision: Literal["float32", "tf32", "bfloat16"] | None = setting(None, Group.OPTIMIZER)
    """Of the products; weights and sums are float32. By default tf32 on NVIDIA GPUs, which rounds factors to
    10 bits, and float32 elsewhere. bfloat16: torch's autocast; it makes topk and batchtopk slower on a CPU,
    as codes are dense then."""

    reconstruction_loss: Literal["squared", "norm"] = setting("squared", Group.ARCHITECTURE, is_hidden=True)
    """squared norm of each token's error, as in the paper, or the norm itself, as in its scripts."""

    decoder_norm: Literal["features", "outputs"] = setting("features", Group.ARCHITECTURE, is_hidden=True)
    """Keep the norm of each feature's direction at 1, or of each output's weights: the wrong axis, as in the
    paper's scripts."""

    project_gradient: bool = setting(False, Group.ARCHITECTURE, is_hidden=True)
    """Remove from the decoder's gradient what would change these norms."""

    activation_scale: Literal["rms", "none"] = setting("rms", Group.OPTIMIZER)
    """rms scales activations to a root mean square norm of sqrt(d_model); none leaves them."""

    special_tokens: bool = setting(False, Group.POSITION)
    """Train on BOS and other special tokens too."""

    seed: int = setting(0, Group.BASICS, ge=0)
    """Seed of initialisation and dropout."""

    data_seed: int = setting(0, Group.DATA, ge=0)
    """Seed of the order of tokens."""

    log_steps: int = setting(50, Group.OUTPUT, ge=1)
    """Steps between lines of metrics."""

    checkpoint_steps: int = setting(1000, Group.OUTPUT, ge=1)
    """Steps between checkpoints to resume from."""

    device: str = setting("auto", Group.RESOURCES)
    """Device to train on: cuda, cpu, or auto."""

    def usual(self, d_model: int) -> dict[str, Any]:
        """What the architecture's own settings are that were left open.

        Args:
            d_model: width of the activations.
        """
        return {}

    @classmethod
    def more_active(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What to change so that slightly more features are active: the control ``more-active``.

        Args:
            values: settings of an agnostic run, by name.
        """
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_architecture(self) -> Self:
        own = type(self).model_fields["architecture"].default
        if self.architecture != own:
            raise ValueError(f"these are settings of {own!r}, and architecture is {self.architecture!r}")
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
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
        if self.curriculum == "step" and (ramp is not None or self.ramp_share is not None):
            raise ValueError("curriculum step has no ramp; leave ramp_steps out, or take linear")
        if self.learning_rate_warmup + self.learning_rate_decay > 1:
            raise ValueError(
                "learning_rate_warmup and learning_rate_decay are shares of the same steps; above 1"
            )
        return self
