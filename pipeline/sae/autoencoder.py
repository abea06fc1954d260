"""What every autoencoder shares: weights, units, routing by position, losses.

An architecture adds how rows become codes (``_codes``), what its penalties are (``_sparsity``, and
``_auxiliary`` where it has one), the weights that it alone has, and what all of them are at the start
(``_initialise``).

Units: activations come and go raw, as the store has them. Inside, what a position's mean explains is
taken off (``position_mean``), and the rest multiplied by ``activation_scale``: the trainer chooses it
so that their root mean square norm is √d_model, because neither a learning rate nor λ means anything
without a unit.

Cost: a row costs two products with a matrix [d_model, dictionary_size], and twice that again for
the gradient; memory is a few tensors [rows, dictionary_size]. ``forward`` expects rows sorted by
range, so that each range is a slice; ``encode`` sorts them itself and so copies them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ...store.errors import SettingsError
from ...store.ranges import PositionRange, parse_ranges
from .position_mean import PositionMean


class Losses(NamedTuple):
    """Scalars in scaled units: summed over features, averaged over rows."""

    total: Tensor
    """The sum of the others: what training makes small (equations 4 and 5)."""
    reconstruction: Tensor
    """‖x - x̂‖²."""
    sparsity: Tensor
    """The penalty, λ included; 0 where the activation function alone makes codes sparse."""
    auxiliary: Tensor
    """What brings dead features back, its coefficient included; 0 where there is no such loss."""


class Codes(NamedTuple):
    """What rows were encoded to; each [rows, dictionary_size]."""

    code: Tensor
    """What is decoded."""
    base_code: Tensor | None = None
    """h_b, where the architecture has one."""
    before: Tensor | None = None
    """Activations of all features before the largest were chosen, where they are."""


class Output(NamedTuple):
    """What one forward pass gives."""

    code: Tensor
    """[rows, dictionary_size]: what is decoded."""
    reconstruction: Tensor
    """[rows, d_model], raw units."""
    losses: Losses
    base_code: Tensor | None
    """[rows, dictionary_size]: h_b, where the architecture has one."""


class CommonSettings(TypedDict):
    """The keywords that every architecture takes; ``Autoencoder.__init__`` explains them."""

    d_model: int
    dictionary_size: int
    ranges: Sequence[PositionRange]
    generator: torch.Generator | None
    activation_scale: NotRequired[float]
    position_mean: NotRequired[str]


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    """Raise SettingsError, saying what is ``wanted`` of the setting ``name``, unless it holds."""
    if not holds:
        raise SettingsError(f"{name} is {value}; it must be {wanted}")


def _needed(positions: Tensor | None) -> Tensor:
    if positions is None:
        raise SettingsError("this autoencoder takes off position means: give it the position of each row")
    return positions


def empty_weight(*shape: int, device: torch.device) -> nn.Parameter:
    """A weight that has no values yet; float32."""
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))


class Autoencoder(nn.Module, ABC):
    """A sparse autoencoder over activations whose positions are known.

    Weights are float32 and named as in SAELens: ``W_enc`` [d_model, dictionary_size], ``b_enc``
    [dictionary_size], ``W_dec`` [dictionary_size, d_model].

    Attributes:
        architecture: its name in settings.
        saelens_architecture: its name in ``cfg.json``; SAELens opens those that it knows.
        expansion: features for each number of an activation, where none are named.
        is_centred: whether the mean activation is taken off before encoding, from the start.
        ranges: the position ranges, from position 0 to the context length.
        alpha: the curriculum coefficient, alpha_t in the paper; 0 until the trainer sets it.
        activation_scale: what activations are multiplied by on the way in.
        position_mean: what is taken from them before, by position.
        dead: bool [dictionary_size], features silent for long, or None: the trainer's to say.
        generator: draws the first weights, then dropout; its state is part of a checkpoint.
    """

    architecture: ClassVar[str]
    saelens_architecture: ClassVar[str]
    expansion: ClassVar[int] = 1
    is_centred: ClassVar[bool] = False

    def __init__(
        self,
        *,
        d_model: int,
        dictionary_size: int,
        ranges: Sequence[PositionRange],
        generator: torch.Generator | None,
        activation_scale: float = 1.0,
        position_mean: str = "none",
    ) -> None:
        """Make the three weights that all architectures have.

        Args:
            d_model: length of an activation.
            dictionary_size: number of features.
            ranges: follow each other from position 0 without gaps.
            generator: its device becomes that of the weights. None makes weights that have a
                shape and no values (device "meta"): to be counted, or replaced by loaded ones.
            activation_scale: see the attribute.
            position_mean: ``none``, ``range``, ``exact`` or ``lowrank:R``; see position_mean.py.

        Raises:
            SettingsError: a size below 1, a number that is negative or not finite, a gap.
        """
        super().__init__()
        require(d_model >= 1, "d_model", d_model, "at least 1")
        require(dictionary_size >= 1, "dictionary_size", dictionary_size, "at least 1")
        require(0 < activation_scale < math.inf, "activation_scale", activation_scale, "above 0")
        require(len(ranges) > 0, "ranges", ranges, "at least one position range")
        self.d_model = d_model
        self.dictionary_size = dictionary_size
        self.ranges = parse_ranges(",".join(f"{a}:{b}" for a, b in ranges), ranges[-1][1])
        self.activation_scale = activation_scale
        self.alpha = 0.0
        self.generator = generator or torch.Generator()
        self.dead: Tensor | None = None
        device = generator.device if generator else torch.device("meta")
        self.position_mean = PositionMean(position_mean, self.ranges, d_model, device)
        self.W_enc = empty_weight(d_model, dictionary_size, device=device)
        self.b_enc = empty_weight(dictionary_size, device=device)
        self.W_dec = empty_weight(dictionary_size, d_model, device=device)

    @classmethod
    def usual_learning_rate(cls, dictionary_size: int) -> float:
        """What the learning rate is, where none is named: the paper's."""
        return 3e-4

    @torch.no_grad()
    def _start(self) -> None:
        """Give the weights their first values; an architecture's ``__init__`` ends with this."""
        if not self.W_enc.is_meta:
            self._initialise()

    @abstractmethod
    def _initialise(self) -> None:
        """Fill every weight, drawing from ``generator`` alone."""

    def _tie(self) -> None:
        """Random feature directions of unit norm, and an encoder that is their transpose."""
        nn.init.normal_(self.W_dec, generator=self.generator)
        self.normalise_decoder()
        self.W_enc.copy_(self.W_dec.T)
        nn.init.zeros_(self.b_enc)

    @torch.no_grad()
    def fit_means(self, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Take the position means from what the store summed up, before training.

        Args:
            sums: of activations by position, raw units; [positions, d_model].
            counts: how many each is over; [positions].
        """
        self.position_mean.fit(sums, counts)

    @abstractmethod
    def _codes(self, scaled: Tensor, lengths: list[int]) -> Codes:
        """The code that is decoded, and what else there is of it.

        Args:
            scaled: float32 [rows, d_model] in scaled units, sorted by range.
            lengths: rows in each range.
        """

    @abstractmethod
    def _sparsity(self, codes: Codes) -> Tensor:
        """The penalty on these codes, λ included, averaged over rows; a scalar."""

    def _auxiliary(self, codes: Codes, residual: Tensor) -> Tensor:
        """A loss for dead features, its coefficient included, averaged over rows; a scalar.

        Args:
            codes: of the batch.
            residual: x - x̂ in scaled units, without gradient; [rows, d_model].
        """
        return residual.new_zeros(())

    def _decoded(self, code: Tensor) -> Tensor:
        """Reconstructions [rows, d_model] in scaled units: W_decᵀ h."""
        return code @ self.W_dec

    def _scaled(self, x: Tensor, positions: Tensor | None) -> Tensor:
        x = x.to(self.W_enc.dtype)
        if not self.position_mean.is_none:
            x = x - self.position_mean.rows(_needed(positions))
        return x if self.activation_scale == 1.0 else x * self.activation_scale

    def _raw(self, decoded: Tensor, positions: Tensor | None) -> Tensor:
        raw = decoded if self.activation_scale == 1.0 else decoded / self.activation_scale
        return raw if self.position_mean.is_none else raw + self.position_mean.rows(_needed(positions))

    def forward(
        self, x: Tensor, range_offsets: Sequence[int] | Tensor, positions: Tensor | None = None
    ) -> Output:
        """Encode, decode, and compare.

        Args:
            x: activations [rows, d_model] in raw units, any float dtype, sorted by range.
            range_offsets: int64 [n_ranges + 1], on the CPU: the rows from ``range_offsets[r]`` up
                to ``range_offsets[r + 1]`` lie in range r.
            positions: int64 [rows]; needed only where there is a ``position_mean``.

        Raises:
            SettingsError: positions are needed and not given.
        """
        lengths = [int(stop) - int(start) for start, stop in pairwise(range_offsets)]
        scaled = self._scaled(x, positions)
        codes = self._codes(scaled, lengths)
        decoded = self._decoded(codes.code)
        reconstruction = F.mse_loss(decoded, scaled, reduction="sum") / len(x)
        sparsity = self._sparsity(codes)
        auxiliary = self._auxiliary(codes, (scaled - decoded).detach())
        losses = Losses(reconstruction + sparsity + auxiliary, reconstruction, sparsity, auxiliary)
        return Output(codes.code, self._raw(decoded, positions), losses, codes.base_code)

    if TYPE_CHECKING:  # torch leaves the result of calling a module untyped

        def __call__(
            self, x: Tensor, range_offsets: Sequence[int] | Tensor, positions: Tensor | None = None
        ) -> Output:
            """As ``forward``."""
            ...

    def encode(self, x: Tensor, positions: Tensor) -> Tensor:
        """The codes of activations in any order; call ``eval()`` before, or dropout is on.

        Args:
            x: activations [..., d_model] in raw units, any float dtype.
            positions: integers [...], or of a shape that broadcasts to it.

        Returns:
            float32 [..., dictionary_size].

        Raises:
            SettingsError: a position that no range contains.
        """
        positions = positions.to(x.device, torch.int64).expand(x.shape[:-1]).reshape(-1)
        order, lengths = self._sorted_by_range(positions)
        rows = x.reshape(-1, self.d_model)[order]
        sorted_code = self._codes(self._scaled(rows, positions[order]), lengths).code
        code = torch.empty_like(sorted_code).index_copy_(0, order, sorted_code)
        return code.reshape(*x.shape[:-1], self.dictionary_size)

    def _sorted_by_range(self, positions: Tensor) -> tuple[Tensor, list[int]]:
        """The order that sorts ``positions``, int64 [rows], by range; and the rows in each range."""
        self._check_positions(positions)
        stops = torch.tensor([r.stop for r in self.ranges], device=positions.device)
        range_of_row = torch.bucketize(positions, stops, right=True)
        order = torch.argsort(range_of_row, stable=True)
        n_rows = torch.bincount(range_of_row, minlength=len(self.ranges)).cpu()
        return order, [int(n) for n in n_rows]

    def _check_positions(self, positions: Tensor) -> None:
        if bool(((positions < 0) | (positions >= self.ranges[-1].stop)).any()):
            raise SettingsError(
                f"positions lie between {int(positions.min())} and {int(positions.max())}, but "
                f"the ranges of this autoencoder are {', '.join(map(str, self.ranges))}"
            )

    def decode(self, code: Tensor, positions: Tensor | None = None) -> Tensor:
        """Reconstructions [..., d_model] in raw units of codes [..., dictionary_size].

        Args:
            code: float32 [..., dictionary_size].
            positions: integers [...], or of a shape that broadcasts to it; needed only where there is a
                ``position_mean``.

        Raises:
            SettingsError: positions are needed and not given, or one that no range contains.
        """
        if positions is not None:
            positions = positions.to(code.device, torch.int64).expand(code.shape[:-1]).reshape(-1)
            self._check_positions(positions)
        decoded = self._decoded(code.reshape(-1, self.dictionary_size))
        return self._raw(decoded, positions).reshape(*code.shape[:-1], self.d_model)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring each feature's row of ``W_dec`` to unit norm; the trainer does so after each step."""
        F.normalize(self.W_dec, dim=1, out=self.W_dec)

    def n_parameters(self) -> int:
        """How many numbers are learned, or taken from the store's means."""
        return sum(weight.numel() for weight in self.parameters()) + self.position_mean.n_numbers()

    def base_parameters(self) -> int:
        """How many of them an autoencoder that ignores positions would have too."""
        return self.n_parameters() - self.position_mean.n_numbers()

    def own_settings(self) -> dict[str, float]:
        """The architecture's own keywords, which weights do not tell."""
        return {}

    def weights_for_raw_units(self) -> dict[str, Tensor]:
        """Copies of all weights, by name, for which an ``activation_scale`` of 1 is right.

        With s the scale: W_encᵀ (s·x) = (s·W_enc)ᵀ x, and what is decoded is divided by s. So
        ``W_enc`` is multiplied by s, ``W_dec`` and a ``b_dec`` are divided by it; codes stay, and
        position means are in raw units already.
        """
        weights = {name: weight.detach().clone() for name, weight in self.state_dict().items()}
        weights["W_enc"] *= self.activation_scale
        for name in weights.keys() & {"W_dec", "b_dec"}:
            weights[name] /= self.activation_scale
        return weights
