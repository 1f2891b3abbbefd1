"""Attention as a compiled kernel for a CPU, float32: of several levels, and softmax attention as the one of a level."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.ops.gradients import first_order


def native_attention(
    queries: list[Float[Tensor, "b h _ e"]],
    keys: list[Float[Tensor, "b h _ e"]],
    values: Float[Tensor, "b h t f"],
    weights: Float[Tensor, "h l"],
    *,
    causal: bool,
    scale: float,
) -> Float[Tensor, "b h t f"]:
    """`hierarchical_attention` of all positions, with a scale of its own."""
    attended: Tensor = _Native.apply(values, weights, causal, scale, *queries, *keys)
    return attended.transpose(1, 2)


class _Native(torch.autograd.Function):
    """y (b, t, h, f): the heads side by side, as the layer after attention multiplies them, without a copy."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, causal: bool, scale: float, *rows: Tensor) -> Tensor:
        (b, h, t, f), levels, e = values.shape, weights.shape[1], rows[0].shape[-1]
        values, weights = values.contiguous(), weights.contiguous()
        rows = tuple(tensor.contiguous() for tensor in rows)
        y, normaliser = values.new_empty(b, t, h, f), values.new_empty(b, h, t)
        ctx.shape = (b * h, h, t, levels, e, f, float(scale), int(causal))
        inputs = (native.addresses(rows[:levels]), native.addresses(rows[levels:]), values, weights)
        native.call("hierarchical_forward", *inputs, y, normaliser, *ctx.shape)
        ctx.save_for_backward(values, weights, y, normaliser, *rows)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weights, y, normaliser, *rows = ctx.saved_tensors
        levels = weights.shape[1]
        made, grad_values = [torch.empty_like(tensor) for tensor in rows], torch.empty_like(values)
        by_row = weights.new_empty(*values.shape[:2], levels)
        grad = gradients[0].contiguous()
        native.call(
            "hierarchical_backward",
            *(native.addresses(each) for each in (rows[:levels], rows[levels:])),
            *(values, weights, y, normaliser, grad),
            *(native.addresses(each) for each in (made[:levels], made[levels:])),
            *(grad_values, by_row, *ctx.shape),
        )
        return grad_values, by_row.sum(0), None, None, *made
