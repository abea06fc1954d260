"""Codes of which few features are active, as lists: products with a matrix for what is active alone.

A code of TopK has some 32 of thousands of features active. Of the six products of a step (encode, decode, and
twice that for the gradient) five touch active features only, so of these each costs
rows · L0 · d_model operations in place of rows · dictionary_size · d_model; the first, which finds the active
ones, stays. On a CPU a step is then 2 to 6 times as fast (docs/benchmarks.md). The results are those of the
dense products but for the order in which numbers are added, which is fixed: same weights on every run.

For CPUs: on a GPU how many features are active would have to be waited for.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Choose = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""From activations [rows, features] to the places of the active ones in the flattened array, rising."""


class Places:
    """Which features of which rows are active.

    Attributes:
        features: of each entry, row after row; int64 [active].
        offsets: row r has the entries from ``offsets[r]`` up to ``offsets[r + 1]``; int64 [rows + 1].
        n_features: the dictionary's size.
    """

    def __init__(self, features: Tensor, offsets: Tensor, n_features: int) -> None:
        """Of lists that fit each other."""
        self.features = features
        self.offsets = offsets
        self.n_features = n_features

    def __len__(self) -> int:
        """Rows."""
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Tensor:
        """Which row each entry is of; int64 [active]."""
        return torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff())

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """What sorts entries by feature [active], and where each feature's begin [n_features + 1]."""
        features = self.features.numpy()
        # Numpy sorts numbers of 16 bits by their digits.
        small = features.astype(np.uint16) if self.n_features <= 2**16 else features
        counts = np.bincount(features, minlength=self.n_features)
        order = np.argsort(small, kind="stable")
        return torch.as_tensor(order), torch.as_tensor(np.concatenate([[0], np.cumsum(counts)]))


class SparseCode:
    """Active features of some rows; ``code @ directions`` is what a dense code would give.

    Attributes:
        values: activations, above 0 or 0; float32 [active].
        places: which features of which rows they are of.
    """

    def __init__(self, values: Tensor, places: Places) -> None:
        """Of what ``encoded`` gives."""
        self.values = values
        self.places = places

    def __len__(self) -> int:
        """Rows."""
        return len(self.places)

    def __matmul__(self, directions: Tensor) -> Tensor:
        """The sum of each row's features' directions, weighted; [rows, n] of [n_features, n]."""
        return cast(Tensor, _Product.apply(self.values, directions, self.places))  # pyright: ignore[reportUnknownMemberType]

    def split(self, lengths: Sequence[int]) -> "list[SparseCode]":
        """Rows one part after another, as ``Tensor.split``."""
        parts: list[SparseCode] = []
        features, offsets = self.places.features, self.places.offsets
        for first, last in pairwise(accumulate(lengths, initial=0)):
            start, stop = int(offsets[first]), int(offsets[last])
            places = Places(features[start:stop], offsets[first : last + 1] - start, self.places.n_features)
            parts.append(SparseCode(self.values[start:stop], places))
        return parts

    def dense(self) -> Tensor:
        """The same with all that is 0; float32 [rows, n_features]."""
        code = self.values.new_zeros(len(self), self.places.n_features)
        return code.index_put((self.places.rows, self.places.features), self.values)

    def fired(self) -> Tensor:
        """Which features are above 0 somewhere; bool [n_features]."""
        found = torch.zeros(self.places.n_features, dtype=torch.bool)
        found[self.places.features[self.values > 0]] = True
        return found


def split(code: Tensor | SparseCode, lengths: list[int]) -> "Sequence[Tensor | SparseCode]":
    """Rows of a code one part after another."""
    return code.split(lengths) if isinstance(code, SparseCode) else torch.split(code, lengths)


def encoded(x: Tensor, W_enc: Tensor, bias: Tensor, choose: Choose) -> SparseCode:
    """ReLU(x W_enc + bias) where ``choose`` says so, 0 elsewhere.

    Args:
        x: float32 [rows, d_model].
        W_enc: [d_model, features].
        bias: [features].
        choose: given all activations, not yet rectified.
    """
    made: list[Places] = []
    values = cast(Tensor, _Encoded.apply(x, W_enc, bias, choose, made))  # pyright: ignore[reportUnknownMemberType]
    return SparseCode(values, *made)


def _sums(of: Tensor, entries: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Of each bag between offsets the weighted sum of rows ``entries`` of ``of``."""
    return F.embedding_bag(
        entries, of.contiguous(), offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


class _Encoded(torch.autograd.Function):
    """x, W_enc, bias -> the chosen activations, rectified; where they are goes into a list."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, x: Tensor, W_enc: Tensor, bias: Tensor, choose: Choose, made: list[Places]
    ) -> Tensor:
        activations = torch.addmm(bias, x, W_enc)
        n_rows, n_features = activations.shape
        chosen = choose(activations.numpy())
        offsets = np.searchsorted(chosen, np.arange(n_rows + 1) * n_features)
        made.append(Places(torch.as_tensor(chosen % n_features), torch.as_tensor(offsets), n_features))
        values = activations.view(-1)[torch.as_tensor(chosen)].relu_()
        ctx.places = made[0]
        ctx.save_for_backward(x, W_enc, values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        places: Places = ctx.places
        x, W_enc, values = cast("tuple[Tensor, Tensor, Tensor]", ctx.saved_tensors)
        gradient = torch.where(values > 0, gradients[0], 0)
        order, offsets = places.by_feature
        of_encoder = _sums(x, places.rows[order], offsets, gradient[order]).T
        of_bias = torch.zeros_like(W_enc[0]).index_add_(0, places.features, gradient)
        of_x = _sums(W_enc.T, places.features, places.offsets, gradient) if ctx.needs_input_grad[0] else None
        return of_x, of_encoder, of_bias, None, None


class _Product(torch.autograd.Function):
    """values, directions -> the dense code times directions."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, directions: Tensor, places: Places) -> Tensor:  # pyright: ignore
        ctx.places = places
        ctx.save_for_backward(values, directions)
        return _sums(directions, places.features, places.offsets, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        places: Places = ctx.places
        values, directions = cast("tuple[Tensor, Tensor]", ctx.saved_tensors)
        gradient = gradients[0].contiguous()
        order, offsets = places.by_feature
        of_directions = _sums(gradient, places.rows[order], offsets, values[order])
        return _at_entries(gradient, directions, places), of_directions, None


def _at_entries(left: Tensor, right: Tensor, places: Places) -> Tensor:
    """Of left @ right.T what stands at some places; [active]."""
    if not torch.backends.mkl.is_available():
        return (left @ right.T)[places.rows, places.features]
    size = (len(places), places.n_features)
    zeros = left.new_zeros(len(places.features))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        at = torch.sparse_csr_tensor(  # pyright: ignore[reportUnknownMemberType]
            places.offsets, places.features, zeros, size, check_invariants=False
        )
        product = torch.sparse.sampled_addmm(at, left, right.T, beta=0.0)  # pyright: ignore
        return cast(Tensor, product.values())  # pyright: ignore[reportUnknownMemberType]
