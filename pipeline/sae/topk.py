"""Autoencoders that keep the largest activations: TopK on each token, BatchTopK in each batch.

    a = ReLU(W_encᵀ (x - b_dec) + b_enc)     h = the largest of a, 0 elsewhere     x̂ = W_decᵀ h + b_dec

TopK (Gao et al. 2024, arXiv 2406.04093) keeps the k largest of each token. BatchTopK (Bussmann et al. 2024,
arXiv 2412.06410) keeps the k · rows largest of a batch, so that a token may have more or fewer. Outside of
training a token's code must not depend on its neighbours: there what lies above a threshold is kept, a
running mean of each batch's least kept activation. The number of active features is set, not a penalty,
so runs compare at equal L0.

Features that have been silent for long would stay so, as what is not kept gets no gradient. The auxiliary
loss of Gao et al. (section 2.4) has the most active of the dead ones reconstruct what the code left over.

At the start encoder and decoder are tied, and ``b_dec`` is the mean activation, where the store tells it.
Cost: finding the largest adds a pass over [rows, dictionary_size]; the auxiliary loss, while features are
dead, another product with the decoder.
"""

import math
from typing import ClassVar, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .autoencoder import Autoencoder, Codes, CommonSettings, empty_weight, require

_THRESHOLD_KEPT = 0.99
"""How much of the threshold so far a further batch leaves."""


class TopK(Autoencoder):
    """The largest activations of each token.

    Attributes:
        target_l0: how many are kept.
        auxiliary_coefficient: weight of the loss for dead features.
    """

    architecture: ClassVar[str] = "topk"
    saelens_architecture: ClassVar[str] = "posae_topk"
    expansion: ClassVar[int] = 8
    is_centred: ClassVar[bool] = True

    def __init__(
        self, *, target_l0: int, auxiliary_coefficient: float = 1 / 32, **common: Unpack[CommonSettings]
    ) -> None:
        """Make the weights.

        Raises:
            SettingsError: see ``Autoencoder``; or more features kept than there are, or a negative weight.
        """
        super().__init__(**common)
        allowed = f"from 1 to the dictionary's size, {self.dictionary_size}"
        require(1 <= target_l0 <= self.dictionary_size, "target_l0", target_l0, allowed)
        good = 0 <= auxiliary_coefficient < math.inf
        require(good, "auxiliary_coefficient", auxiliary_coefficient, "at least 0")
        self.target_l0 = target_l0
        self.auxiliary_coefficient = auxiliary_coefficient
        self.b_dec = empty_weight(self.d_model, device=self.W_enc.device)
        self._start()

    @classmethod
    def usual_learning_rate(cls, dictionary_size: int) -> float:
        """The larger a dictionary, the slower: found by sweeps of dictionary_learning for TopK."""
        return 2e-4 * math.sqrt(2**14 / dictionary_size)

    def _initialise(self) -> None:
        self._tie()
        nn.init.zeros_(self.b_dec)

    @torch.no_grad()
    def fit_means(self, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """As in ``Autoencoder``; where no mean is taken by position, ``b_dec`` begins as that of all."""
        super().fit_means(sums, counts)
        if self.position_mean.is_none:
            mean = sums.sum(axis=0) / max(1, int(counts.sum()))
            self.b_dec.copy_(torch.as_tensor(mean * self.activation_scale))

    def _codes(self, scaled: Tensor, lengths: list[int]) -> Codes:
        before = torch.addmm(self.b_enc, scaled - self.b_dec, self.W_enc).relu_()
        return Codes(self._largest(before), None, before)

    def _largest(self, activations: Tensor) -> Tensor:
        values, places = activations.topk(self.target_l0, dim=1, sorted=False)
        return torch.zeros_like(activations).scatter(1, places, values)

    def _sparsity(self, codes: Codes) -> Tensor:
        return codes.code.new_zeros(())

    def _auxiliary(self, codes: Codes, residual: Tensor) -> Tensor:
        if self.dead is None or not self.training or self.auxiliary_coefficient == 0:
            return super()._auxiliary(codes, residual)
        assert codes.before is not None
        n_used = min(self.d_model // 2, self.dictionary_size) or 1
        values, places = torch.where(self.dead, codes.before, 0).topk(n_used, dim=1, sorted=False)
        code = torch.zeros_like(codes.before).scatter(1, places, values)
        error = F.mse_loss(code @ self.W_dec, residual, reduction="sum") / len(residual)
        # Fewer dead features than would be used can but explain their part.
        share = (self.dead.sum() / n_used).clamp(max=1.0)
        return self.auxiliary_coefficient * share * error

    def _decoded(self, code: Tensor) -> Tensor:
        return torch.addmm(self.b_dec, code, self.W_dec)

    def own_settings(self) -> dict[str, float]:
        """The constructor's keywords that weights do not tell."""
        return super().own_settings() | {
            "target_l0": self.target_l0,
            "auxiliary_coefficient": self.auxiliary_coefficient,
        }


class BatchTopK(TopK):
    """The largest activations of each batch; ``target_l0`` of a token on average."""

    architecture: ClassVar[str] = "batchtopk"
    saelens_architecture: ClassVar[str] = "posae_batchtopk"

    threshold: Tensor
    """A scalar: outside of training what lies above is kept; below 0 until a batch was seen."""

    def __init__(
        self, *, target_l0: int, auxiliary_coefficient: float = 1 / 32, **common: Unpack[CommonSettings]
    ) -> None:
        """Make the weights; see ``TopK``."""
        super().__init__(target_l0=target_l0, auxiliary_coefficient=auxiliary_coefficient, **common)
        self.register_buffer("threshold", torch.full((), -1.0, device=self.W_enc.device))

    def _largest(self, activations: Tensor) -> Tensor:
        if not self.training:
            return torch.where(activations > self.threshold, activations, 0)
        least = _kth_largest(activations.detach(), self.target_l0 * len(activations))
        self._move_threshold(least)
        # Fewer than are to be kept may be above 0: then the least is 0, and those are kept.
        return torch.where(activations >= least, activations, 0)

    @torch.no_grad()
    def _move_threshold(self, least: Tensor) -> None:
        moved = torch.lerp(least, self.threshold, _THRESHOLD_KEPT)
        self.threshold.copy_(torch.where(self.threshold < 0, least, moved))


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of all ``values``; a scalar."""
    place = values.numel() - k
    if values.device.type == "cpu":  # four times as fast as torch's
        return torch.as_tensor(np.partition(values.numpy(), place, axis=None)[place])
    return values.flatten().kthvalue(place + 1).values
