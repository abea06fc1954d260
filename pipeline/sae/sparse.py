"""Codes of which few features are active, as lists: products with a matrix for what is active alone.

A code of TopK has some 32 of thousands of features active. Of the six products of a step (encode, decode, and
twice that for the gradient) five touch active features only, so of these each costs
rows · L0 · d_model operations in place of rows · dictionary_size · d_model; the first, which finds the active
ones, stays. On a CPU a step is then 2 to 6 times as fast (docs/benchmarks.md). The results are those of the
dense products but for the order in which numbers are added, which is fixed: same weights on every run.

On a GPU, whose dense products are fast beside its memory, lists are used only for far fewer active features
(``ARE_FEW``), and nothing is waited for: how many features are listed is known beforehand.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Choose = Callable[[Tensor], Tensor]
"""From activations [rows, features] to the places of the active ones in the flattened array, int64, rising;
what is at such a place and shall not be active is set to 0."""

ARE_FEW = {"cpu": 8, "cuda": 256}
"""Lists are less work where so many times as many features exist as are active. For a GPU by arithmetic, not
measured: a listed feature reads d_model numbers, 100 operations of a dense product to a byte."""

_ARE_FEW_TO_SCORE = 16
"""The same of codes that are only scored; one number, so that scores are the same wherever they are made."""

_NUMBERS_AT_ONCE = 2**26
"""Of rows that are gathered on a GPU."""


def are_few(n_active: float, n_features: int, device: torch.device) -> bool:
    """Whether lists are less work, with so many of the features active in a row."""
    return device.type in ARE_FEW and n_active * ARE_FEW[device.type] <= n_features


class Places:
    """Which features of which rows are active.

    Attributes:
        features: of each entry, row after row; int64 [active].
        offsets: row r has the entries from ``offsets[r]`` up to ``offsets[r + 1]``; int64 [rows + 1].
        n_features: the dictionary's size.
    """

    def __init__(self, features: Tensor, offsets: Tensor, n_features: int) -> None:
        """Of lists that fit each other, on one device."""
        self.features = features
        self.offsets = offsets
        self.n_features = n_features

    @classmethod
    def of(cls, flat: Tensor, n_rows: int, n_features: int) -> "Places":
        """From the places in the flattened [rows, features], int64 [active], rising."""
        edges = torch.arange(n_rows + 1, device=flat.device) * n_features
        return cls(flat % n_features, torch.searchsorted(flat, edges), n_features)

    def __len__(self) -> int:
        """Rows."""
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Tensor:
        """Which row each entry is of; int64 [active]."""
        each = torch.arange(len(self), device=self.offsets.device)
        return torch.repeat_interleave(each, self.offsets.diff(), output_size=len(self.features))

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """What sorts entries by feature [active], and where each feature's begin [n_features + 1]."""
        if self.features.device.type != "cpu":
            ordered, order = self.features.sort(stable=True)
            edges = torch.arange(self.n_features + 1, device=ordered.device)
            return order, torch.searchsorted(ordered, edges)
        features = self.features.numpy()
        # Numpy sorts numbers of 16 bits by their digits.
        small = features.astype(np.uint16) if self.n_features <= 2**16 else features
        counts = np.bincount(features, minlength=self.n_features)
        order = np.argsort(small, kind="stable")
        return torch.as_tensor(order), torch.as_tensor(np.concatenate([[0], np.cumsum(counts)]))


class SparseCode:
    """Active features of some rows; ``code @ directions`` is what a dense code would give.

    Attributes:
        values: activations; float32 [active]. Some may be 0.
        places: which features of which rows they are of.
    """

    def __init__(self, values: Tensor, places: Places) -> None:
        """Of lists that fit each other."""
        self.values = values
        self.places = places

    @classmethod
    def of(cls, code: Tensor) -> "SparseCode | None":
        """What is not 0 in a code [rows, n_features] that is scored; None where lists would be more work.

        A GPU is waited for.
        """
        n_most = code.numel() // _ARE_FEW_TO_SCORE
        if code.device.type == "cpu":  # numpy finds them several times as fast
            is_active = code.numpy() != 0
            if np.count_nonzero(is_active) > n_most:
                return None
            flat = torch.as_tensor(np.flatnonzero(is_active))
        else:
            is_there = code.flatten() != 0
            if int(is_there.sum()) > n_most:
                return None
            flat = is_there.nonzero()[:, 0]
        return cls(code.reshape(-1)[flat], Places.of(flat, *code.shape))

    def __len__(self) -> int:
        """Rows."""
        return len(self.places)

    def __matmul__(self, directions: Tensor) -> Tensor:
        """The sum of each row's features' directions, weighted; [rows, n] of [n_features, n]."""
        return cast(Tensor, _Product.apply(self.values, directions, self.places))  # pyright: ignore[reportUnknownMemberType]

    def split(self, lengths: Sequence[int]) -> "list[SparseCode]":
        """Rows one part after another, as ``Tensor.split``; a GPU is waited for."""
        parts: list[SparseCode] = []
        features, offsets = self.places.features, self.places.offsets
        for first, last in pairwise(accumulate(lengths, initial=0)):
            start, stop = int(offsets[first]), int(offsets[last])
            places = Places(features[start:stop], offsets[first : last + 1] - start, self.places.n_features)
            parts.append(SparseCode(self.values[start:stop], places))
        return parts

    def of_rows(self, rows: Tensor) -> "SparseCode":
        """Some of the rows, in their order; int64 [rows], rising. A GPU is waited for."""
        number = torch.full((len(self),), -1, device=rows.device)
        number[rows] = torch.arange(len(rows), device=rows.device)
        row = number[self.places.rows]
        is_kept = row >= 0
        flat = row[is_kept] * self.places.n_features + self.places.features[is_kept]
        return SparseCode(self.values[is_kept], Places.of(flat, len(rows), self.places.n_features))

    def dense(self) -> Tensor:
        """The same with all that is 0; float32 [rows, n_features]."""
        code = self.values.new_zeros(len(self), self.places.n_features)
        return code.index_put((self.places.rows, self.places.features), self.values)

    def fired(self) -> Tensor:
        """Which features are not 0 somewhere; bool [n_features]."""
        values, features = self.values.detach(), self.places.features
        # Not by indexing with booleans, for which a GPU must be waited for.
        n_times = torch.zeros(self.places.n_features, dtype=torch.int32, device=values.device)
        return n_times.index_add_(0, features, (values != 0).int()) > 0

    def n_active(self, above: float = 0.0) -> Tensor:
        """How many features of each row are larger than ``above`` in size; int64 [rows]."""
        is_active = (self.values.abs() > above).long()
        return is_active.new_zeros(len(self)).index_add_(0, self.places.rows, is_active)


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
        chosen = choose(activations)
        made.append(Places.of(chosen, *activations.shape))
        values = activations.view(-1)[chosen].relu_()
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
        if x.device.type == "cpu":
            of_bias = torch.zeros_like(W_enc[0]).index_add_(0, places.features, gradient)
        else:  # where that adds in any order
            of_bias = _sums(x.new_ones(len(x), 1), places.rows[order], offsets, gradient[order])[:, 0]
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
    if left.device.type != "cpu":
        size = max(1, _NUMBERS_AT_ONCE // left.shape[1])
        parts = zip(torch.split(places.rows, size), torch.split(places.features, size), strict=True)
        return torch.cat([(left[rows] * right[features]).sum(1) for rows, features in parts])
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
