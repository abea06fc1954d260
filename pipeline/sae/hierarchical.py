"""The paper's hierarchical autoencoder, to the letter: a base code, and an adapter for each range.

    h_b = ReLU(LayerNorm(W_encᵀ x + b_enc))                               (equation 2)
    h_r = h_b + alpha · Dropout(LayerNorm(f_r(h_b)))                      (equation 3)
    loss = ‖x - W_decᵀ h_r‖² + λ(‖h_b‖₁ + alpha · ‖h_r - h_b‖₁)           (equation 5)

Equation 4 is 5 with an alpha of 0. What the paper leaves open is read so: k is the dictionary's
size, and f_r leads from k through m and a ReLU back to k. Every LayerNorm has a gain and a bias,
and each adapter its own. The loss sums over features and averages over rows. There is no ``b_dec``.
Nothing keeps h_r from being negative, or dense. As h_r - h_b already holds an alpha, the penalty on
adapters grows with its square.

Cost: a row passes through the adapter of its own range alone, 4 · k · m operations on top of the
base's 4 · d_model · k. While alpha is 0 adapters are left out, and their weights get no gradient.
"""

import math
from typing import ClassVar, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import Autoencoder, Codes, CommonSettings, empty_weight, require


class Adapter(nn.Module):
    """LayerNorm(f_r(h_b)) of equation 3, for one range; k → m → k."""

    def __init__(self, dictionary_size: int, width: int, device: torch.device) -> None:
        """Make the weights, without values: k is ``dictionary_size``, m is ``width``."""
        super().__init__()
        self.W_in = empty_weight(dictionary_size, width, device=device)
        self.b_in = empty_weight(width, device=device)
        self.W_out = empty_weight(width, dictionary_size, device=device)
        self.b_out = empty_weight(dictionary_size, device=device)
        self.norm = nn.LayerNorm(dictionary_size, device=device)

    def initialise(self, generator: torch.Generator, gain: float) -> None:
        """Draw f_r as ``nn.Linear`` does (uniform to 1/√inputs); set the gain of the LayerNorm."""
        for weight, bias in ((self.W_in, self.b_in), (self.W_out, self.b_out)):
            bound = len(weight) ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)
            nn.init.uniform_(bias, -bound, bound, generator=generator)
        nn.init.constant_(self.norm.weight, gain)
        nn.init.zeros_(self.norm.bias)

    def forward(self, base_code: Tensor) -> Tensor:
        """[rows, dictionary_size] to the same."""
        hidden = torch.addmm(self.b_in, base_code, self.W_in).relu_()
        return self.norm(torch.addmm(self.b_out, hidden, self.W_out))


class Hierarchical(Autoencoder):
    """Equations 2 to 5 of the paper.

    Attributes:
        adapter_width: m.
        dropout: the probability with which each number of an adapter's output is dropped.
        adapter_gain: the first gain of the adapters' LayerNorms; with 0 they begin silent.
    """

    architecture: ClassVar[str] = "hierarchical"
    saelens_architecture: ClassVar[str] = "posae_hierarchical"

    def __init__(
        self,
        *,
        l1_coefficient: float,
        adapter_width: int,
        dropout: float = 0.1,
        adapter_gain: float = 1.0,
        **common: Unpack[CommonSettings],
    ) -> None:
        """Make the base, and an adapter for each range.

        Raises:
            SettingsError: see ``Autoencoder``; or a λ that is negative, an adapter of width 0, a dropout that
                is no probability below 1, a gain that is not finite.
        """
        super().__init__(**common)
        require(0 <= l1_coefficient < math.inf, "l1_coefficient", l1_coefficient, "at least 0")
        require(adapter_width >= 1, "adapter_width", adapter_width, "at least 1")
        require(0 <= dropout < 1, "dropout", dropout, "at least 0 and below 1")
        require(math.isfinite(adapter_gain), "adapter_gain", adapter_gain, "finite")
        self.l1_coefficient = l1_coefficient
        self.adapter_width = adapter_width
        self.dropout = dropout
        self.adapter_gain = adapter_gain
        device = self.W_enc.device
        self.norm = nn.LayerNorm(self.dictionary_size, device=device)
        self.adapters = nn.ModuleList(
            Adapter(self.dictionary_size, adapter_width, device) for _ in self.ranges
        )
        self._start()

    def _initialise(self) -> None:
        nn.init.orthogonal_(self.W_enc, generator=self.generator)
        nn.init.zeros_(self.b_enc)
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)
        nn.init.orthogonal_(self.W_dec, generator=self.generator)
        self.normalise_decoder()
        for adapter in self.adapters:
            cast(Adapter, adapter).initialise(self.generator, self.adapter_gain)

    def _codes(self, scaled: Tensor, lengths: list[int]) -> Codes:
        base_code: Tensor = self.norm(torch.addmm(self.b_enc, scaled, self.W_enc)).relu_()  # eq. 2
        if self.alpha == 0.0:
            return Codes(base_code, base_code)
        # One split has one gradient; slices would each have one of the size of the whole.
        parts = zip(self.adapters, torch.split(base_code, lengths), strict=True)
        adaptation = torch.cat([adapter(rows) for adapter, rows in parts])
        if self.training and self.dropout > 0.0:
            kept = torch.empty_like(adaptation)
            kept.bernoulli_(1.0 - self.dropout, generator=self.generator)
            factor = self.alpha / (1.0 - self.dropout)
            return Codes(torch.addcmul(base_code, adaptation, kept, value=factor), base_code)  # eq. 3
        return Codes(torch.add(base_code, adaptation, alpha=self.alpha), base_code)  # eq. 3

    def _sparsity(self, codes: Codes) -> Tensor:
        code, base_code = codes.code, codes.base_code
        assert base_code is not None
        penalty = base_code.sum()  # nothing in h_b is negative: the sum is its L1 norm
        if self.alpha != 0.0:
            penalty = penalty + self.alpha * F.l1_loss(code, base_code, reduction="sum")
        return self.l1_coefficient * penalty / len(code)  # eqs. 4 and 5

    def base_parameters(self) -> int:
        """How many numbers are learned outside the adapters."""
        return super().base_parameters() - sum(weight.numel() for weight in self.adapters.parameters())

    def own_settings(self) -> dict[str, float]:
        """The constructor's keywords that weights do not tell."""
        return super().own_settings() | {
            "l1_coefficient": self.l1_coefficient,
            "adapter_width": self.adapter_width,
            "dropout": self.dropout,
            "adapter_gain": self.adapter_gain,
        }
