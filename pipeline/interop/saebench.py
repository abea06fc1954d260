"""A run in the form of a SAEBench autoencoder, so that its sparse probing can score it with positions.

SAEBench passes only activations [contexts, positions, d_model], so the position of a token is its column.
That is correct only if texts are padded on the right; left padding is refused where it can be detected.
SAEBench and SAELens must be installed, and take seconds to import.
"""

from pathlib import Path
from typing import Any

import torch
from sae_bench.custom_saes.base_sae import BaseSAE
from torch import Tensor

from ...store.errors import SettingsError
from ..harvest.hooks import layer_of
from ..sae.foreign import read_metadata
from ..sae.saving import load_autoencoder


class SAEBenchAutoencoder(BaseSAE):
    """The autoencoder of a run; rows of ``W_dec`` have unit norm, and codes are in units of activations.

    Attributes:
        autoencoder: from ``load_autoencoder``; a code here is its code times ``norms``.
        norms: length of each feature's row in its decoder; [d_sae].
    """

    norms: Tensor

    def __init__(
        self,
        run: Path | str,
        *,
        model_name: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        tokenizer: Any = None,
    ) -> None:
        """Load the autoencoder of ``run``.

        Args:
            run: its folder.
            model_name: SAEBench's name of the language model; by default the run's.
            device: of the weights.
            dtype: of its weights, and of codes.
            tokenizer: pads the texts; given to check its padding side.

        Raises:
            RunNotFoundError: there is no autoencoder.
            RunError: a file is damaged.
            SettingsError: the tokenizer pads on the left, or the run does not record its model and layer.
        """
        if tokenizer is not None and tokenizer.padding_side != "right":
            raise SettingsError(
                f"the tokenizer pads on the {tokenizer.padding_side}, where a token's column is not its "
                'position; set tokenizer.padding_side = "right"'
            )
        autoencoder = load_autoencoder(run)
        said = read_metadata(Path(run))
        layer = layer_of(said.hook_name or "")
        name = model_name or said.model_name
        if layer is None or name is None:
            raise SettingsError(f"{run} does not record its layer and model; give a run trained by posae")
        super().__init__(
            d_in=autoencoder.d_model,
            d_sae=autoencoder.dictionary_size,
            model_name=name,
            hook_layer=layer,
            device=torch.device(device),
            dtype=dtype,
        )
        self.cfg.architecture = autoencoder.saelens_name
        self.cfg.context_size = autoencoder.ranges[-1].stop
        self.autoencoder = autoencoder.requires_grad_(False)
        norms = autoencoder.W_dec.square().sum(1).sqrt().clamp(min=1e-8)
        self.register_buffer("norms", norms)
        self.W_dec.data = autoencoder.W_dec / norms[:, None]
        if autoencoder.W_enc.ndim == 2:  # of several encoders there is no one to show
            self.W_enc.data = autoencoder.W_enc * norms
            self.b_enc.data = autoencoder.b_enc * norms
        b_dec: Tensor | None = getattr(autoencoder, "b_dec", None)
        if b_dec is not None:
            self.b_dec.data = b_dec.detach().clone()
        self.requires_grad_(False)
        self.to(device=self.device, dtype=dtype)

    def _positions(self, x: Tensor) -> Tensor:
        """The position of each activation of [..., d_in]; a shape that broadcasts to [...].

        Raises:
            SettingsError: the columns are not the positions.
        """
        if self.autoencoder.ignores_positions:
            return torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
        length = self.autoencoder.ranges[-1].stop
        if x.ndim != 3:
            raise SettingsError(
                f"{self.autoencoder.saelens_name} needs to know positions: give activations [contexts, "
                f"positions, {self.cfg.d_in}], not {list(x.shape)}"
            )
        if x.shape[1] > length:
            raise SettingsError(
                f"contexts of {x.shape[1]} tokens, and the autoencoder knows {length} positions; set "
                f"SAEBench's context_length to {length} or less"
            )
        if x.shape[1] > 2:
            masked = (x == 0).all(dim=2)
            if bool((masked[:, 0] & masked[:, 1] & ~masked[:, -1]).any()):
                raise SettingsError(
                    "texts are padded on the left, where a token's column is not its position; set "
                    'tokenizer.padding_side = "right" before activations are collected'
                )
        return torch.arange(x.shape[1], device=x.device)

    def encode(self, x: Tensor) -> Tensor:
        """Codes [..., d_sae] of activations [..., d_in] in raw units.

        Args:
            x: [contexts, positions, d_in], padded on the right; masked tokens are 0. Any shape if positions
                do not matter.

        Raises:
            SettingsError: positions matter but are unknown, or are beyond the context length.
        """
        return self.autoencoder.encode(x, self._positions(x)) * self.norms

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstructions [..., d_in] in raw units of codes [..., d_sae], shaped as for ``encode``.

        Raises:
            SettingsError: positions matter but are unknown, or are beyond the context length.
        """
        # An all-zero code does not indicate padding: only columns matter here.
        at = self._positions(torch.ones_like(feature_acts[..., :1]))
        return self.autoencoder.decode(feature_acts / self.norms, at)

    def forward(self, x: Tensor) -> Tensor:
        """``decode`` of ``encode``.

        Raises:
            SettingsError: positions matter but are unknown, or are beyond the context length.
        """
        return self.decode(self.encode(x))
