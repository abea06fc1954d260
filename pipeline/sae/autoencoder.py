"""What every autoencoder shares: weights, units, routing by position, losses.

An architecture adds how rows become codes (``_codes``), what its penalties are (``_sparsity``, and
``_auxiliary`` where it has one), the weights that it alone has, and what all of them are at the start
(``_initialise``); and declares what the rest of posae asks of it: its settings, presets and controls, in the
class attributes of ``Autoencoder``. What the position of a row changes is in two parts that any architecture
can have:
``position_mean``, taken from the store, and ``position_adapter``, learned.

Units: activations come and go raw, as the store has them. Inside, what a position's mean explains is
taken off, and the rest multiplied by ``activation_scale``: the trainer chooses it so that their root mean
square norm is √d_model, because neither a learning rate nor λ means anything without a unit.

Cost: a row costs two products with a matrix [d_model, dictionary_size], and twice that again for
the gradient; memory is a few tensors [rows, dictionary_size]. ``forward`` expects rows sorted by
range, so that each range is a slice; ``encode`` sorts them itself and so copies them.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, NotRequired, TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ...store.errors import SettingsError
from ..ranges import PositionRange, parse_ranges
from ..settings import Preset, TrainSettings
from .position_adapter import PositionAdapter, Rows, empty_weight
from .position_mean import PositionMean
from .share import Share
from .sparse import SparseCode


class Losses(NamedTuple):
    """Scalars in scaled units: summed over features, averaged over rows."""

    total: Tensor
    """The sum of the others: what training makes small (equations 4 and 5)."""
    reconstruction: Tensor
    """‖x - x̂‖², or the norm itself where ``reconstruction_loss`` says so; and what a base code adds to it."""
    sparsity: Tensor
    """The penalty, λ included; 0 where the activation function alone makes codes sparse."""
    auxiliary: Tensor
    """What brings dead features back, its coefficient included; 0 where there is no such loss."""


class Codes(NamedTuple):
    """What rows were encoded to; each [rows, dictionary_size]."""

    code: Tensor | SparseCode
    """What is decoded."""
    base_code: Tensor | None = None
    """h_b, where the architecture has one."""
    sizes: tuple[Tensor, Tensor] | None = None
    """Where there is a base code: its L1 norm, and that of what adapters change in it, summed over rows."""
    activations_of: Callable[[Tensor], Tensor] | None = None
    """Activations of some features, given by number, before the largest were chosen, where they are."""
    is_active: Tensor | None = None
    """1 where a feature is active and 0 elsewhere, with a gradient, where L0 itself is learned."""

    @property
    def dense(self) -> Tensor:
        """``code`` as a tensor of all features."""
        return self.code.dense() if isinstance(self.code, SparseCode) else self.code

    def listed(self) -> "Codes":
        """The same with the code as a list of what is active, where that is less work."""
        code = None if isinstance(self.code, SparseCode) else SparseCode.of(self.code)
        return self if code is None else self._replace(code=code)


class Output(NamedTuple):
    """What one forward pass gives."""

    codes: Codes
    reconstruction: Tensor
    """[rows, d_model], raw units."""
    losses: Losses

    @property
    def code(self) -> Tensor:
        """What is decoded; [rows, dictionary_size]."""
        return self.codes.dense

    @property
    def base_code(self) -> Tensor | None:
        """h_b, where the architecture has one; [rows, dictionary_size]."""
        return self.codes.base_code

    def fired(self) -> Tensor:
        """Which features are not 0 on some row; bool [dictionary_size]."""
        code = self.codes.code
        if isinstance(code, SparseCode):
            return code.fired()
        code, n_first = code.detach(), 256
        fired = (code[:n_first] != 0).any(0)
        if fired.device.type == "cpu" and bool(fired.all()):  # so it is where adapters make codes dense
            return fired
        return fired | (code[n_first:] != 0).any(0)


class CommonSettings(TypedDict):
    """The keywords that every architecture takes; ``Autoencoder.__init__`` explains them."""

    d_model: int
    dictionary_size: int
    ranges: Sequence[PositionRange]
    generator: torch.Generator | None
    activation_scale: NotRequired[float]
    position_mean: NotRequired[str]
    position_adapter: NotRequired[str]
    shared_adapters: NotRequired[bool]
    reconstruction_loss: NotRequired[Literal["squared", "norm"]]
    decoder_norm: NotRequired[Literal["features", "outputs"]]


Setting = bool | int | float | str

_IN_SCALED_UNITS = {"W_dec", "b_dec", "position_adapter.table", "position_adapter.decoder_out"}


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    """Raise SettingsError, saying what is ``wanted`` of the setting ``name``, unless it holds."""
    if not holds:
        raise SettingsError(f"{name} is {value}; it must be {wanted}")


class Autoencoder(nn.Module, ABC):
    """A sparse autoencoder over activations whose positions are known.

    Weights are float32 and named as in SAELens: ``W_enc`` [d_model, dictionary_size], ``b_enc``
    [dictionary_size], ``W_dec`` [dictionary_size, d_model].

    Attributes:
        architecture: its name in settings.
        settings: what it can be set to; the default of ``settings.architecture`` is that name.
        presets: its presets by name; the first is what ``--architecture`` alone stands for.
        agnostic_architecture: the same without the adapters by position that it always has, for controls;
            None where it has none.
        saelens_architecture: what SAELens calls it where positions change nothing; None where it has none.
        expansion: features per number of an activation, where their count is not set.
        is_centred: whether the mean activation is subtracted before encoding, from the start.
        is_calibrated: whether ``calibrate_threshold`` sets its ``threshold`` to its ``target_l0`` at the end.
        ranges: the position ranges, from position 0 to the context length.
        alpha: the curriculum coefficient, alpha_t in the paper; 0 until the trainer sets it.
        activation_scale: what activations are multiplied by on the way in.
        position_mean: what is taken from them before, by position.
        position_adapter: what else a row's range or position changes; comes in with alpha.
        shared_adapters: whether all ranges have the same adapters: the control of a claim that they differ.
        reconstruction_loss: ``squared`` (equations 1, 4, 5), or ``norm``, the norm of each row's error.
        decoder_norm: whose norms are kept at 1: those of ``features``, rows of ``W_dec``, or of ``outputs``,
            its columns: the wrong axis, as in the paper's published scripts.
        sparsity_factor: what penalties for density are multiplied by; 1 but while they are warmed up.
        dead: int64 [dead], features silent for long, rising; None where there are none: the trainer's to say.
        share: what rows of a batch ``forward`` is given: the trainer's to say; all of them by default.
        generator: draws the first weights, then dropout; its state is part of a checkpoint.
    """

    architecture: ClassVar[str]
    settings: ClassVar[type[TrainSettings]]
    presets: ClassVar[Mapping[str, Preset]] = {}
    agnostic_architecture: ClassVar[str | None] = None
    saelens_architecture: ClassVar[str | None] = None
    expansion: ClassVar[int] = 1
    is_centred: ClassVar[bool] = False
    is_calibrated: ClassVar[bool] = False

    def __init__(
        self,
        *,
        d_model: int,
        dictionary_size: int,
        ranges: Sequence[PositionRange],
        generator: torch.Generator | None,
        activation_scale: float = 1.0,
        position_mean: str = "none",
        position_adapter: str = "none",
        shared_adapters: bool = False,
        reconstruction_loss: Literal["squared", "norm"] = "squared",
        decoder_norm: Literal["features", "outputs"] = "features",
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
            position_adapter: ``none``, or forms joined by ``+``; see position_adapter.py.
            shared_adapters: see the attribute.
            reconstruction_loss: see the attribute.
            decoder_norm: see the attribute.

        Raises:
            SettingsError: a size below 1, a number that is negative or not finite, a gap, no such form.
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
        good = reconstruction_loss in ("squared", "norm")
        require(good, "reconstruction_loss", reconstruction_loss, "squared or norm")
        self.reconstruction_loss = reconstruction_loss
        good = decoder_norm in ("features", "outputs")
        require(good, "decoder_norm", decoder_norm, "features or outputs")
        self.decoder_norm = decoder_norm
        self.shared_adapters = shared_adapters
        self.alpha = 0.0
        self.sparsity_factor = 1.0
        self.share = Share()
        self.generator = generator or torch.Generator()
        self.dead: Tensor | None = None
        device = generator.device if generator else torch.device("meta")
        self.position_mean = PositionMean(position_mean, self.ranges, d_model, device)
        self.position_adapter = PositionAdapter(
            position_adapter,
            is_shared=shared_adapters,
            d_model=d_model,
            dictionary_size=dictionary_size,
            n_ranges=len(self.ranges),
            n_positions=self.ranges[-1].stop,
            device=device,
        )
        self._make_encoder(device)
        self.W_dec = empty_weight(dictionary_size, d_model, device=device)

    def _make_encoder(self, device: torch.device) -> None:
        self.W_enc = empty_weight(self.d_model, self.dictionary_size, device=device)
        self.b_enc = empty_weight(self.dictionary_size, device=device)

    @classmethod
    def usual_learning_rate(cls, dictionary_size: int) -> float:
        """The learning rate where it is not set: the paper's."""
        return 3e-4

    @classmethod
    def settings_by_size(
        cls, settings: TrainSettings, untrained: "Callable[[TrainSettings], Autoencoder]"
    ) -> dict[str, Any]:
        """Settings of its own that follow from numbers of parameters.

        Args:
            settings: all others resolved.
            untrained: makes an autoencoder of settings whose weights are only shapes.
        """
        return {}

    @property
    def has_adapters(self) -> bool:
        """Whether something learned differs by position or its range."""
        return self.agnostic_architecture is not None or self.position_adapter.form != "none"

    @torch.no_grad()
    def _start(self) -> None:
        """Give the weights their first values; an architecture's ``__init__`` ends with this."""
        if not self.W_enc.is_meta:
            self._initialise()
            self.position_adapter.initialise(self.generator)

    @abstractmethod
    def _initialise(self) -> None:
        """Fill every weight, drawing from ``generator`` alone."""

    def _tie(self) -> None:
        """Random feature directions of unit norm, and an encoder that is their transpose."""
        nn.init.normal_(self.W_dec, generator=self.generator)
        self.normalise_decoder()
        self.W_enc.copy_(self.W_dec.T)  # where there are several encoders, each of them
        nn.init.zeros_(self.b_enc)

    @torch.no_grad()
    def fit_means(self, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Take the position means from what the store summed up, before training.

        Args:
            sums: of activations by position, raw units; [positions, d_model].
            counts: how many each is over; [positions].
        """
        self.position_mean.fit(sums, counts)

    @property
    def comes_in_with_alpha(self) -> bool:
        """Whether anything changes with alpha."""
        return self.position_adapter.form != "none"

    @abstractmethod
    def _codes(self, scaled: Tensor, rows: Rows) -> Codes:
        """The code that is decoded, and what else there is of it.

        Args:
            scaled: float32 [rows, d_model] in scaled units, sorted by range.
            rows: where they stand.
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

    def _base_reconstruction(self, codes: Codes, scaled: Tensor, rows: Rows) -> Tensor | None:
        """A further loss of reconstruction, averaged over rows; a scalar, or None where there is none."""
        return None

    def _decoded(self, code: Tensor | SparseCode, rows: Rows) -> Tensor:
        """Reconstructions [rows, d_model] in scaled units: W_decᵀ h, and what adapters add."""
        return self.position_adapter.decoded(self._from_features(code), code, rows, self.alpha)

    def _from_features(self, code: Tensor | SparseCode) -> Tensor:
        """W_decᵀ h, and the decoder's bias where there is one; [rows, d_model]."""
        return code @ self.W_dec

    def _scaled(self, x: Tensor, rows: Rows) -> Tensor:
        x = x.to(self.W_enc.dtype)
        if not self.position_mean.is_none:
            x = x - self.position_mean.rows(rows.needed_positions())
        scaled = x if self.activation_scale == 1.0 else x * self.activation_scale
        return self.position_adapter.centred(scaled, rows, self.alpha)

    def _raw(self, decoded: Tensor, rows: Rows) -> Tensor:
        raw = decoded if self.activation_scale == 1.0 else decoded / self.activation_scale
        if self.position_mean.is_none:
            return raw
        return raw + self.position_mean.rows(rows.needed_positions())

    def _error(self, decoded: Tensor, scaled: Tensor) -> Tensor:
        """How far off reconstructions are, averaged over rows; a scalar."""
        if self.reconstruction_loss == "norm":
            # Unlike the root of a sum this has a gradient where nothing is off: 0.
            norms = cast(Tensor, torch.linalg.vector_norm(decoded - scaled, dim=1))  # pyright: ignore[reportUnknownMemberType]
            return norms.mean()
        return F.mse_loss(decoded, scaled, reduction="sum") / len(scaled)

    def forward(
        self, x: Tensor, range_offsets: Sequence[int] | Tensor, positions: Tensor | None = None
    ) -> Output:
        """Encode, decode, and compare.

        Args:
            x: activations [rows, d_model] in raw units, any float dtype, sorted by range.
            range_offsets: int64 [n_ranges + 1], on the CPU: the rows from ``range_offsets[r]`` up
                to ``range_offsets[r + 1]`` lie in range r.
            positions: int64 [rows]; needed only where single positions count (a ``position_mean``, a table, a
                mask).

        Raises:
            SettingsError: positions are needed and not given.
        """
        rows = Rows([int(stop) - int(start) for start, stop in pairwise(range_offsets)], positions)
        scaled = self._scaled(x, rows)
        codes = self._codes(scaled, rows)
        is_scored = not self.training and not torch.is_grad_enabled()
        listed = codes.listed() if is_scored else codes
        decoded = self._decoded(listed.code, rows)
        reconstruction = self._error(decoded, scaled)
        base = self._base_reconstruction(codes, scaled, rows)
        if base is not None:
            reconstruction = reconstruction + base
        sparsity = self._sparsity(codes)
        auxiliary = self._auxiliary(codes, (scaled - decoded).detach())
        losses = Losses(reconstruction + sparsity + auxiliary, reconstruction, sparsity, auxiliary)
        return Output(listed, self._raw(decoded, rows), losses)

    if TYPE_CHECKING:  # torch leaves the result of calling a module untyped

        def __call__(
            self, x: Tensor, range_offsets: Sequence[int] | Tensor, positions: Tensor | None = None
        ) -> Output:
            """As ``forward``."""
            ...

    def encode(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """The codes of activations in any order; call ``eval()`` before, or dropout is on.

        Args:
            x: activations [..., d_model] in raw units, any float dtype.
            positions: integers [...], or of a shape that broadcasts to it; needed only where the position
                changes the code.

        Returns:
            float32 [..., dictionary_size].

        Raises:
            SettingsError: shapes that do not fit, or positions are needed and not given, or one that no range
                contains.
        """
        x_rows = _flat(x, self.d_model, "activations")
        if positions is None:
            rows = Rows([])
            code = self._codes(self._scaled(x_rows, rows), rows).dense
        else:
            order, rows = self._sorted_by_range(_position_of_each(positions, x))
            code = _unsorted(self._codes(self._scaled(x_rows[order], rows), rows).dense, order)
        return code.reshape(*x.shape[:-1], self.dictionary_size)

    def _sorted_by_range(self, positions: Tensor) -> tuple[Tensor, Rows]:
        """The order that sorts ``positions``, int64 of any shape, by range; and what rows there then are."""
        positions = positions.reshape(-1)
        self._check_positions(positions)
        stops = torch.tensor([r.stop for r in self.ranges], device=positions.device)
        range_of_row = torch.bucketize(positions, stops, right=True)
        order = torch.argsort(range_of_row, stable=True)
        n_rows = torch.bincount(range_of_row, minlength=len(self.ranges)).cpu()
        return order, Rows([int(n) for n in n_rows], positions[order])

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
            positions: integers [...], or of a shape that broadcasts to it; needed only where the position or
                its range changes how a code is decoded.

        Raises:
            SettingsError: shapes that do not fit, or positions are needed and not given, or one that no range
                contains.
        """
        code_rows = _flat(code, self.dictionary_size, "codes")
        if positions is not None:
            positions = _position_of_each(positions, code).reshape(-1)
            self._check_positions(positions)
        if positions is None or not self.position_adapter.decodes_by_range:
            rows = Rows([], positions)
            decoded = self._raw(self._decoded(code_rows, rows), rows)
        else:
            order, rows = self._sorted_by_range(positions)
            decoded = _unsorted(self._raw(self._decoded(code_rows[order], rows), rows), order)
        return decoded.reshape(*code.shape[:-1], self.d_model)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring each feature's row of ``W_dec`` to unit norm; the trainer does so after each step."""
        F.normalize(self.W_dec, dim=self._normalised_axis, out=self.W_dec)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Take from the gradient of ``W_dec`` what would change its norms; a trainer may, before a step."""
        gradient = self.W_dec.grad
        assert gradient is not None
        axis = self._normalised_axis
        along = (gradient * self.W_dec).sum(axis, keepdim=True) / self.W_dec.square().sum(axis, keepdim=True)
        gradient -= along * self.W_dec

    @property
    def _normalised_axis(self) -> int:
        return 1 if self.decoder_norm == "features" else 0

    def n_parameters(self) -> int:
        """How many numbers are learned, or taken from the store's means."""
        return sum(weight.numel() for weight in self.parameters()) + self.position_mean.n_numbers()

    def base_parameters(self) -> int:
        """How many of them an autoencoder that ignores positions would have too."""
        return self.n_parameters() - self.position_mean.n_numbers() - self.position_adapter.n_numbers()

    def own_settings(self) -> dict[str, Setting]:
        """The constructor's keywords that are neither sizes nor units: what weights do not tell."""
        return {name: getattr(self, name) for name in self.setting_names()} | {
            "position_mean": self.position_mean.form,
            "position_adapter": self.position_adapter.form,
        }

    @classmethod
    def setting_names(cls) -> list[str]:
        """Of ``own_settings`` those that are attributes."""
        return [*sorted(cls.keywords()), "shared_adapters", "reconstruction_loss"]

    @classmethod
    def keywords(cls) -> set[str]:
        """The constructor's keywords that are this architecture's own."""
        return inspect.signature(cls).parameters.keys() - {"common"}

    @property
    def ignores_positions(self) -> bool:
        """Whether codes are the same at every position, and SAELens has such autoencoders."""
        is_plain = self.position_mean.is_none and self.position_adapter.form == "none"
        return is_plain and self.saelens_architecture is not None

    @property
    def saelens_name(self) -> str:
        """The architecture in ``cfg.json``: SAELens' own where it computes the same, else one of ours.

        SAELens refuses ours, unless ``pipeline/interop/saelens.py`` was imported.
        """
        if self.ignores_positions and self.saelens_architecture:
            return self.saelens_architecture
        return f"posae_{self.architecture}"

    def saelens_settings(self) -> dict[str, Setting]:
        """Further keys that SAELens' architecture has in ``cfg.json``."""
        return {}

    def saelens_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``weights_for_raw_units`` in the shapes and units of SAELens' architecture."""
        return dict(weights)

    def take_saelens_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reverse: weights for ``load_state_dict``. What they are not is left for that to refuse."""
        return dict(weights)

    def weights_for_raw_units(self) -> dict[str, Tensor]:
        """Copies of all weights, by name, for which an ``activation_scale`` of 1 is right.

        With s the scale: W_encᵀ (s·x) = (s·W_enc)ᵀ x, and what is decoded is divided by s. So
        ``W_enc`` is multiplied by s, and what makes or takes off activations is divided by it; codes stay,
        and position means are in raw units already.
        """
        weights = {name: weight.detach().clone() for name, weight in self.state_dict().items()}
        weights["W_enc"] *= self.activation_scale
        for name in weights.keys() & _IN_SCALED_UNITS:
            weights[name] /= self.activation_scale
        return weights


def _flat(values: Tensor, width: int, what: str) -> Tensor:
    """Values [..., width] as [rows, width]."""
    if not values.ndim or values.shape[-1] != width:
        raise SettingsError(
            f"{what} of shape {list(values.shape)} were given; the last axis of this autoencoder's is {width}"
        )
    return values.reshape(-1, width)


def _position_of_each(positions: Tensor, values: Tensor) -> Tensor:
    """The position of each row of values [..., width]; int64 [...]."""
    try:
        return positions.to(values.device, torch.int64).expand(values.shape[:-1])
    except RuntimeError:
        raise SettingsError(
            f"positions of shape {list(positions.shape)} do not fit {list(values.shape[:-1])}: give one to "
            "each row, or one to each position of a context"
        ) from None


def _unsorted(rows: Tensor, order: Tensor) -> Tensor:
    """The reverse of ``rows[order]``."""
    return torch.empty_like(rows).index_copy_(0, order, rows)
