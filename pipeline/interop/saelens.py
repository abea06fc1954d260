"""Position-aware runs for SAELens; importing this module registers their architectures there.

``SAE.load_from_disk(RUN)`` then opens them as ``posae_hierarchical``, ``posae_batchtopk`` and so on; runs
without positions are SAELens' own architectures and do not need this. Positions are passed explicitly, by
``sae.encode(x, positions)``, or by ``with sae.at(positions):`` for code that does not pass them; without them
calls raise an error. Dropout, and BatchTopK's choice among the tokens of a batch, are off.

SAELens must be installed (``pip install sae-lens``); importing it takes some seconds.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sae_lens import SAE, SAEConfig
from sae_lens.registry import register_sae_class
from torch import Tensor

from ...store.errors import SettingsError
from ..sae.autoencoder import Autoencoder
from ..sae.registry import ARCHITECTURES
from ..sae.saving import without_values

_WITHIN = "autoencoder."


@dataclass
class PositionAwareConfig(SAEConfig):
    """SAELens' configuration, with posae's part of ``cfg.json`` under ``posae``."""

    posae: dict[str, Any] = field(default_factory=dict[str, Any])


class PositionAwareSAE(SAE[PositionAwareConfig]):
    """An autoencoder of posae with SAELens' methods and hooks; made by ``SAE.load_from_disk``.

    Attributes:
        autoencoder: as from ``load_autoencoder``.
    """

    autoencoder: Autoencoder
    _positions: Tensor | None = None

    def initialize_weights(self) -> None:
        """Make the weights, without values; SAELens calls this.

        Raises:
            RunError: posae has not saved such a configuration.
        """
        # Weights stay as they were saved, whatever form they take for use.
        configuration = self.cfg.to_dict() | {"dtype": "float32"}
        self.autoencoder = without_values(configuration, "SAELens' configuration")

    @property
    def W_enc(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[d_in, d_sae]; of ``separate`` [ranges, d_in, d_sae]."""
        return self.autoencoder.W_enc

    @property
    def W_dec(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[d_sae, d_in]."""
        return self.autoencoder.W_dec

    @property
    def b_dec(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[d_in]; zeros where there is none."""
        found: Tensor | None = getattr(self.autoencoder, "b_dec", None)
        return self.W_dec.new_zeros(self.cfg.d_in) if found is None else found

    @contextmanager
    def at(self, positions: Tensor) -> Generator["PositionAwareSAE"]:
        """A context in which ``encode``, ``decode`` and calls use these positions by default.

        Args:
            positions: integers of a shape that broadcasts to that of the activations without d_in: for
                [contexts, positions, d_in] as a language model gives them, ``torch.arange(length)``.
        """
        before, self._positions = self._positions, positions
        try:
            yield self
        finally:
            self._positions = before

    def encode(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Codes [..., d_sae] of activations [..., d_in].

        Args:
            x: in raw units, any float dtype.
            positions: integers of a shape that broadcasts to [...].

        Raises:
            SettingsError: no positions, here or from ``at``; or one beyond the context length.
        """
        if positions is None:
            positions = self._positions
        if positions is None:
            raise SettingsError(
                f"{self.cfg.architecture()} needs the position of each activation; give them to encode, or "
                "call within `with sae.at(positions):`"
            )
        x = self.hook_sae_input(x.to(self.dtype))
        return self.hook_sae_acts_post(self.autoencoder.encode(x, positions))

    def decode(self, feature_acts: Tensor, positions: Tensor | None = None) -> Tensor:
        """Reconstructions [..., d_in] in raw units of codes [..., d_sae].

        Args:
            feature_acts: what ``encode`` gave.
            positions: as for ``encode``; needed where the position changes how a code is decoded.

        Raises:
            SettingsError: no positions and they are needed; or one beyond the context length.
        """
        at = self._positions if positions is None else positions
        return self.hook_sae_recons(self.autoencoder.decode(feature_acts, at))

    def train(self, mode: bool = True) -> "PositionAwareSAE":
        """As in torch, except that the autoencoder stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Name weights as they are in a run."""
        for name in list(state_dict):
            state_dict[name.removeprefix(_WITHIN)] = state_dict.pop(name).contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Name weights as they are here."""
        for name in list(state_dict):
            state_dict[_WITHIN + name] = state_dict.pop(name)

    def _refuse_folding(self, *_: object, **__: object) -> NoReturn:
        """Refuse: norms and scales cannot be moved between the weights of position-aware autoencoders.

        Raises:
            NotImplementedError: always; SAELens expects it.
        """
        raise NotImplementedError(f"norms cannot be folded into the weights of {self.cfg.architecture()}")

    fold_W_dec_norm = _refuse_folding
    fold_and_get_W_dec_norm = _refuse_folding
    fold_activation_norm_scaling_factor = _refuse_folding
    fold_activation_whitening = _refuse_folding


def _register(name: str) -> None:
    @dataclass
    class Config(PositionAwareConfig):
        @classmethod
        def architecture(cls) -> str:
            return name

    register_sae_class(name, PositionAwareSAE, Config)


_registered: set[str] = set()


def register_architectures() -> None:
    """Have SAELens open all architectures of posae's registry; call it again for one that was added since."""
    for architecture in ARCHITECTURES.keys() - _registered:
        _register(f"posae_{architecture}")
        _registered.add(architecture)


register_architectures()
