"""The feed-forward block of every layer: h + down(dropout(GELU(up(RMSNorm(h))))).

On a CPU in float32 one compiled kernel does all of it, a tile of rows at a time, so that between the
two matrix products nothing leaves the cache; elsewhere it is the pieces of `kmixer.ops.fused`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.ops.fused import (
    MAX_ELEMENTS,
    dropout_arguments,
    dropout_seed,
    keep_and_rms_norm,
    linear_dropout_add,
    linear_gelu_dropout,
)
from kmixer.ops.gradients import first_order

# The compiled kernel keeps both matrices and their gradients in the second cache level: up to this many weights each.
MAX_WEIGHTS = 1 << 18


def feed_forward(
    h: Float[Tensor, "*rows d"],
    norm: Float[Tensor, " d"],
    up: Float[Tensor, "m d"],
    up_bias: Float[Tensor, " m"],
    down: Float[Tensor, "d m"],
    down_bias: Float[Tensor, " d"],
    *,
    eps: float,
    dropout: float,
) -> Float[Tensor, "*rows d"]:
    """h + down dropout(GELU(up x + up_bias)) + down_bias with x = norm h / sqrt(mean(h^2) + eps).

    `dropout` is the probability in force, 0 in evaluation; GELU is the exact one.
    """
    if _compiled(h, norm, up, up_bias, down, down_bias):
        return _FeedForward.apply(
            h.contiguous(), norm, up, up_bias, down, down_bias, eps, dropout, dropout_seed(dropout)
        )
    h, x = keep_and_rms_norm(h, norm, eps)
    return linear_dropout_add(h, linear_gelu_dropout(x, up, up_bias, dropout), down, down_bias, 0.0)


def _compiled(h: Tensor, norm: Tensor, up: Tensor, *others: Tensor) -> bool:
    return (
        native.usable(h, norm, up, *others)
        and all(x.dtype == torch.float32 for x in (h, norm, up, *others))
        and not torch.is_autocast_enabled("cpu")
        and up.numel() <= MAX_WEIGHTS
        and 0 < h.numel() // h.shape[-1] * up.shape[0] < MAX_ELEMENTS
    )


class _FeedForward(torch.autograd.Function):
    """The block, compiled. What the backward needs beyond the inputs is up x and one number a row."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        norm: Tensor,
        up: Tensor,
        up_bias: Tensor,
        down: Tensor,
        down_bias: Tensor,
        eps: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        m, d = up.shape
        rows = h.numel() // d
        out, hidden, inverse = torch.empty_like(h), h.new_empty(rows, m), h.new_empty(rows)
        up, down = up.contiguous(), down.contiguous()
        tensors = (h, norm, up, up_bias, down, down_bias, out, hidden, inverse)
        native.call("feed_forward_forward", *tensors, rows, d, m, float(eps), *dropout_arguments(dropout, seed))
        ctx.save_for_backward(h, norm, up, up_bias, down, hidden, inverse)
        ctx.dropout, ctx.seed = dropout, seed
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> Any:
        h, norm, up, up_bias, down, hidden, inverse = ctx.saved_tensors
        m, d = up.shape
        gradients = [torch.empty_like(x) for x in (h, norm, up, up_bias, down, norm)]
        native.call(
            "feed_forward_backward",
            dout.contiguous(),
            *(h, norm, up, up_bias, down, hidden, inverse, *gradients),
            *(len(inverse), d, m, *dropout_arguments(ctx.dropout, ctx.seed)),
        )
        return *gradients, None, None, None
