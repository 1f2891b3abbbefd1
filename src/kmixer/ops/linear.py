"""Linear maps of many rows by small matrices, compiled on a CPU, elsewhere torch's own.

For products as small as a layer's, general matrix libraries reach a third to a half of the processor's rate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.ops.gradients import HandWritten, first_order

# The compiled kernel keeps the matrix and its gradient in the second cache level: up to this many weights.
MAX_WEIGHTS = 1 << 16


def linear_map(
    x: Float[Tensor, "*rows d"], weight: Float[Tensor, "m d"], bias: Float[Tensor, " m"] | None = None
) -> Float[Tensor, "*rows m"]:
    """x W^T + bias over the last axis; without a bias, x W^T."""
    weights = (weight,) if bias is None else (weight, bias)
    if (
        native.multiplies(x, *weights)
        and weight.numel() <= MAX_WEIGHTS
        and x.numel() > 0
        and x.shape[-1] == weight.shape[1]  # torch says what does not fit
        and (bias is None or bias.shape == weight.shape[:1])
    ):
        return _LinearMap.apply(x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous())
    return F.linear(x, weight, bias)


class _LinearMap(HandWritten):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        m, d = weight.shape
        y = x.new_empty(*x.shape[:-1], m)
        native.call("linear_forward", x, weight, bias, y, x.numel() // d, d, m)
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        m, d = weight.shape
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        dbias = weight.new_empty(m) if ctx.biased else None
        native.call("linear_backward", dy.contiguous(), x, weight, dx, dweight, dbias, x.numel() // d, d, m)
        return dx, dweight, dbias
