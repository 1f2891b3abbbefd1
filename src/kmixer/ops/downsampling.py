"""A depthwise filter over time that keeps every second row: y[k] = sum_{r < K} w_r * x[2k + K - 1 - r]."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.ops.gradients import first_order


def lag(x: Float[Tensor, "b n d"], taps: int, r: int) -> Float[Tensor, "b m d"]:
    """The rows x[2k + K - 1 - r], k = 0 to (n - K) / 2: a view."""
    place = taps - 1 - r
    return x[:, place : x.shape[1] - r : 2]


def filter_and_halve(x: Float[Tensor, "b n d"], weight: Float[Tensor, "d k"]) -> Float[Tensor, "b m d"]:
    """Filter and keep every second row.

    Compiled for float32 on a CPU. Written by hand because autograd would copy a whole x for the gradient of every lag.

    Args:
        x: rows (b, n, d), K of them or more; the first K - 1 stand before those that are kept.
        weight: K weights a channel, that of the row itself first.

    Returns:
        (b, (n - K) // 2 + 1, d).
    """
    compiled = x.dtype == weight.dtype == torch.float32 and native.usable(x, weight)
    y: Tensor = (_Compiled if compiled else _FilterAndHalve).apply(x, weight)
    return y


class _FilterAndHalve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        taps = weight.shape[1]
        y = lag(x, taps, 0) * weight[:, 0]
        for r in range(1, taps):
            y.addcmul_(lag(x, taps, r), weight[:, r])
        return y

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


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (b, n, d), taps = x.shape, weight.shape[1]
        tensors = x.contiguous(), weight.T.contiguous()
        ctx.save_for_backward(*tensors)
        y = x.new_empty(b, (n - taps) // 2 + 1, d)
        native.call("filter_and_halve_forward", *tensors, y, b, n, d, taps)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, by_lag = ctx.saved_tensors
        grad_x, grad_by_lag = torch.empty_like(x), torch.empty_like(by_lag)
        tensors = x, by_lag, gradients[0].contiguous(), grad_x, grad_by_lag
        native.call("filter_and_halve_backward", *tensors, *x.shape, len(by_lag))
        return grad_x, grad_by_lag.T
