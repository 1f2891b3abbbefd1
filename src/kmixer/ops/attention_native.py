"""Attention as a compiled kernel for a CPU, float32: of several levels, and softmax attention as the one of a level."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.ops.gradients import first_order


def native_attention(
    queries: Float[Tensor, "b h rows e"],
    keys: Float[Tensor, "b h rows e"],
    values: Float[Tensor, "b h t f"],
    weights: Float[Tensor, "h l"],
    *,
    causal: bool,
    scale: float,
) -> Float[Tensor, "b h t f"]:
    """`hierarchical_attention` of all positions, with a scale of its own; the rows of a level stand before the next."""
    attended: Tensor = _Native.apply(queries, keys, values, weights, causal, scale)
    return attended


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor, causal: bool, scale: float
    ) -> Tensor:
        tensors = [tensor.contiguous() for tensor in (queries, keys, values, weights)]
        (b, h, t, f), levels, e = values.shape, weights.shape[1], queries.shape[-1]
        y, normaliser = values.new_empty(b, h, t, f), values.new_empty(b, h, t)
        ctx.shape = (b * h, h, t, levels, e, f, float(scale), int(causal))
        native.call("hierarchical_forward", *tensors, y, normaliser, *ctx.shape)
        ctx.save_for_backward(*tensors, y, normaliser)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, weights, y, normaliser = ctx.saved_tensors
        made = [torch.empty_like(tensor) for tensor in (queries, keys, values)]
        by_row = weights.new_empty(*values.shape[:2], weights.shape[1])
        inputs = (queries, keys, values, weights, y, normaliser, gradients[0].contiguous())
        native.call("hierarchical_backward", *inputs, *made, by_row, *ctx.shape)
        return *made, by_row.sum(0), None, None
