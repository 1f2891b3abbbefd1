"""Weights that change while a sequence is read: chunks of positions read them, and then write into them.

    Y_i = Z_i (W_0^T + S_i) + bias                 S_0 is given; Z_i (c, f), S_i (f, d), W_0 (d, f)
    S_{i+1} = lambda S_i + rate Z_i^T V_i          V_i = filter(T_i) W (c, d)

This is linear attention with queries and keys Z, values V and a state S, delayed by a chunk: no position sees what its
own chunk writes. On a CPU in float32 one compiled kernel does all of it, a chunk at a time.

Source: Feng et al. 2026 (arXiv 2604.06169), equation 1 with the exclusive sum of its text; lambda is ours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.ops.gradients import HandWritten, first_order


def fast_weights(
    hidden: Float[Tensor, "b n c f"],
    targets: Float[Tensor, "b n c d"],
    taps: Float[Tensor, "d k"],
    matrix: Float[Tensor, "d d"],
    before: Float[Tensor, "b f d"],
    decay: Float[Tensor, ""] | None,
    *,
    rate: float,
    weight: Float[Tensor, "d f"] | None = None,
    bias: Float[Tensor, " d"] | None = None,
    largest: Float[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "b n c d"], Float[Tensor, "b n_plus_1 f d"]]:
    """What n chunks read, and the fast weights before the first chunk and after each.

    They are float32, or float64 where `matrix` is; so are all products, under autocast too.

    Args:
        hidden: Z, in any precision, which is that of what is read.
        targets: T.
        taps: of the filter over positions of a chunk, see `filtered`.
        matrix: W.
        before: S_0.
        decay: lambda; None is 1.
        rate: of what is written.
        weight, bias: W_0 and the bias; None is zeros.
        largest: norm that S keeps within, scaled down after every chunk that takes it further; None is no bound.
    """
    n = hidden.shape[1]
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    decay = matrix.new_ones((), dtype=dtype) if decay is None else decay.to(dtype)
    tensors = [hidden, targets, taps, matrix, decay, before]
    fixed = [None if part is None else part.contiguous() for part in (weight, bias)]
    known = native.usable(*tensors, *(part for part in fixed if part is not None), products=True)
    if known and largest is None and hidden.numel() and targets.numel():
        return _FastWeights.apply(*(part.contiguous() for part in tensors), *fixed, rate)
    with torch.autocast(hidden.device.type, enabled=False):
        keys, values = hidden.to(dtype), written(targets, taps, matrix, dtype)
        updates = rate * (keys.mT @ values)
        weights = [before.to(dtype)]
        for update in updates.unbind(1):
            weights.append(within(decay * weights[-1] + update, largest))
        after = torch.stack(weights, dim=1)
        y = (keys @ after[:, :n]).to(hidden.dtype)
    if weight is not None:
        y = y + F.linear(hidden, weight, bias)
    return y if bias is None or weight is not None else y + bias, after


def written(targets: Tensor, taps: Tensor | None, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """V, in this precision; without taps T W."""
    targets = targets.to(dtype)
    return (targets if taps is None else filtered(targets, taps.to(dtype))) @ matrix.to(dtype)


def within(weights: Float[Tensor, "b f d"], largest: Float[Tensor, ""] | None) -> Float[Tensor, "b f d"]:
    """The weights, scaled down in each row where their norm is larger."""
    if largest is None:
        return weights
    norms = torch.linalg.vector_norm(weights, dim=(1, 2), keepdim=True)
    return weights * (largest / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)


def filtered(targets: Float[Tensor, "*places c d"], taps: Float[Tensor, "d k"]) -> Float[Tensor, "*places c d"]:
    """v_i = sum over k of taps[:, k] * targets[i + k - K // 2], an odd number K of taps, with zeros around the c."""
    count, c = taps.shape[1], targets.shape[-2]
    padded = F.pad(targets, (0, 0, count // 2, count // 2))
    parts = [taps[:, k] * padded[..., k : k + c, :] for k in range(count)]
    return torch.stack(parts).sum(0)


class _FastWeights(HandWritten):
    """All of it compiled. The backward reads the weights after every chunk, and makes V again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        taps: Tensor,
        matrix: Tensor,
        decay: Tensor,
        before: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rate: float,
    ) -> tuple[Tensor, Tensor]:
        b, n, c, f = hidden.shape
        d, count = taps.shape
        y, after = torch.empty_like(targets), hidden.new_empty(b, n + 1, f, d)
        sizes, factor = (b, n, c, f, d, count), float(decay)
        tensors = (hidden, targets, taps, matrix, weight, bias, before, y, after)
        native.call("fast_weights_forward", *tensors, *sizes, factor, rate)
        ctx.save_for_backward(hidden, targets, taps, matrix, weight, after)
        ctx.sizes, ctx.decay, ctx.rate, ctx.biased = sizes, factor, rate, bias is not None
        ctx.set_materialize_grads(False)
        return y, after

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor | None, dafter: Tensor | None) -> Any:
        hidden, targets, taps, matrix, weight, after = ctx.saved_tensors
        dy = torch.zeros_like(targets) if dy is None else dy.contiguous()
        dafter = None if dafter is None else dafter.contiguous()
        gradients = [torch.empty_like(x) for x in (hidden, targets, taps, matrix)]
        dweight = None if weight is None else torch.empty_like(weight)
        dbias = matrix.new_empty(len(matrix)) if ctx.biased else None
        dbefore, ddecay = torch.empty_like(after[:, 0], memory_format=torch.contiguous_format), hidden.new_empty(1)
        native.call(
            "fast_weights_backward",
            *(dy, dafter, hidden, targets, taps, matrix, weight, after, *gradients, dweight, dbias, dbefore, ddecay),
            *(*ctx.sizes, ctx.decay, ctx.rate),
        )
        return *gradients, ddecay[0], dbefore, dweight, dbias, None
