"""A depthwise filter over time that keeps every second row, then a matrix.

y[k] = (sum_{r < K} w_r * x[2k + K - 1 - r]) M
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.gradients import HandWritten, first_order
from kmixer.ops.linear import MAX_WEIGHTS


def lag(x: Float[Tensor, "b n d"], taps: int, r: int) -> Float[Tensor, "b m d"]:
    """The rows x[2k + K - 1 - r], k = 0 to (n - K) / 2: a view."""
    begin = taps - 1 - r
    return x[:, begin : x.shape[1] - r : 2]


def filter_and_halve(
    tail: Float[Tensor, "b p d"],
    x: Float[Tensor, "b n d"],
    weight: Float[Tensor, "d k"],
    mixing: Float[Tensor, "d d"] | None = None,
) -> Float[Tensor, "b m d"]:
    """Filter, keep every second row, and multiply it by a matrix from the right where one is given.

    Compiled for float32 on a CPU. Written by hand because autograd would copy a whole x for the gradient of every lag.

    Args:
        tail, x: the rows (b, p + n, d), K of them or more; the first K - 1 stand before those that are kept.
        weight: K weights per channel, that of the row itself first.

    Returns:
        (b, (p + n - K) // 2 + 1, d).

    Raises:
        InputError: fewer rows than K.
    """
    if (rows := tail.shape[1] + x.shape[1]) < weight.shape[1]:
        raise InputError(f"downsampling: got {rows} rows for a filter of {weight.shape[1]}; it needs as many or more")
    tensors = (tail, x, weight)
    if not native.usable(*tensors):
        rows_of_both = torch.cat([tail, x], dim=1)
        y: Tensor = (_filtered if native.transformed(*tensors) else _FilterAndHalve.apply)(rows_of_both, weight)
    elif mixing is None or not _fits(mixing, x):
        y = _Compiled.apply(*tensors, None)
    else:
        y, mixing = _Compiled.apply(*tensors, mixing), None
    return y if mixing is None else y @ mixing


def _fits(mixing: Tensor, x: Tensor) -> bool:
    return (
        native.usable(mixing, products=True)
        and mixing.shape == (x.shape[-1], x.shape[-1])
        and mixing.numel() <= MAX_WEIGHTS
    )


def _filtered(x: Tensor, weight: Tensor) -> Tensor:
    taps = weight.shape[1]
    y = lag(x, taps, 0) * weight[:, 0]
    for r in range(1, taps):  # not in place: torch.compile of torch 2.11 would lose the gradients
        y = torch.addcmul(y, lag(x, taps, r), weight[:, r])
    return y


class _FilterAndHalve(HandWritten):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _filtered(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (grad,) = gradients
        x, weight = ctx.saved_tensors
        taps = weight.shape[1]
        grad_x = torch.zeros_like(x)
        for r in range(taps):
            lag(grad_x, taps, r).addcmul_(grad, weight[:, r])
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        return grad_x, torch.stack([(grad * lag(x, taps, r)).sum((0, 1)) for r in range(taps)], dim=1)


class _Compiled(HandWritten):
    @staticmethod
    def forward(ctx: Any, tail: Tensor, x: Tensor, weight: Tensor, mixing: Tensor | None) -> Tensor:
        (b, n, d), p, taps = x.shape, tail.shape[1], weight.shape[1]
        mixing = None if mixing is None else mixing.contiguous()
        tensors = tail.contiguous(), x.contiguous(), weight.T.contiguous(), mixing
        ctx.save_for_backward(*tensors)
        ctx.shape = (b, p, n, d, taps)
        y = x.new_empty(b, (p + n - taps) // 2 + 1, d)
        native.call("filter_and_halve_forward", *tensors, y, *ctx.shape)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        tail, x, by_lag, mixing = ctx.saved_tensors  # read once: activation checkpointing makes them anew each time
        grad_tail, grad_x, grad_by_lag = made = [torch.empty_like(tensor) for tensor in (tail, x, by_lag)]
        grad_mixing = None if mixing is None else torch.empty_like(mixing)
        inputs = (tail, x, by_lag, mixing, gradients[0].contiguous())
        native.call("filter_and_halve_backward", *inputs, *made, grad_mixing, *ctx.shape)
        return grad_tail, grad_x, grad_by_lag.T, grad_mixing
