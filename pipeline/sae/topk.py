"""Autoencoders that keep the largest activations: TopK on each token, BatchTopK in each batch.

    a = ReLU(W_encᵀ (x - b_dec) + b_enc)     h = the largest of a, 0 elsewhere     x̂ = W_decᵀ h + b_dec

TopK (Gao et al. 2024, arXiv 2406.04093) keeps the k largest of each token. BatchTopK (Bussmann et al. 2024,
arXiv 2412.06410) keeps the k · rows largest of a batch, so that a token may have more or fewer. Outside of
training a token's code must not depend on its neighbours: there what lies above a threshold is kept, a
running mean of each batch's least kept activation. The number of active features is set, not a penalty,
so runs compare at equal L0.

Dead features are brought back by the auxiliary loss of plain.py. Cost: finding the largest adds a pass over
[rows, dictionary_size]; where few are kept, training needs one dense product a step (sparse.py).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Unpack

import numpy as np
import torch
from torch import Tensor

from ..settings import Preset, TrainSettings
from .autoencoder import Codes, CommonSettings, Setting, require
from .families import TOPK, TargetL0Settings
from .plain import Plain
from .position_adapter import Rows
from .sparse import are_few, encoded

_THRESHOLD_KEPT = 0.99
"""How much of the threshold so far a further batch leaves."""
_FAR_BELOW = 0.5
"""Of the threshold; a batch's least kept activation is hardly ever less."""


class TopKSettings(TargetL0Settings):
    """Settings of ``topk``."""

    architecture: str = "topk"
    """The largest activations of each token."""


class BatchTopKSettings(TargetL0Settings):
    """Settings of ``batchtopk``."""

    architecture: str = "batchtopk"
    """The largest activations of each batch."""


class TopK(Plain):
    """The largest activations of each token.

    Attributes:
        target_l0: how many are kept.
        auxiliary_coefficient: weight of the loss for dead features.
    """

    architecture: ClassVar[str] = "topk"
    settings: ClassVar[type[TrainSettings]] = TopKSettings
    presets: ClassVar[Mapping[str, Preset]] = {
        "topk": Preset("The same number of active features on every token; ignores positions.", TOPK)
    }
    saelens_architecture: ClassVar[str | None] = "topk"
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
        self._start()

    @classmethod
    def usual_learning_rate(cls, dictionary_size: int) -> float:
        """The larger a dictionary, the slower, as in figure 3 of Gao et al.

        Four times what dictionary_learning has: at the default's 20 million tokens, and below, that is better
        (docs/log.md).
        """
        return 8e-4 * math.sqrt(2**14 / dictionary_size)

    def saelens_settings(self) -> dict[str, Setting]:
        """How many are kept; norms of the decoder do not choose among them."""
        return {"k": self.target_l0, "rescale_acts_by_decoder_norm": False}

    def _codes(self, scaled: Tensor, rows: Rows) -> Codes:
        if self._is_listed(scaled):
            return self._listed(scaled)
        before = self._activations(scaled, rows)
        return Codes(self._largest(before), activations_of=partial(torch.index_select, before, 1))

    def _is_listed(self, scaled: Tensor) -> bool:
        """Whether active features are worth a list of them."""
        kind = scaled.device.type
        adapted = self.position_adapter.changes_activations and self.alpha != 0.0
        is_few = are_few(self.target_l0, self.dictionary_size, scaled.device)
        return self.training and is_few and not adapted and not torch.is_autocast_enabled(kind)

    def _listed(self, scaled: Tensor) -> Codes:
        bias, centred = self._centred(scaled)
        code = encoded(centred, self.W_enc, bias, self._places)

        def activations_of(features: Tensor) -> Tensor:
            return torch.addmm(bias[features], centred, self.W_enc[:, features]).relu_()

        return Codes(code, activations_of=activations_of)

    def _places(self, activations: Tensor) -> Tensor:
        """Where the largest are in [rows, dictionary_size], as ``sparse.Choose`` says."""
        n_rows, n_features = activations.shape
        features = activations.topk(self.target_l0, dim=1, sorted=False).indices.sort(dim=1).values
        begins = torch.arange(n_rows, device=features.device)[:, None] * n_features
        return (features + begins).flatten()

    def _largest(self, activations: Tensor) -> Tensor:
        values, places = activations.topk(self.target_l0, dim=1, sorted=False)
        return torch.zeros_like(activations).scatter(1, places, values)

    def _sparsity(self, codes: Codes) -> Tensor:
        return self.b_dec.new_zeros(())


class BatchTopK(TopK):
    """The largest activations of each batch; ``target_l0`` of a token on average."""

    architecture: ClassVar[str] = "batchtopk"
    settings: ClassVar[type[TrainSettings]] = BatchTopKSettings
    presets: ClassVar[Mapping[str, Preset]] = {
        "batchtopk": Preset("A number of active features that is set on average; ignores positions.", TOPK),
        "posae": Preset(
            "What measurement favours so far: batchtopk on activations without their position's mean.",
            {"position_mean": "lowrank:16", **TOPK},
        ),
    }
    is_calibrated: ClassVar[bool] = True
    saelens_architecture: ClassVar[str | None] = "jumprelu"

    threshold: Tensor
    """A scalar: outside of training what lies above is kept; below 0 until a batch was seen."""

    def __init__(
        self, *, target_l0: int, auxiliary_coefficient: float = 1 / 32, **common: Unpack[CommonSettings]
    ) -> None:
        """Make the weights; see ``TopK``."""
        super().__init__(target_l0=target_l0, auxiliary_coefficient=auxiliary_coefficient, **common)
        self.register_buffer("threshold", torch.full((), -1.0, device=self.W_enc.device))

    def saelens_settings(self) -> dict[str, Setting]:
        """None: SAELens, too, has BatchTopK as JumpReLU, once it is trained."""
        return {}

    def saelens_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same threshold for every feature."""
        return {**weights, "threshold": weights["threshold"].expand(self.dictionary_size)}

    def take_saelens_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The threshold that all features share."""
        found = weights.get("threshold")
        if found is not None and found.shape == (self.dictionary_size,) and bool((found == found[0]).all()):
            return {**weights, "threshold": found[0].clone()}
        return dict(weights)

    def _largest(self, activations: Tensor) -> Tensor:
        if not self.training:
            return torch.where(activations > self.threshold, activations, activations.new_zeros(()))
        if activations.device.type == "cpu":
            places = self._places(activations.detach().float())
            is_kept = torch.zeros(activations.numel(), dtype=torch.bool).index_fill_(0, places, True)
            return torch.where(is_kept.view_as(activations), activations, 0)
        flat = activations.flatten()
        places, is_kept = self._candidates(flat.detach())
        # By their places: many are equal to the least, where products are rounded to bfloat16.
        values = torch.where(is_kept, flat.gather(0, places), 0)
        return torch.zeros_like(flat).scatter(0, places, values).view_as(activations)

    def _candidates(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The largest here, without waiting for a GPU, and which of them are among the batch's.

        Args:
            flat: activations [rows · dictionary_size].
        """
        n_kept = self.target_l0 * self.share.n_rows(len(flat) // self.dictionary_size)
        values, places = flat.topk(min(n_kept, len(flat)), sorted=False)
        # Fewer than are to be kept may be above 0: then the least is 0, and those are kept.
        least = self.share.largest(values.relu(), n_kept).min()
        self._move_threshold(least.float())
        return places, values >= least

    def _places(self, activations: Tensor) -> Tensor:
        if activations.device.type == "cpu":
            return self._places_here(activations)
        flat = activations.view(-1)
        places, is_kept = self._candidates(flat)
        places, order = places.sort()
        flat[places] = torch.where(is_kept[order], flat[places], 0)
        return places

    def _places_here(self, activations: Tensor) -> Tensor:
        n_kept = self.target_l0 * self.share.n_rows(len(activations))
        flat = activations.numpy().reshape(-1)
        # The least kept is near the threshold: what lies far below need not be sorted.
        places = np.flatnonzero(flat > max(0.0, _FAR_BELOW * float(self.threshold)))
        here = flat[places]
        values = self.share.all_values(torch.as_tensor(here)).numpy()
        if len(values) < n_kept:
            places = np.flatnonzero(flat > 0)
            here = flat[places]
            values = self.share.all_values(torch.as_tensor(here)).numpy()
        least = np.float32(0)
        if len(values) >= n_kept:
            least = np.partition(values, len(values) - n_kept)[len(values) - n_kept]
        self._move_threshold(torch.as_tensor(least))
        is_kept = here >= least
        n_too_many = np.count_nonzero(is_kept) - n_kept
        if n_too_many > 0:  # of those equal to the least, the first stay
            is_kept[np.flatnonzero(here == least)[-n_too_many:]] = False
        return torch.as_tensor(places[is_kept])

    @torch.no_grad()
    def _move_threshold(self, least: Tensor) -> None:
        moved = torch.lerp(least, self.threshold, _THRESHOLD_KEPT)
        self.threshold.copy_(torch.where(self.threshold < 0, least, moved))
