"""Sinkhorn normalisation carried on to its limit, with the gradient of the limit."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer.ops.attention.sinkhorn_steps import potentials_of, rows_to_one
from kmixer.ops.gradients import first_order

# Half-steps after which it is given up to get nearer: for scores of deviation 2 the residual is then at rounding.
MAX_HALF_STEPS = 201


def converged_sinkhorn(scores: Float[Tensor, "... t t"], tolerance: float) -> Float[Tensor, "... t t"]:
    """W = exp(S + f + g), when no column is further than `tolerance` from adding to 1, or after MAX_HALF_STEPS.

    Rows and columns that are minus infinity throughout have no weights, and count as if they were not there.
    """
    weights: Tensor = _Converged.apply(scores, tolerance)
    return weights


class _Converged(torch.autograd.Function):
    """With H = W * dL/dW, dS = H - W * (u_i + v_j), where [I W; W^T I] [u; v] are the row and column sums of H."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tolerance: float) -> Tensor:
        there = scores.amax(-2) > -torch.inf  # columns that have any weight
        exponents = scores
        weights = rows_to_one(exponents)
        for _ in range(MAX_HALF_STEPS // 2):
            if not ((weights.sum(-2) - 1).abs() * there > tolerance).any():
                break
            g = potentials_of(scores + potentials_of(exponents, -1).unsqueeze(-1), -2)
            exponents = scores + g.unsqueeze(-2)
            weights = rows_to_one(exponents)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        changes = weights * grad
        rows, columns = changes.sum(-1), changes.sum(-2)
        # u = rows - W v leaves (I - W^T W) v = columns - W^T rows, whose one null vector is that of equal numbers.
        there = (weights.sum(-2) > 0).to(weights.dtype)
        null = there[..., :, None] * there[..., None, :] / there.sum(-1).clamp(min=1)[..., None, None]
        identity = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
        right = columns.unsqueeze(-1) - weights.mT @ rows.unsqueeze(-1)
        v = torch.linalg.solve(identity - weights.mT @ weights + null, right)
        u = rows.unsqueeze(-1) - weights @ v
        return changes - weights * (u + v.mT), None
