"""LayerNorm and what comes after it, by blocks of rows that stay in the processor's cache.

Beside its products the paper's autoencoder goes over tensors [rows, features], each larger than a cache,
some thirty times a step: LayerNorm, ReLU, dropout, sums, and as much again for the gradient. Here all of it
is done to some rows before the next are read, and gradients are written out by hand. Kept for them are what
went into a LayerNorm and a byte for each number of dropout; what came out is made again.

For CPUs, LayerNorms with a gain and a bias, and gradients of the first order. Results are those of the plain
operations but for the order in which numbers are added, which is fixed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BLOCK = 2**20
"""Numbers of a block: 4 MiB. Smaller ones fit a nearer cache, and have more threads wait for each other."""
_EPS = 1e-5
"""Of LayerNorms, as ``nn.LayerNorm`` has it."""


class AdapterWeights(NamedTuple):
    """f_r of equation 3 and the LayerNorm behind it; k is the dictionary's size, m the adapter's width."""

    W_in: Tensor
    """[k, m]."""
    b_in: Tensor
    """[m]."""
    W_out: Tensor
    """[m, k]."""
    b_out: Tensor
    """[k], as are the LayerNorm's."""
    gain: Tensor
    bias: Tensor


class Change(NamedTuple):
    """How an adapter's output is added to the base code."""

    lengths: Sequence[int]
    """Rows of each adapter, one after the other; they sum to all."""
    alpha: float
    """Above 0."""
    scale: float
    """What dropout leaves is multiplied by it."""


def by_blocks(x: Tensor) -> bool:
    """Whether what is in this file can be done to ``x``, and pays: the smaller stays in the cache anyway."""
    is_large = x.numel() > _BLOCK
    return is_large and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def rectified(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """ReLU(LayerNorm(x)), [rows, features] as ``x`` is, and the sum of all its numbers.

    Args:
        x: float, [rows, features].
        norm: with a gain and a bias.
    """
    return cast("tuple[Tensor, Tensor]", _Rectified.apply(x, norm.weight, norm.bias))  # pyright: ignore


def adapted(
    base_code: Tensor, kept: Tensor | None, adapters: Sequence[AdapterWeights], change: Change
) -> tuple[Tensor, Tensor]:
    """Equation 3, and the sum of |Dropout(LayerNorm(f_r(h_b)))|, without alpha.

    Args:
        base_code: h_b, [rows, features], sorted by adapter.
        kept: 1 for what dropout leaves and 0 for what it takes, uint8 [rows, features]; None: it takes none.
        adapters: one for each of ``change.lengths``.
        change: what else there is to say.
    """
    weights = [weight for adapter in adapters for weight in adapter]
    return cast("tuple[Tensor, Tensor]", _Adapted.apply(base_code, kept, change, *weights))  # pyright: ignore


def _blocks(start: int, stop: int, n_features: int) -> Iterator[slice]:
    step = max(1, _BLOCK // n_features)
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _norm_gradients(
    d_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, the gain and the bias of a LayerNorm."""
    backward: Any = torch.ops.aten.native_layer_norm_backward
    return backward(d_y, x, gain.shape, mean, rstd, gain, bias, (True, True, True))


def _where_above_0(gradient: Tensor, rectified: Tensor) -> Tensor:
    """The gradient of what went into a ReLU."""
    backward: Any = torch.ops.aten.threshold_backward
    return backward(gradient, rectified, 0.0)


class _Rectified(torch.autograd.Function):
    """x, gain, bias -> ReLU(LayerNorm(x)), and its sum."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, x: Tensor, gain: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        code, total = torch.empty_like(x), x.new_zeros(())
        mean, rstd = x.new_empty(len(x), 1), x.new_empty(len(x), 1)
        for rows in _blocks(0, *x.shape):
            y, mean[rows], rstd[rows] = torch.native_layer_norm(x[rows], gain.shape, gain, bias, _EPS)
            total += torch.clamp_min(y, 0.0, out=code[rows]).sum()
        ctx.save_for_backward(x, code, mean, rstd, gain, bias)
        return code, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_code: Tensor, d_total: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, code, mean, rstd, gain, bias = cast("tuple[Tensor, ...]", ctx.saved_tensors)
        d_x, d_gain, d_bias = torch.empty_like(x), torch.zeros_like(gain), torch.zeros_like(bias)
        for rows in _blocks(0, *x.shape):
            d_y = _where_above_0(d_code[rows] + d_total, code[rows])
            d_x[rows], of_gain, of_bias = _norm_gradients(d_y, x[rows], mean[rows], rstd[rows], gain, bias)
            d_gain += of_gain
            d_bias += of_bias
        return d_x, d_gain, d_bias


class _Adapted(torch.autograd.Function):
    """h_b, what dropout leaves, all weights -> h_r, and the sum of what was added before alpha."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, base_code: Tensor, kept: Tensor | None, change: Change, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        code, total = torch.empty_like(base_code), base_code.new_zeros(())
        outputs, hiddens = torch.empty_like(base_code), list[Tensor]()
        for start, stop, w in _each(change, weights):
            hidden = torch.addmm(w.b_in, base_code[start:stop], w.W_in).relu_()
            hiddens.append(hidden)
            torch.addmm(w.b_out, hidden, w.W_out, out=outputs[start:stop])
            gain, bias = w.gain * change.scale, w.bias * change.scale
            for rows in _blocks(start, stop, len(gain)):
                added = torch.native_layer_norm(outputs[rows], gain.shape, gain, bias, _EPS)[0]
                if kept is not None:
                    added *= kept[rows].to(added.dtype)
                torch.add(base_code[rows], added, alpha=change.alpha, out=code[rows])
                total += added.abs_().sum()
        ctx.change, ctx.kept = change, kept
        ctx.save_for_backward(base_code, outputs, *hiddens, *weights)
        return code, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_code: Tensor, d_total: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        change: Change = ctx.change
        kept: Tensor | None = ctx.kept
        base_code, outputs, *others = cast("tuple[Tensor, ...]", ctx.saved_tensors)
        hiddens, weights = others[: len(change.lengths)], others[len(change.lengths) :]
        d_base_code, gradients = torch.empty_like(base_code), list[Tensor]()
        factor = change.alpha * change.scale  # of a number of LayerNorm that is left, in h_r
        for (start, stop, w), hidden in zip(_each(change, weights), hiddens, strict=True):
            gain, bias = w.gain * factor, w.bias * factor
            d_gain, d_bias = torch.zeros_like(gain), torch.zeros_like(bias)
            d_output = torch.empty_like(outputs[start:stop])
            for rows in _blocks(start, stop, len(gain)):
                output = outputs[rows]
                y, mean, rstd = torch.native_layer_norm(output, gain.shape, gain, bias, _EPS)
                d_y = y.sign_().mul_(d_total / change.alpha).add_(d_code[rows])
                if kept is not None:
                    d_y *= kept[rows].to(d_y.dtype)
                own = slice(rows.start - start, rows.stop - start)
                d_output[own], of_gain, of_bias = _norm_gradients(d_y, output, mean, rstd, gain, bias)
                d_gain += of_gain
                d_bias += of_bias
            d_hidden = _where_above_0(d_output @ w.W_out.T, hidden)
            # Transposed twice: the library is faster so where adapters are narrow.
            gradients += [(d_hidden.T @ base_code[start:stop]).T, d_hidden.sum(0)]
            gradients += [hidden.T @ d_output, d_output.sum(0), d_gain * factor, d_bias * factor]
            torch.addmm(d_code[start:stop], d_hidden, w.W_in.T, out=d_base_code[start:stop])
        return d_base_code, None, None, *gradients


def _each(change: Change, weights: Sequence[Tensor]) -> Iterator[tuple[int, int, AdapterWeights]]:
    """Of each adapter where its rows begin and end, and its weights."""
    n, start = len(AdapterWeights._fields), 0
    for i, length in enumerate(change.lengths):
        yield start, start + length, AdapterWeights(*weights[n * i : n * (i + 1)])
        start += length
