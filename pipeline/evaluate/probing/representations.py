"""The numbers that probes see: activations as they are, and the codes that an autoencoder makes of them."""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .protocol import Fetch, Rows

ACTIVATIONS, CODES = "activations", "codes"
"""Names of what is probed, in results."""

_BATCH_ROWS = 1024


class Encoder(Protocol):
    """What is used of an autoencoder."""

    dictionary_size: int

    def encode(self, x: Tensor, positions: Tensor) -> Tensor:
        """Codes [rows, dictionary_size] of activations [rows, d_model], each at its position."""
        ...


@torch.no_grad()
def encoded(
    autoencoder: Encoder, x: NDArray[np.float32], positions: NDArray[np.int64], device: torch.device
) -> NDArray[np.float32]:
    """Codes of activations, some rows at a time; [rows, d_model] to [rows, dictionary_size]."""
    codes = np.empty((len(x), autoencoder.dictionary_size), np.float32)
    for start in range(0, len(x), _BATCH_ROWS):
        part = slice(start, start + _BATCH_ROWS)
        rows, at = torch.as_tensor(x[part]), torch.as_tensor(positions[part])
        codes[part] = autoencoder.encode(rows.to(device), at.to(device)).float().cpu().numpy()
    return codes


def of_tokens(
    autoencoder: Encoder, bits: NDArray[np.uint16], positions: NDArray[np.int64], device: torch.device
) -> dict[str, Fetch]:
    """What is probed of single tokens; codes are made when they are asked for.

    Args:
        autoencoder: in ``eval()``.
        bits: bfloat16 activations of all rows of a task; [rows, d_model].
        positions: of each row in its context; [rows].
        device: of the autoencoder.
    """

    def activations(rows: Rows) -> NDArray[np.float32]:
        return (bits[rows].astype(np.uint32) << 16).view(np.float32)

    def codes(rows: Rows) -> NDArray[np.float32]:
        return encoded(autoencoder, activations(rows), positions[rows], device)

    return {ACTIVATIONS: activations, CODES: codes}


class Means:
    """Means over the tokens of contexts or texts, of activations and of codes; both kept whole."""

    def __init__(self, autoencoder: Encoder, device: torch.device) -> None:
        """Begin with no rows."""
        self._autoencoder, self._device = autoencoder, device
        self._activations: list[NDArray[np.float32]] = []
        self._codes: list[NDArray[np.float32]] = []

    def __len__(self) -> int:
        """Rows so far."""
        return len(self._codes)

    def add(self, x: NDArray[np.float32], positions: NDArray[np.int64]) -> None:
        """Add a row: the mean of these tokens, [tokens, d_model] at [tokens]; at least one."""
        self._activations.append(x.mean(0))
        self._codes.append(encoded(self._autoencoder, x, positions, self._device).mean(0))

    def probed(self) -> dict[str, Fetch]:
        """What is probed of the rows."""
        activations, codes = np.stack(self._activations), np.stack(self._codes)
        return {ACTIVATIONS: lambda rows: activations[rows], CODES: lambda rows: codes[rows]}
