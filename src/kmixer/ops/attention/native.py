"""Attention as a compiled kernel for a CPU, float32: of several levels, and softmax attention as the one of a level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.native.structures import Attention, AttentionGradients
from kmixer.ops.gradients import HandWritten, first_order


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


class _Native(HandWritten):
    """y (b, t, h, f): the heads side by side, as the layer after attention multiplies them, without a copy."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, causal: bool, scale: float, *rows: Tensor) -> Tensor:
        (b, h, t, f), levels, e = values.shape, weights.shape[1], rows[0].shape[-1]
        values, weights = values.contiguous(), weights.contiguous()
        rows = tuple(tensor.contiguous() for tensor in rows)
        y, highest, sums = values.new_empty(b, t, h, f), values.new_empty(b, h, t), values.new_empty(b, h, t)
        ctx.shape = (b * h, h, t, levels, e, f, int(causal), scale)
        native.call("hierarchical_forward", _attention(ctx.shape, (values, weights, y, highest, sums), rows))
        ctx.save_for_backward(values, weights, y, highest, sums, *rows)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weights, y, highest, sums, *rows = ctx.saved_tensors
        levels = weights.shape[1]
        made, grad_values = [torch.empty_like(tensor) for tensor in rows], torch.empty_like(values)
        by_row = weights.new_empty(*values.shape[:2], levels)
        grad = gradients[0].contiguous()
        native.call(
            "hierarchical_backward",
            _attention(ctx.shape, (values, weights, y, highest, sums), rows),
            AttentionGradients(
                native.pointer(grad),
                *(native.addresses(levels_made) for levels_made in (made[:levels], made[levels:])),
                *(native.pointer(tensor) for tensor in (grad_values, by_row)),
            ),
        )
        return grad_values, by_row.sum(0), None, None, *made


def _attention(shape: tuple[Any, ...], tensors: Sequence[Tensor], rows: Sequence[Tensor]) -> Attention:
    """What both kernels take; the tensors must be kept until they have returned."""
    levels = len(rows) // 2
    return Attention(
        native.addresses(rows[:levels]),
        native.addresses(rows[levels:]),
        *(native.pointer(tensor) for tensor in tensors),
        *shape,
    )
