"""The feed-forward block of every layer: h + down(dropout(activation(up(norm(h))))).

On a CPU one compiled kernel does all of it, a tile of rows at a time, so that between the
two matrix products nothing leaves the cache; elsewhere it is the pieces of `kmixer.ops.fused`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
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
from kmixer.ops.gradients import HandWritten, first_order
from kmixer.ops.pointwise_norm import KINDS, Pointwise, keep_and_pointwise_norm

Activation = Literal["gelu", "squared_relu"]

# The compiled kernel keeps both matrices and their gradients in the second cache level: up to this many weights each.
MAX_WEIGHTS = 1 << 18


def feed_forward(
    h: Float[Tensor, "*rows d"],
    norm: Float[Tensor, " d"] | Pointwise | None,
    up: Float[Tensor, "m d"],
    up_bias: Float[Tensor, " m"] | None,
    down: Float[Tensor, "d m"],
    down_bias: Float[Tensor, " d"] | None,
    *,
    eps: float,
    dropout: float,
    activation: Activation = "gelu",
) -> Float[Tensor, "*rows d"]:
    """h + down dropout(activation(up x + up_bias)) + down_bias with x = norm h / sqrt(mean(h^2) + eps).

    Where `norm` is a `Pointwise`, x is what that makes of h. The activation is the exact GELU, or relu(u)^2. A norm or
    bias of None is not there. `dropout` is the probability in force, 0 in evaluation.
    """
    m, d = up.shape
    up_bias = up.new_zeros(m) if up_bias is None else up_bias
    down_bias = down.new_zeros(d) if down_bias is None else down_bias
    squared_relu = activation == "squared_relu"
    if isinstance(norm, Pointwise):
        learned, kind, fits = norm.tensors, KINDS[norm.function], norm.fits(d)
    else:
        learned, kind, fits = [] if norm is None else [norm], 0, norm is None or norm.shape == (d,)
    if fits and _compiled(h, learned, up, up_bias, down, down_bias):
        if isinstance(norm, Pointwise):
            norm = norm.packed(d)
        tensors = (h, up.new_ones(d) if norm is None else norm, up, up_bias, down, down_bias)
        return _FeedForward.apply(
            *(tensor.contiguous() for tensor in tensors),
            *(eps, kind, squared_relu, dropout, dropout_seed(dropout)),
        )
    h, x = keep_and_pointwise_norm(h, norm) if isinstance(norm, Pointwise) else keep_and_rms_norm(h, norm, eps)
    if squared_relu:
        hidden = F.linear(x, up, up_bias).relu().square()
        hidden = F.dropout(hidden, dropout) if dropout else hidden
    else:
        hidden = linear_gelu_dropout(x, up, up_bias, dropout)
    return linear_dropout_add(h, hidden, down, down_bias, 0.0)


def hidden_units(
    x: Float[Tensor, "*rows d"],
    up: Float[Tensor, "m d"],
    up_bias: Float[Tensor, " m"],
    *,
    dropout: float,
) -> Float[Tensor, "*rows m"]:
    """dropout(GELU(up x + up_bias)), the exact GELU, with the same dropout as `feed_forward`."""
    m, d = up.shape
    if (
        native.usable(x, up, up_bias, products=True)
        and (x.shape[-1], *up_bias.shape) == (d, m)
        and up.numel() <= MAX_WEIGHTS
        and 0 < x.numel() // d * m < MAX_ELEMENTS
    ):
        return _HiddenUnits.apply(*(tensor.contiguous() for tensor in (x, up, up_bias)), dropout, dropout_seed(dropout))
    return linear_gelu_dropout(x, up, up_bias, dropout)


def _compiled(h: Tensor, norm: list[Tensor], up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> bool:
    m, d = up.shape
    return (
        native.multiplies(h, *norm, up, up_bias, down, down_bias)
        # Where they do not fit each other, torch says so.
        and (h.shape[-1], *up_bias.shape, *down.shape, *down_bias.shape) == (d, m, d, m, d)
        and up.numel() <= MAX_WEIGHTS
        and 0 < h.numel() // h.shape[-1] * up.shape[0] < MAX_ELEMENTS
    )


class _FeedForward(HandWritten):
    """The block, compiled. What the backward needs beyond the inputs is up x and one number per row."""

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
        norm_kind: int,
        squared_relu: bool,
        dropout: float,
        seed: int,
    ) -> Tensor:
        m, d = up.shape
        rows = h.numel() // d
        out, hidden, inverse = torch.empty_like(h), h.new_empty(rows, m), up.new_empty(rows)
        tensors = (h, norm, up, up_bias, down, down_bias, out, hidden, inverse)
        arguments = (*dropout_arguments(dropout, seed), int(squared_relu), norm_kind)
        native.call("feed_forward_forward", *tensors, rows, d, m, eps, *arguments)
        ctx.save_for_backward(h, norm, up, up_bias, down, hidden, inverse)
        ctx.norm_kind, ctx.squared_relu, ctx.dropout, ctx.seed = norm_kind, squared_relu, dropout, seed
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> Any:
        h, norm, up, up_bias, down, hidden, inverse = ctx.saved_tensors
        m, d = up.shape
        gradients = [torch.empty_like(x) for x in (h, norm, up, up_bias, down)] + [up.new_empty(d)]
        native.call(
            "feed_forward_backward",
            dout.contiguous(),
            *(h, norm, up, up_bias, down, hidden, inverse, *gradients),
            *(len(inverse), d, m, *dropout_arguments(ctx.dropout, ctx.seed), int(ctx.squared_relu), ctx.norm_kind),
        )
        return *gradients, None, None, None, None, None


class _HiddenUnits(HandWritten):
    """Hidden units, compiled. What the backward needs beyond the inputs is up x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, dropout: float, seed: int) -> Tensor:
        m, d = up.shape
        mapped, z = x.new_empty(*x.shape[:-1], m), x.new_empty(*x.shape[:-1], m)
        arguments = dropout_arguments(dropout, seed)
        native.call("hidden_units_forward", x, up, up_bias, mapped, z, x.numel() // d, d, m, *arguments)
        ctx.save_for_backward(x, up, up_bias, mapped)
        ctx.dropout, ctx.seed = dropout, seed
        return z

    @staticmethod
    @first_order
    def backward(ctx: Any, dz: Tensor) -> Any:
        x, up, up_bias, mapped = ctx.saved_tensors
        m, d = up.shape
        gradients = [torch.empty_like(tensor) for tensor in (x, up, up_bias)]
        arguments = dropout_arguments(ctx.dropout, ctx.seed)
        native.call(
            "hidden_units_backward",
            *(dz.contiguous(), x, up, up_bias, mapped, *gradients),
            *(x.numel() // d, d, m, *arguments),
        )
        return *gradients, None, None
