"""JumpReLU: each feature has a learned threshold, and what lies below it is 0.

    a = ReLU(W_encᵀ (x - b_dec) + b_enc)        h = a where a > θ, 0 elsewhere        x̂ = W_decᵀ h + b_dec

Rajamanoharan et al. 2024 (arXiv 2407.14435). A step has no gradient, so θ is given that of a step widened to
``bandwidth``. The penalty is on the number of active features itself, and pulls it to a target:
λ · d_model · (L0 / target - 1)², so that runs compare at equal L0; d_model is the mean square of scaled
activations, which makes λ a share of the loss at the start. Cost: as ``standard``, and a pass over
[rows, dictionary_size] for θ.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Unpack, cast

import torch
from torch import Tensor, nn

from ..settings import Group, Preset, TrainSettings, setting
from .autoencoder import Codes, CommonSettings, empty_weight, require
from .families import TOPK, SparsityWarmup, TargetL0Settings
from .plain import Plain
from .position_adapter import Rows

_FIRST_THRESHOLD = 0.01
"""θ at the start, as a share of √d_model, the norm of a scaled activation."""


class _Jump(torch.autograd.Function):
    """Whether a > θ, as 0 or 1, and a where it is; gradients of equations 11 and 12 of the paper above."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, threshold: Tensor, width: float) -> tuple[Tensor, Tensor]:
        is_active = (a > threshold).to(a.dtype)
        ctx.save_for_backward(a, threshold, is_active)
        ctx.width = width
        return is_active, a * is_active

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        of_active, of_code = gradients
        a, threshold, is_active = cast("tuple[Tensor, Tensor, Tensor]", ctx.saved_tensors)
        near = ((a - threshold).abs() < ctx.width / 2).to(a.dtype) / ctx.width
        of_threshold = -(near * (of_active + of_code * threshold)).sum(0)
        return of_code * is_active, of_threshold, None


class JumpReLUSettings(TargetL0Settings, SparsityWarmup):
    """Settings of ``jumprelu``."""

    architecture: str = "jumprelu"
    """A learned threshold for each feature."""

    l0_coefficient: float = setting(1.0, Group.SPARSITY, ge=0)
    """Weight of jumprelu's L0 penalty, which pulls L0 to target_l0."""

    bandwidth: float = setting(0.03, Group.SPARSITY, gt=0)
    """Width of jumprelu's step for its gradient, as a share of sqrt(d_model)."""


class JumpReLU(Plain):
    """A threshold for each feature.

    Attributes:
        threshold: θ, as a share of √d_model: in the unit of the paper above, so that its learning rates hold.
        threshold_unit: what it is a share of: √d_model, or 1 of one that was loaded and holds θ itself.
        target_l0: how many features are to be active on a token, on average.
        l0_coefficient: λ.
        bandwidth: how wide the step is made for its gradient, as a share of √d_model.
        auxiliary_coefficient: weight of the loss for dead features.
    """

    architecture: ClassVar[str] = "jumprelu"
    settings: ClassVar[type[TrainSettings]] = JumpReLUSettings
    presets: ClassVar[Mapping[str, Preset]] = {
        "jumprelu": Preset(
            "A learned threshold for each feature, pulled to a number of active features; ignores positions.",
            {**TOPK, "sparsity_warmup": 0.2},
        )
    }
    saelens_architecture: ClassVar[str | None] = "jumprelu"
    expansion: ClassVar[int] = 8
    is_centred: ClassVar[bool] = True

    def __init__(
        self,
        *,
        target_l0: int,
        l0_coefficient: float = 1.0,
        bandwidth: float = 0.03,
        auxiliary_coefficient: float = 1 / 32,
        **common: Unpack[CommonSettings],
    ) -> None:
        """Make the weights.

        Raises:
            SettingsError: see ``Autoencoder``; or a target that cannot be, or a number that is not above 0.
        """
        super().__init__(**common)
        allowed = f"from 1 to the dictionary's size, {self.dictionary_size}"
        require(1 <= target_l0 <= self.dictionary_size, "target_l0", target_l0, allowed)
        require(0 <= l0_coefficient < math.inf, "l0_coefficient", l0_coefficient, "at least 0")
        require(0 < bandwidth < math.inf, "bandwidth", bandwidth, "above 0")
        good = 0 <= auxiliary_coefficient < math.inf
        require(good, "auxiliary_coefficient", auxiliary_coefficient, "at least 0")
        self.target_l0 = target_l0
        self.l0_coefficient = l0_coefficient
        self.bandwidth = bandwidth
        self.auxiliary_coefficient = auxiliary_coefficient
        self.threshold_unit = math.sqrt(self.d_model)
        self.threshold = empty_weight(self.dictionary_size, device=self.W_enc.device)
        self._start()

    def _initialise(self) -> None:
        super()._initialise()
        nn.init.constant_(self.threshold, _FIRST_THRESHOLD)

    def _codes(self, scaled: Tensor, rows: Rows) -> Codes:
        before = self._activations(scaled, rows)
        width = math.sqrt(self.d_model) * self.bandwidth
        jump = cast("Callable[..., tuple[Tensor, Tensor]]", _Jump.apply)  # pyright: ignore[reportUnknownMemberType]
        is_active, code = jump(before, self.threshold_unit * self.threshold, width)
        return Codes(code, activations_of=partial(torch.index_select, before, 1), is_active=is_active)

    def saelens_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Thresholds as codes are compared with them."""
        return {**weights, "threshold": self.threshold_unit * weights["threshold"]}

    def take_saelens_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same weights: from here on a threshold is θ itself."""
        self.threshold_unit = 1.0
        return dict(weights)

    def _sparsity(self, codes: Codes) -> Tensor:
        assert codes.is_active is not None
        l0 = self.share.mean(codes.is_active.sum() / len(codes.is_active))
        coefficient = self.sparsity_factor * self.l0_coefficient * self.d_model
        return coefficient * (l0 / self.target_l0 - 1).square()
