"""The ordinary sparse autoencoder: ReLU and L1, the same for every position.

With the decoder's bias taken from the input, as SAELens has it (``apply_b_dec_to_input``):

    h = ReLU(W_encᵀ (x - b_dec) + b_enc)        x̂ = W_decᵀ h + b_dec

and the loss ‖x - x̂‖² + λ‖h‖₁: equation 1 of the paper, with no position in it. Cost: a forward
pass is 4 · d_model · dictionary_size operations a row.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Unpack

from torch import Tensor

from ..settings import Preset, TrainSettings
from .autoencoder import Codes, CommonSettings, require
from .families import PAPER, L1Settings
from .plain import Plain
from .position_adapter import Rows


class StandardSettings(L1Settings):
    """Settings of ``standard``."""

    architecture: str = "standard"
    """ReLU and L1."""


class Standard(Plain):
    """ReLU and L1; its ranges only say by which ranges it is scored."""

    architecture: ClassVar[str] = "standard"
    settings: ClassVar[type[TrainSettings]] = StandardSettings
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper-baseline": Preset("The paper's settings without adapters or layer norm.", PAPER)
    }
    saelens_architecture: ClassVar[str | None] = "standard"

    def __init__(self, *, l1_coefficient: float, **common: Unpack[CommonSettings]) -> None:
        """Make the weights: tied at the start, feature directions random.

        Args:
            l1_coefficient: λ.
            **common: see ``Autoencoder``.

        Raises:
            SettingsError: see ``Autoencoder``; or a λ that is negative.
        """
        super().__init__(**common)
        require(0 <= l1_coefficient < math.inf, "l1_coefficient", l1_coefficient, "at least 0")
        self.l1_coefficient = l1_coefficient
        self._start()

    def _codes(self, scaled: Tensor, rows: Rows) -> Codes:
        return Codes(self._activations(scaled, rows))

    def _sparsity(self, codes: Codes) -> Tensor:
        # Nothing in the code is negative, so its sum is its L1 norm.
        return self.sparsity_factor * self.l1_coefficient * codes.dense.sum() / len(codes.dense)
