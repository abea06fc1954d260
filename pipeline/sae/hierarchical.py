"""The paper's hierarchical autoencoder, to the letter: a base code, and an adapter for each range.

    h_b = ReLU(LayerNorm(W_encᵀ x + b_enc))                               (equation 2)
    h_r = h_b + alpha · Dropout(LayerNorm(f_r(h_b)))                      (equation 3)
    loss = ‖x - W_decᵀ h_r‖² + λ(‖h_b‖₁ + alpha · ‖h_r - h_b‖₁)           (equation 5)

Equation 4 is 5 with an alpha of 0. What the paper leaves open is read so: k is the dictionary's
size, and f_r leads from k through m and a ReLU back to k. Every LayerNorm has a gain and a bias,
and each adapter its own. The loss sums over features and averages over rows. There is no ``b_dec``.
Nothing keeps h_r from being negative, or dense. As h_r - h_b already holds an alpha, the penalty on
adapters grows with its square. Each of these points is a keyword whose default is this reading.

Cost: a row passes through the adapter of its own range alone, 4 · k · m operations on top of the
base's 4 · d_model · k. While alpha is 0 adapters are left out, and their weights get no gradient.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self, Unpack, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor, nn

from ..settings import Group, Preset, TrainSettings, setting
from .autoencoder import Autoencoder, Codes, CommonSettings, empty_weight, require
from .families import PAPER, L1Settings
from .position_adapter import Rows
from .row_blocks import AdapterWeights, Change, adapted, by_blocks, rectified
from .sparse import SparseCode


class HierarchicalSettings(L1Settings):
    """Settings of ``hierarchical``."""

    architecture: str = "hierarchical"
    """The paper's adapters by position range."""

    adapter_width: int | None = setting(None, Group.ARCHITECTURE, ge=1)
    """Hidden width of each range's adapter; by default half the model's width, as in the paper."""

    adapter_share: float | None = setting(None, Group.ARCHITECTURE, gt=0)
    """Instead of adapter_width: parameters that hierarchical's adapters add, as a share of the others."""

    adapter_gain: float = setting(1.0, Group.ARCHITECTURE)
    """Initial gain of the adapters' layer norm; narrow adapters need 0."""

    dropout: float = setting(0.1, Group.ARCHITECTURE, ge=0, lt=1)
    """Dropout on the output of hierarchical's adapters."""

    layer_norm: Literal["both", "base", "adapter", "none"] = setting(
        "both", Group.ARCHITECTURE, is_hidden=True
    )
    """Where hierarchical has a layer norm."""

    layer_norm_affine: bool = setting(True, Group.ARCHITECTURE, is_hidden=True)
    """Give layer norms a gain and a bias."""

    adapter_norm: Literal["after", "before"] = setting("after", Group.ARCHITECTURE, is_hidden=True)
    """Whether an adapter's layer norm comes after it, as in the paper, or before, as in its scripts."""

    residual: bool = setting(True, Group.ARCHITECTURE, is_hidden=True)
    """Add adapters to the base code; without, they replace it as alpha rises."""

    rectify: bool = setting(False, Group.ARCHITECTURE, is_hidden=True)
    """Put a ReLU after hierarchical's adapters, so that no activation is negative."""

    penalty: Literal["text", "code", "base"] = setting("text", Group.SPARSITY, is_hidden=True)
    """What lambda multiplies in hierarchical: the base code and what adapters change, as in the paper's text,
    the code that is decoded, or the base code alone, as in its scripts."""

    base_loss_coefficient: float = setting(0.0, Group.ARCHITECTURE, is_hidden=True, ge=0)
    """Weight of a further loss of what hierarchical's base code alone reconstructs."""

    decoder_bias: bool = setting(False, Group.ARCHITECTURE, is_hidden=True)
    """Give hierarchical a decoder bias; all others have one."""

    def usual(self, d_model: int) -> dict[str, Any]:
        """The paper's adapters: half as wide as the model."""
        is_open = self.adapter_width is None and self.adapter_share is None
        return {"adapter_width": max(1, d_model // 2)} if is_open else {}

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if self.adapter_width is not None and self.adapter_share is not None:
            raise ValueError("adapter_width and adapter_share contradict each other; give one of them")
        return self


_PAPER = {"ranges": "4", "dropout": 0.1, **PAPER}

_PUBLISHED_CODE = {
    **_PAPER,
    "steps": 11_000,
    "warmup_share": 1 / 11,
    "learning_rate": 3e-5,
    "learning_rate_warmup": 1 / 11,
    "weight_decay": 0.0,
    "reconstruction_loss": "norm",
    "penalty": "base",
    "adapter_norm": "before",
    "decoder_bias": True,
    "decoder_norm": "outputs",
    "project_gradient": True,
    "activation_scale": "none",
    "special_tokens": True,
}


class Adapter(nn.Module):
    """LayerNorm(f_r(h_b)) of equation 3, for one range; k → m → k."""

    def __init__(
        self, dictionary_size: int, width: int, norm: nn.Module, *, is_norm_first: bool, device: torch.device
    ) -> None:
        """Make the weights, without values: k is ``dictionary_size``, m is ``width``."""
        super().__init__()
        self.W_in = empty_weight(dictionary_size, width, device=device)
        self.b_in = empty_weight(width, device=device)
        self.W_out = empty_weight(width, dictionary_size, device=device)
        self.b_out = empty_weight(dictionary_size, device=device)
        self.norm = norm
        self.is_norm_first = is_norm_first

    def initialise(self, generator: torch.Generator, gain: float) -> None:
        """Draw f_r as ``nn.Linear`` does (uniform to 1/√inputs); set the gain of the LayerNorm."""
        for weight, bias in ((self.W_in, self.b_in), (self.W_out, self.b_out)):
            bound = len(weight) ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)
            nn.init.uniform_(bias, -bound, bound, generator=generator)
        _reset(self.norm, gain)

    @property
    def is_plain(self) -> bool:
        """Whether it is f_r and then a LayerNorm with a gain and a bias, as the paper has it."""
        is_affine = isinstance(self.norm, nn.LayerNorm) and self.norm.elementwise_affine
        return is_affine and not self.is_norm_first

    def weights(self) -> AdapterWeights:
        """All of them, of an adapter that ``is_plain``."""
        norm = cast(nn.LayerNorm, self.norm)
        return AdapterWeights(self.W_in, self.b_in, self.W_out, self.b_out, norm.weight, norm.bias)

    def forward(self, base_code: Tensor) -> Tensor:
        """[rows, dictionary_size] to the same."""
        inner = self.norm(base_code) if self.is_norm_first else base_code
        hidden = torch.addmm(self.b_in, inner, self.W_in).relu_()
        adaptation = torch.addmm(self.b_out, hidden, self.W_out)
        return adaptation if self.is_norm_first else self.norm(adaptation)


def _reset(norm: nn.Module, gain: float) -> None:
    if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
        nn.init.constant_(norm.weight, gain)
        nn.init.zeros_(norm.bias)


class Hierarchical(Autoencoder):
    """Equations 2 to 5 of the paper.

    Attributes:
        adapter_width: m.
        dropout: the probability with which each number of an adapter's output is dropped.
        adapter_gain: the first gain of the adapters' LayerNorms; with 0 they begin silent.
        layer_norm: where one is: ``both``, in the ``base`` alone, on the ``adapter`` alone, or ``none``.
        layer_norm_affine: whether LayerNorms have a gain and a bias.
        adapter_norm: an adapter's LayerNorm comes ``after`` f_r, or ``before``, as in the published scripts.
        residual: whether h_b stays whole; without, h_r = (1 - alpha) h_b + alpha · …
        rectify: whether a ReLU follows equation 3.
        penalty: what λ is put on: the ``text``'s two norms, the ``code`` h_r, or the ``base`` h_b alone.
        base_loss_coefficient: weight of a further ‖x - W_decᵀ h_b‖², which keeps the base of use.
        decoder_bias: whether there is a ``b_dec``, taken off before encoding and added after decoding.
    """

    architecture: ClassVar[str] = "hierarchical"
    settings: ClassVar[type[TrainSettings]] = HierarchicalSettings
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset("The paper's text, to the letter.", _PAPER),
        "paper-15pct": Preset(
            "The same with adapters as narrow as the 15 % of parameters that the paper claims.",
            {**_PAPER, "adapter_share": 0.15, "adapter_gain": 0.0},
        ),
        "published-code": Preset(
            "What the paper's scripts would have trained, with true positions.", _PUBLISHED_CODE
        ),
    }
    agnostic_architecture: ClassVar[str | None] = "standard"

    def __init__(
        self,
        *,
        l1_coefficient: float,
        adapter_width: int,
        dropout: float = 0.1,
        adapter_gain: float = 1.0,
        layer_norm: Literal["both", "base", "adapter", "none"] = "both",
        layer_norm_affine: bool = True,
        adapter_norm: Literal["after", "before"] = "after",
        residual: bool = True,
        rectify: bool = False,
        penalty: Literal["text", "code", "base"] = "text",
        base_loss_coefficient: float = 0.0,
        decoder_bias: bool = False,
        **common: Unpack[CommonSettings],
    ) -> None:
        """Make the base, and an adapter for each range, or one where they are shared.

        Raises:
            SettingsError: see ``Autoencoder``; or a weight that is negative, an adapter of width 0, a dropout
                that is no probability below 1, a gain that is not finite, or a word that is unknown.
        """
        super().__init__(**common)
        require(0 <= l1_coefficient < math.inf, "l1_coefficient", l1_coefficient, "at least 0")
        require(adapter_width >= 1, "adapter_width", adapter_width, "at least 1")
        require(0 <= dropout < 1, "dropout", dropout, "at least 0 and below 1")
        require(math.isfinite(adapter_gain), "adapter_gain", adapter_gain, "finite")
        known = layer_norm in ("both", "base", "adapter", "none")
        require(known, "layer_norm", layer_norm, "both, base, adapter or none")
        require(adapter_norm in ("after", "before"), "adapter_norm", adapter_norm, "after or before")
        require(penalty in ("text", "code", "base"), "penalty", penalty, "text, code or base")
        good = 0 <= base_loss_coefficient < math.inf
        require(good, "base_loss_coefficient", base_loss_coefficient, "at least 0")
        self.l1_coefficient = l1_coefficient
        self.adapter_width = adapter_width
        self.dropout = dropout
        self.adapter_gain = adapter_gain
        self.layer_norm, self.layer_norm_affine = layer_norm, layer_norm_affine
        self.adapter_norm = adapter_norm
        self.residual = residual
        self.rectify = rectify
        self.penalty = penalty
        self.base_loss_coefficient = base_loss_coefficient
        self.decoder_bias = decoder_bias
        device = self.W_enc.device
        self.norm = self._new_norm(layer_norm in ("both", "base"))
        self.adapters = nn.ModuleList(
            Adapter(
                self.dictionary_size,
                adapter_width,
                self._new_norm(layer_norm in ("both", "adapter")),
                is_norm_first=adapter_norm == "before",
                device=device,
            )
            for _ in range(1 if self.shared_adapters else len(self.ranges))
        )
        self.b_dec = empty_weight(self.d_model, device=device) if decoder_bias else None
        self._start()

    @classmethod
    def settings_by_size(
        cls, settings: TrainSettings, untrained: Callable[[TrainSettings], Autoencoder]
    ) -> dict[str, Any]:
        """The width at which adapters come nearest to ``adapter_share`` of the other parameters."""
        assert isinstance(settings, HierarchicalSettings)
        share = settings.adapter_share
        if share is None:
            return {}
        one, two = (untrained(settings.model_copy(update={"adapter_width": width})) for width in (1, 2))
        base, further = one.base_parameters(), two.n_parameters() - one.n_parameters()
        width = 1 + round((base * (1 + share) - one.n_parameters()) / further)
        return {"adapter_width": max(1, width), "adapter_share": None}

    def _new_norm(self, wanted: bool) -> nn.Module:
        if not wanted:
            return nn.Identity()
        affine = self.layer_norm_affine
        return nn.LayerNorm(self.dictionary_size, elementwise_affine=affine, device=self.W_enc.device)

    def _initialise(self) -> None:
        nn.init.orthogonal_(self.W_enc, generator=self.generator)
        nn.init.zeros_(self.b_enc)
        _reset(self.norm, 1.0)
        nn.init.orthogonal_(self.W_dec, generator=self.generator)
        self.normalise_decoder()
        for adapter in self.adapters:
            cast(Adapter, adapter).initialise(self.generator, self.adapter_gain)
        if self.b_dec is not None:
            nn.init.zeros_(self.b_dec)

    @property
    def comes_in_with_alpha(self) -> bool:
        """The adapters do."""
        return True

    def _codes(self, scaled: Tensor, rows: Rows) -> Codes:
        centred = scaled if self.b_dec is None else scaled - self.b_dec
        base_code, base_size = self._base(torch.addmm(self.b_enc, centred, self.W_enc), rows)
        if self.alpha == 0.0:
            return Codes(base_code, base_code, sizes=(base_size, torch.zeros_like(base_size)))
        code, change_size = self._adapted(base_code, rows)
        return Codes(code, base_code, sizes=(base_size, change_size))

    def _base(self, projected: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """h_b of equation 2, [rows, dictionary_size], and its L1 norm, summed over rows."""
        norm = self.norm
        is_plain = self.layer_norm_affine and not self.position_adapter.changes_activations
        if isinstance(norm, nn.LayerNorm) and is_plain and by_blocks(projected):
            return rectified(projected, norm)
        before: Tensor = norm(projected)
        base_code = self.position_adapter.activations(before, rows, self.alpha).relu_()
        return base_code, base_code.sum()

    def _adapted(self, base_code: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """h_r of equation 3, [rows, dictionary_size], and ‖h_r - h_b‖₁, summed over rows."""
        lengths = [len(base_code)] if self.shared_adapters else rows.needed_lengths()
        adapters = [cast(Adapter, adapter) for adapter in self.adapters]
        kept = self._kept(base_code)
        scale = 1.0 if kept is None else 1.0 / (1.0 - self.dropout)
        is_sum = self.residual and not self.rectify
        if is_sum and all(adapter.is_plain for adapter in adapters) and by_blocks(base_code):
            weights = [adapter.weights() for adapter in adapters]
            code, size = adapted(base_code, kept, weights, Change(lengths, self.alpha, scale))
            return code, self.alpha * size
        # One split has one gradient; slices would each have one of the size of the whole.
        parts = zip(adapters, torch.split(base_code, lengths), strict=True)
        adaptation = torch.cat([adapter(part) for adapter, part in parts])
        if kept is not None:
            adaptation = adaptation * kept.to(adaptation.dtype).mul_(scale)
        kept_base = base_code if self.residual else (1.0 - self.alpha) * base_code
        code = torch.add(kept_base, adaptation, alpha=self.alpha)
        if is_sum:  # the same as below, with half of the passes over memory
            return code, self.alpha * adaptation.abs().sum()
        code = code.relu_() if self.rectify else code
        return code, F.l1_loss(code, base_code, reduction="sum")

    def _kept(self, base_code: Tensor) -> Tensor | None:
        """What dropout leaves of the adapters' outputs, as ``dropout_mask`` says; None: all."""
        if not self.training or self.dropout == 0.0:
            return None
        n_rows, n_features = base_code.shape
        return self.share.drawn(n_rows, lambda n: dropout_mask((n, n_features), self.dropout, self.generator))

    def _sparsity(self, codes: Codes) -> Tensor:
        assert codes.sizes is not None
        base_size, change_size = codes.sizes
        penalty = codes.dense.abs().sum() if self.penalty == "code" else base_size
        if self.penalty == "text" and self.alpha != 0.0:
            penalty = penalty + self.alpha * change_size
        return self.sparsity_factor * self.l1_coefficient * penalty / len(codes.dense)  # eqs. 4 and 5

    def _base_reconstruction(self, codes: Codes, scaled: Tensor, rows: Rows) -> Tensor | None:
        if self.base_loss_coefficient == 0.0 or self.alpha == 0.0:
            return None
        assert codes.base_code is not None
        return self.base_loss_coefficient * self._error(self._decoded(codes.base_code, rows), scaled)

    def _from_features(self, code: Tensor | SparseCode) -> Tensor:
        decoded = code @ self.W_dec
        return decoded if self.b_dec is None else decoded + self.b_dec

    def base_parameters(self) -> int:
        """How many numbers are learned outside the adapters."""
        return super().base_parameters() - sum(weight.numel() for weight in self.adapters.parameters())


def dropout_mask(shape: tuple[int, int], rate: float, generator: torch.Generator) -> Tensor:
    """1 for what dropout leaves, 0 for what it takes; uint8 of this shape, where the generator is."""
    if generator.device.type != "cpu":
        mask = torch.empty(shape, dtype=torch.uint8, device=generator.device)
        return mask.bernoulli_(1.0 - rate, generator=generator)
    # Eight times as fast as torch's: 16 bits decide, from a faster generator that torch's seeds.
    seed, n = int(torch.randint(2**62, (), generator=generator)), math.prod(shape)
    bits: NDArray[np.uint64] = np.random.SFC64(seed).random_raw(-(-n // 4))
    is_left = bits.view(np.uint16)[:n] < np.uint16(round((1.0 - rate) * 2**16))
    return torch.as_tensor(is_left.view(np.uint8)).view(shape)
