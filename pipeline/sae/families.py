"""Settings that several architectures share, and the values that their presets do."""

from collections.abc import Mapping
from typing import Any

from ..settings import Group, TrainSettings, setting

PAPER: dict[str, Any] = {
    "steps": 10_000,
    "batch_size": 2048,
    "learning_rate": 3e-4,
    "weight_decay": 1e-2,
    "clip_norm": 1.0,
    "l1_coefficient": 0.04,
}
"""How the paper trains."""

TOPK: dict[str, Any] = {
    "batch_size": 2048,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "learning_rate_warmup": 0.05,
    "learning_rate_decay": 0.2,
}
"""Adam with a learning rate that rises and falls."""

_LESS_PENALTY = 0.9
"""Share of the L1 coefficient that makes slightly more features active."""


class SparsityWarmup(TrainSettings):
    """Of architectures with a sparsity penalty."""

    sparsity_warmup: float = setting(0.0, Group.SPARSITY, ge=0, le=1)
    """Share of the steps over which the sparsity penalty rises from 0."""


class L1Settings(SparsityWarmup):
    """Of architectures whose codes are sparse by an L1 penalty."""

    l1_coefficient: float = setting(0.04, Group.SPARSITY, ge=0)
    """Weight of the L1 norm of the code in the loss, lambda."""

    @classmethod
    def more_active(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """A smaller penalty: there is no number of active features to set."""
        return {"l1_coefficient": _LESS_PENALTY * values["l1_coefficient"]}


class TargetL0Settings(TrainSettings):
    """Of architectures whose number of active features is set."""

    target_l0: int = setting(32, Group.SPARSITY, ge=1)
    """Features active per token with topk, and on average with batchtopk and jumprelu."""

    auxiliary_coefficient: float = setting(1 / 32, Group.SPARSITY, ge=0)
    """Weight of the loss that revives dead features, with topk, batchtopk and jumprelu."""

    @classmethod
    def more_active(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """One more feature."""
        return {"target_l0": values["target_l0"] + 1}
