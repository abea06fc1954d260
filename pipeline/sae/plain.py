"""What autoencoders with one encoder and a decoder's bias share: all but the paper's.

    a = ReLU(W_encᵀ (x - b_dec) + b_enc)        x̂ = W_decᵀ h + b_dec

How a becomes h is each architecture's own. At the start encoder and decoder are tied. Where activations are
centred and no mean is taken by position, ``b_dec`` begins as the mean of all.

A feature that is never kept gets no gradient and would stay dead. The auxiliary loss of Gao et al. 2024
(arXiv 2406.04093, section 2.4) has the most active of the dead ones reconstruct what the code left over;
it costs two further products, with the dead features' weights, while there are any.
"""

from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .autoencoder import Autoencoder, Codes, CommonSettings, empty_weight
from .position_adapter import Rows
from .sparse import SparseCode


class Plain(Autoencoder):
    """Encoder, decoder, both biases.

    Attributes:
        auxiliary_coefficient: weight of the loss for dead features; 0 where there is none.
    """

    auxiliary_coefficient: float = 0.0

    def __init__(self, **common: Unpack[CommonSettings]) -> None:
        """Make the weights, without values."""
        super().__init__(**common)
        self.b_dec = empty_weight(self.d_model, device=self.W_enc.device)

    def _initialise(self) -> None:
        self._tie()
        nn.init.zeros_(self.b_dec)

    @torch.no_grad()
    def fit_means(self, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """As in ``Autoencoder``; where activations are centred otherwise, ``b_dec`` begins as their mean."""
        super().fit_means(sums, counts)
        if self.is_centred and self.position_mean.is_none:
            mean = sums.sum(axis=0) / max(1, int(counts.sum()))
            self.b_dec.copy_(torch.as_tensor(mean * self.activation_scale))

    def _activations(self, scaled: Tensor, rows: Rows) -> Tensor:
        """a; [rows, dictionary_size]."""
        bias, centred = self._centred(scaled)
        before = torch.addmm(bias, centred, self.W_enc)
        return self.position_adapter.activations(before, rows, self.alpha).relu_()

    def _centred(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """b_enc [dictionary_size], and activations less b_dec [rows, d_model].

        Of the two the bias has b_dec's gradient: each row's would cost a product. Rows less b_dec have the
        value, as products of a large mean, rounded to bfloat16, would leave little of what is sought.
        """
        mean = self.b_dec.detach()
        return self.b_enc - (self.b_dec - mean) @ self.W_enc, scaled - mean

    def _auxiliary(self, codes: Codes, residual: Tensor) -> Tensor:
        if self.dead is None or not self.training or self.auxiliary_coefficient == 0:
            return super()._auxiliary(codes, residual)
        assert codes.activations_of is not None
        dead = self.dead
        activations = codes.activations_of(dead)
        n_wanted = min(self.d_model // 2, self.dictionary_size) or 1
        values, places = activations.topk(min(n_wanted, len(dead)), dim=1, sorted=False)
        code = torch.zeros_like(activations).scatter(1, places, values)
        error = F.mse_loss(code @ self.W_dec[dead], residual, reduction="sum") / len(residual)
        # Fewer dead features than are wanted can but explain their part.
        share = min(1.0, len(dead) / n_wanted)
        return self.auxiliary_coefficient * share * error

    def _from_features(self, code: Tensor | SparseCode) -> Tensor:
        return code @ self.W_dec + self.b_dec
