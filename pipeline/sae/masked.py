"""The paper's first failed approach: features that only some positions may use.

    h = m(p) ⊙ ReLU(W_encᵀ (x - b_dec) + b_enc)        x̂ = W_decᵀ h + b_dec

A hard mask gives each position range a share of the features of its own, and forbids it the others (runs 1 to
3 of the paper). A Gaussian one gives feature j a centre, and weighs it by exp(-(p - centre)² / 2s²) with
s = L/8; centres lie evenly over the context. The paper says no more of either. With a mask that follows
the curriculum, (1 - alpha) + alpha · m(p), all features are everybody's at first ("mask scheduling", runs
6 to 8).
Cost: as ``standard``, and a gather and a product [rows, dictionary_size].
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor

from ..ranges import PositionRange, range_of_position
from ..settings import Group, Preset, TrainSettings, setting
from .autoencoder import Codes, CommonSettings, require
from .families import PAPER, L1Settings
from .position_adapter import Rows
from .standard import Standard


class MaskedSettings(L1Settings):
    """Settings of ``masked``."""

    architecture: str = "masked"
    """Features for some positions only; the paper calls it failed."""

    mask: Literal["hard", "gaussian"] = setting("hard", Group.ARCHITECTURE)
    """Which features a position may use with masked: those of its range, or weights that fall off over 1/8
    of the context."""

    mask_schedule: Literal["fixed", "curriculum"] = setting("fixed", Group.ARCHITECTURE)
    """Whether the mask applies from the start, or comes in with alpha."""


class Masked(Standard):
    """A plain autoencoder behind a mask by position.

    Attributes:
        mask: ``hard`` or ``gaussian``.
        mask_schedule: ``fixed``, or ``curriculum``, by which it comes in with alpha.
    """

    architecture: ClassVar[str] = "masked"
    settings: ClassVar[type[TrainSettings]] = MaskedSettings
    presets: ClassVar[Mapping[str, Preset]] = {
        "hard-mask": Preset(
            "The paper's runs 1 to 3, which it calls failed: each range has features of its own.",
            {"mask": "hard", **PAPER},
        ),
        "gaussian-mask": Preset(
            "The same with features whose weight falls off with the distance from a position.",
            {"mask": "gaussian", **PAPER},
        ),
        "mask-schedule": Preset(
            "The paper's runs 6 to 8: a hard mask that comes in with alpha.",
            {"mask_schedule": "curriculum", **PAPER},
        ),
    }
    agnostic_architecture: ClassVar[str | None] = "standard"
    saelens_architecture: ClassVar[str | None] = None

    weights_by_position: Tensor
    """m: [positions, dictionary_size], or [1, dictionary_size] where all positions share one."""

    def __init__(
        self,
        *,
        mask: Literal["hard", "gaussian"] = "hard",
        mask_schedule: Literal["fixed", "curriculum"] = "fixed",
        l1_coefficient: float,
        **common: Unpack[CommonSettings],
    ) -> None:
        """Make the weights and the mask.

        Raises:
            SettingsError: see ``Autoencoder``; or no such mask or schedule, or fewer features than ranges.
        """
        require(mask in ("hard", "gaussian"), "mask", mask, "hard or gaussian")
        good = mask_schedule in ("fixed", "curriculum")
        require(good, "mask_schedule", mask_schedule, "fixed or curriculum")
        super().__init__(l1_coefficient=l1_coefficient, **common)
        enough = mask != "hard" or self.dictionary_size >= len(self.ranges)
        require(enough, "dictionary_size", self.dictionary_size, "at least a feature for each range")
        self.mask, self.mask_schedule = mask, mask_schedule
        weights = _hard if mask == "hard" else _gaussian
        made = weights(self.ranges, self.dictionary_size)
        if self.shared_adapters:  # each feature's mean: as many are let through, at every position
            made = made.mean(0, keepdim=True)
        # Made of the settings, so not saved; and never on "meta".
        device = None if self.W_enc.is_meta else self.W_enc.device
        self.register_buffer("weights_by_position", made.to(device), persistent=False)

    @property
    def comes_in_with_alpha(self) -> bool:
        """Position adapters do, and masks that have the curriculum as schedule."""
        return super().comes_in_with_alpha or self.mask_schedule == "curriculum"

    def _codes(self, scaled: Tensor, rows: Rows) -> Codes:
        weights = self.weights_by_position
        strength = self.alpha if self.mask_schedule == "curriculum" else 1.0
        if strength != 1.0:
            weights = (1 - strength) + strength * weights
        let_through = weights if self.shared_adapters else weights[rows.needed_positions()]
        return Codes(self._activations(scaled, rows) * let_through)


def _hard(ranges: Sequence[PositionRange], dictionary_size: int) -> Tensor:
    range_of_feature = torch.arange(dictionary_size) * len(ranges) // dictionary_size
    range_of = torch.as_tensor(range_of_position(tuple(ranges))).long()
    return (range_of[:, None] == range_of_feature).float()


def _gaussian(ranges: Sequence[PositionRange], dictionary_size: int) -> Tensor:
    length = ranges[-1].stop
    centres = (torch.arange(dictionary_size) + 0.5) * length / dictionary_size
    distance = torch.arange(length)[:, None] - centres
    return torch.exp(-distance.square() / (2 * (length / 8) ** 2))
