"""Position-specific encoders: each range has its own, and all share one decoder.

    h = ReLU(W_rᵀ (x - b_dec) + b_r)        x̂ = W_decᵀ h + b_dec

The paper counts it among its failed approaches ("specialized encoders", runs 6 to 8) and says no more. Cost:
a row passes through the encoder of its own range alone, so a step costs what ``standard`` does; encoders
take n_ranges times the memory, and each learns from its share of the rows.
"""

from collections.abc import Mapping
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from ..settings import Preset, TrainSettings
from .autoencoder import Codes, CommonSettings, empty_weight
from .families import PAPER, L1Settings
from .position_adapter import Rows
from .standard import Standard


class SeparateSettings(L1Settings):
    """Settings of ``separate``."""

    architecture: str = "separate"
    """An encoder for each position range; the paper calls it failed."""


class Separate(Standard):
    """An encoder for each range.

    ``W_enc`` is [ranges, d_model, dictionary_size] and ``b_enc`` [ranges, dictionary_size].
    """

    architecture: ClassVar[str] = "separate"
    settings: ClassVar[type[TrainSettings]] = SeparateSettings
    presets: ClassVar[Mapping[str, Preset]] = {
        "separate-encoders": Preset(
            "The paper's specialized encoders, which it calls failed: one for each range.", PAPER
        )
    }
    agnostic_architecture: ClassVar[str | None] = "standard"
    saelens_architecture: ClassVar[str | None] = None

    def __init__(self, *, l1_coefficient: float, **common: Unpack[CommonSettings]) -> None:
        """Make the weights; see ``Standard``. With shared adapters there is one encoder, as if one range."""
        super().__init__(l1_coefficient=l1_coefficient, **common)

    def _make_encoder(self, device: torch.device) -> None:
        n_encoders = 1 if self.shared_adapters else len(self.ranges)
        self.W_enc = empty_weight(n_encoders, self.d_model, self.dictionary_size, device=device)
        self.b_enc = empty_weight(n_encoders, self.dictionary_size, device=device)

    def _codes(self, scaled: Tensor, rows: Rows) -> Codes:
        lengths = [len(scaled)] if self.shared_adapters else rows.needed_lengths()
        parts = zip(torch.split(scaled - self.b_dec, lengths), self.W_enc, self.b_enc, strict=True)
        before = torch.cat([torch.addmm(bias, part, weight) for part, weight, bias in parts])
        return Codes(self.position_adapter.activations(before, rows, self.alpha).relu_())

    def base_parameters(self) -> int:
        """How many numbers one encoder and the decoder have."""
        further = self.W_enc[1:].numel() + self.b_enc[1:].numel()
        return super().base_parameters() - further
