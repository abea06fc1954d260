"""The pass that measures CE loss: held-out contexts through the language model, with activations replaced."""

import torch
from torch import Tensor

from ...harvest.language_model import CausalLanguageModel
from ...progress import Progress
from ...sae.autoencoder import Autoencoder
from ..held_out import HeldOut
from .ce_loss import CeKeeper, Replace, ce_loss
from .evaluation import CeLoss

_LOGIT_NUMBERS = 2**26
"""Logits to hold at once, about: 256 MB."""


def measure_ce_loss(
    held_out: HeldOut, model: CausalLanguageModel, n_contexts: int, progress: Progress
) -> CeLoss:
    """Measure what predictions lose if the model continues from reconstructions, zeros or the mean.

    Args:
        held_out: the run and its contexts.
        model: the store's language model.
        n_contexts: maximum number of contexts.
        progress: of tokens.
    """
    store, length = held_out.store, held_out.store.context_length
    stats = store.stats(held_out.layer)
    mean = torch.as_tensor(stats.sums.sum(axis=0) / max(1, stats.n_tokens)).to(held_out.device)
    start, stop = held_out.start, min(held_out.stop, held_out.start + n_contexts)
    size = max(1, min(32, _LOGIT_NUMBERS // (length * store.manifest.vocabulary_size)))
    keeper = CeKeeper(length)
    progress.begin("splicing", (stop - start) * length, "tokens")
    for first in range(start, stop, size):
        ids = store.tokens(slice(first, min(first + size, stop)))
        is_ordinary = torch.as_tensor(~held_out.is_special(ids)).to(held_out.device)
        tokens = torch.as_tensor(ids).to(held_out.device)
        keeper.add(
            tokens,
            is_ordinary,
            lambda replace, tokens=tokens: model.logits(tokens, held_out.layer, replace),
            {
                "spliced": _spliced(held_out.autoencoder, is_ordinary),
                "zero": torch.zeros_like,
                "mean": lambda x: mean.expand_as(x),
            },
        )
        progress.advance(len(ids) * length)
    progress.end()
    return ce_loss(keeper.sums(), held_out.ranges, model.facts.id, stop - start)


def _spliced(autoencoder: Autoencoder, is_ordinary: Tensor) -> Replace:
    """Replace the activations of ordinary tokens, bool [contexts, positions], by their reconstructions."""

    def replace(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        rebuilt = autoencoder.decode(autoencoder.encode(x, positions), positions)
        return torch.where(is_ordinary[..., None], rebuilt, x.float())

    return replace
