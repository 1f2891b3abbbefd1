"""Sinkhorn attention as a compiled kernel for a CPU, float32: backend `native`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kmixer import native
from kmixer.ops.gradients import HandWritten, first_order


def native_sinkhorn_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, iterations: int, scale: float
) -> Tensor:
    """y (b, h, t, f); arguments as `sinkhorn_attention`."""
    attended: Tensor = _Native.apply(queries, keys, values, mask, iterations, scale)
    return attended.transpose(1, 2)


class _Native(HandWritten):
    """y (b, t, h, f): the heads side by side, as the layer after attention multiplies them, without a copy."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, iterations: int, scale: float
    ) -> Tensor:
        (b, h, t, e), width, steps = queries.shape, values.shape[-1], iterations // 2 + 1
        queries, keys, values = (tensor.contiguous() for tensor in (queries, keys, values))
        y, f, g = values.new_empty(b, t, h, width), values.new_empty(b, h, steps, t), values.new_zeros(b, h, steps, t)
        if mask is not None:
            g[:, :, 0].masked_fill_(~mask[:, None], -torch.inf)
        ctx.sizes = (b * h, h, t, e, width, steps, scale)
        native.call("sinkhorn_forward", queries, keys, values, y, f, g, *ctx.sizes)
        ctx.save_for_backward(queries, keys, values, y, f, g)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        made = [torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]]
        native.call("sinkhorn_backward", *ctx.saved_tensors, gradients[0].contiguous(), *made, *ctx.sizes)
        return *made, None, None, None
