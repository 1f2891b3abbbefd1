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
    if fits_cache(x, weight, bias):
        return compiled_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def fits_cache(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the compiled kernel takes these."""
    weights = (weight,) if bias is None else (weight, bias)
    return (
        native.multiplies(x, *weights)
        and weight.numel() <= MAX_WEIGHTS
        and x.numel() > 0
        and x.shape[-1] == weight.shape[1]  # torch says what does not fit
        and (bias is None or bias.shape == weight.shape[:1])
    )


def compiled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    dropout: tuple[int, int, float] = (0, 0, 1.0),
) -> Tensor:
    """x W^T + bias, or residual + dropout(x W^T + bias), by the kernel; dropout as `dropout_arguments` has it."""
    weights = (weight.contiguous(), None if bias is None else bias.contiguous())
    return _LinearMap.apply(x.contiguous(), *weights, None if residual is None else residual.contiguous(), dropout)  # type: ignore[no-any-return]


class _LinearMap(HandWritten):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        dropout: tuple[int, int, float],
    ) -> Tensor:
        m, d = weight.shape
        y = x.new_empty(*x.shape[:-1], m)
        native.call("linear_forward", x, weight, bias, residual, y, x.numel() // d, d, m, *dropout)
        ctx.save_for_backward(x, weight)
        ctx.biased, ctx.added, ctx.dropout = bias is not None, residual is not None, dropout
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        m, d = weight.shape
        dy, dx, dweight = dy.contiguous(), torch.empty_like(x), torch.empty_like(weight)
        dbias = weight.new_empty(m) if ctx.biased else None
        native.call("linear_backward", dy, x, weight, dx, dweight, dbias, x.numel() // d, d, m, *ctx.dropout)
        return dx, dweight, dbias, dy if ctx.added else None, None
