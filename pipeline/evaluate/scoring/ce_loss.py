"""What the language model loses if it runs on with what the autoencoder reconstructs.

Cross-entropy (CE) of the next token, in nats, of the model as it is (clean), with reconstructions in the
activations' place (spliced), with zeros, and with the mean activation; and the divergence KL(clean ‖ spliced)
of what it predicts. As in SAELens, tokens that training leaves out keep their activations when spliced, and
what they predict is not counted; zeros and the mean replace those of every token.

Cost: four passes through the whole model, and two tensors [contexts, positions, vocabulary] in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .evaluation import CeLoss

Floats = NDArray[np.float64]

Replace = Callable[[Tensor], Tensor]
"""From activations [contexts, positions, d_model] to what is put in their place."""

Logits = Callable[[Replace | None], Tensor]
"""Logits [contexts, positions, vocabulary] of a batch, with activations replaced or as they are."""


class CeSums(NamedTuple):
    """By position of the token that predicts, the last of which predicts nothing; or by range."""

    n: Floats
    """Predictions."""
    ce: dict[str, Floats]
    """CE in nats, added up: ``clean`` and each replacement."""
    kl: dict[str, Floats]
    """KL(clean ‖ replaced) in nats, added up."""

    def by_range(self, ranges: Sequence[tuple[int, int]]) -> "CeSums":
        """The same by range instead of by position."""

        def merged(values: Floats) -> Floats:
            return np.array([values[start:stop].sum() for start, stop in ranges])

        return CeSums(
            merged(self.n),
            {name: merged(values) for name, values in self.ce.items()},
            {name: merged(values) for name, values in self.kl.items()},
        )

    def mean(self, sums: Floats) -> Sequence[float]:
        """A prediction's share of sums; NaN where there is no prediction."""
        return np.divide(sums, self.n, out=np.full_like(sums, np.nan), where=self.n > 0).tolist()


class CeKeeper:
    """Adds up ``CeSums``, batch by batch."""

    def __init__(self, context_length: int) -> None:
        """Begin with no predictions."""
        self._length = context_length
        self._n = np.zeros(context_length)
        self._ce: dict[str, Floats] = {}
        self._kl: dict[str, Floats] = {}

    @torch.inference_mode()
    def add(
        self, tokens: Tensor, is_counted: Tensor, logits: Logits, replacements: Mapping[str, Replace]
    ) -> None:
        """Add some contexts.

        Args:
            tokens: ids [contexts, positions].
            is_counted: bool [contexts, positions]: whether what a token predicts is counted.
            logits: of these contexts.
            replacements: by name, what the activations are replaced by.
        """
        target = tokens[:, 1:, None].long()
        counted = is_counted[:, :-1]
        self._n[:-1] += counted.sum(0).cpu().numpy()
        clean = torch.log_softmax(logits(None)[:, :-1].float(), dim=-1)
        self._add(self._ce, "clean", -clean.gather(-1, target)[..., 0], counted)
        for name, replace in replacements.items():
            replaced = torch.log_softmax(logits(replace)[:, :-1].float(), dim=-1)
            self._add(self._ce, name, -replaced.gather(-1, target)[..., 0], counted)
            # In place: of a large vocabulary each such tensor is a good part of the memory.
            divergence = replaced.neg_().add_(clean).mul_(clean.exp()).sum(-1)
            self._add(self._kl, name, divergence, counted)

    def _add(self, to: dict[str, Floats], name: str, values: Tensor, counted: Tensor) -> None:
        sums = to.setdefault(name, np.zeros(self._length))
        sums[:-1] += torch.where(counted, values.double(), 0).sum(0).cpu().numpy()

    def sums(self) -> CeSums:
        """Of all contexts added so far."""
        return CeSums(self._n, self._ce, self._kl)


def ce_loss(sums: CeSums, ranges: Sequence[tuple[int, int]], model: str, n_contexts: int) -> CeLoss:
    """The scores, of replacements called ``spliced``, ``zero`` and ``mean``.

    Args:
        sums: of all contexts.
        ranges: position ranges.
        model: name of the language model.
        n_contexts: how many contexts the sums are over.
    """
    total, by_range = sums.by_range([(0, len(sums.n))]), sums.by_range(ranges)
    ce = {name: total.mean(values)[0] for name, values in total.ce.items()}
    clean, spliced, zero = (by_range.mean(by_range.ce[name]) for name in ("clean", "spliced", "zero"))
    return CeLoss(
        model=model,
        contexts=n_contexts,
        n_rows=int(total.n[0]),
        clean=ce["clean"],
        spliced=ce["spliced"],
        zero=ce["zero"],
        mean=ce["mean"],
        recovered=recovered(ce["clean"], ce["spliced"], ce["zero"]),
        recovered_of_mean=recovered(ce["clean"], ce["spliced"], ce["mean"]),
        kl=total.mean(total.kl["spliced"])[0],
        kl_zero=total.mean(total.kl["zero"])[0],
        clean_by_range=[*clean],
        spliced_by_range=[*spliced],
        recovered_by_range=[recovered(*three) for three in zip(clean, spliced, zero, strict=True)],
        kl_by_range=[*by_range.mean(by_range.kl["spliced"])],
    )


def recovered(clean: float, replaced: float, zero: float) -> float:
    """CE loss recovered: 1 where what replaces costs nothing, 0 where it is as bad as ``zero``; else NaN.

    >>> recovered(2.0, 2.5, 7.0)
    0.9
    """
    return (zero - replaced) / (zero - clean) if zero != clean else float("nan")
