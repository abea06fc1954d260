"""What became of the base: of its code under the adapters, and of its decoder since the warm-up.

Cost: of ``retained`` two searches for the largest numbers of each row; of ``drift`` the decoder in memory.
"""

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from ...errors import RunError

BASE_PHASE = "base_phase.safetensors"
MOST_RETAINED = 32


def n_retained(dictionary_size: int) -> int:
    """How many of a token's largest features retention asks for.

    >>> n_retained(128), n_retained(64), n_retained(2)
    (32, 16, 1)
    """
    return max(1, min(MOST_RETAINED, dictionary_size // 4))


def retained(base_code: Tensor, code: Tensor) -> tuple[float, int]:
    """Shares of each row's largest base features that are among the largest of its code, added up.

    Args:
        base_code: h_b, nothing below 0; [rows, features].
        code: h_r, compared by size; [rows, features].

    Returns:
        The sum of the shares, and the rows that it is over: those with a base feature above 0. Where a row
        has fewer than are asked for, the share is of those.
    """
    n = n_retained(code.shape[1])
    values, places = base_code.topk(n, dim=1)
    is_large = torch.zeros_like(code, dtype=torch.bool).scatter_(1, code.abs().topk(n, dim=1).indices, True)
    there = values > 0
    kept = (is_large.gather(1, places) & there).sum(1)
    n_there = there.sum(1)
    shares = kept.double() / n_there.clamp(min=1)
    return float(shares.sum()), int((n_there > 0).sum())


def base_decoder(folder: Path) -> Tensor | None:
    """``W_dec`` at the end of the warm-up, float32 [features, d_model]; None where the run kept none.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / BASE_PHASE
    if not path.exists():
        return None
    try:
        return safetensors.torch.load(path.read_bytes())["W_dec"].float()
    except (SafetensorError, KeyError, OSError) as error:
        raise RunError(f"{path} is damaged ({error}); train the run anew") from None


def drift(decoder: Tensor, base: Tensor) -> tuple[float, float]:
    """Mean cosine of each feature's direction with what it was, and the share of cosines above .9.

    Args:
        decoder: ``W_dec``, of any scale; [features, d_model].
        base: the same at the end of the warm-up.

    Raises:
        RunError: they are of different shapes.
    """
    if decoder.shape != base.shape:
        raise RunError(
            f"{BASE_PHASE} holds a decoder {list(base.shape)}, and this run has one {list(decoder.shape)}; "
            "train the run anew"
        )
    cosines = F.cosine_similarity(decoder.double(), base.to(decoder.device).double(), dim=1)
    return float(cosines.mean()), float((cosines > 0.9).double().mean())
