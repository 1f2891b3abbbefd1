"""Weights that change while a sequence is read: chunks of positions read them, and then write into them.

    Y_i = Z_i F_i^T                              F_0 is given; Z_i (c, f), F_i (d, f)
    F_{i+1} = lambda F_i + rate V_i^T Z_i        V_i (c, d)

This is linear attention with queries and keys Z, values V and a state (d, f), delayed by a chunk: no position sees what
its own chunk writes.

Source: Feng et al. 2026 (arXiv 2604.06169), equation 1 with the exclusive sum of its text; lambda is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def fast_weights(
    hidden: Float[Tensor, "b n c f"],
    values: Float[Tensor, "b n c d"],
    before: Float[Tensor, "b d f"] | None,
    decay: Float[Tensor, ""] | None,
    *,
    rate: float,
    largest: Float[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "b n c d"], Float[Tensor, "b n_plus_1 d f"]]:
    """What n chunks read, and the fast weights before the first chunk and after each.

    Args:
        hidden: Z.
        values: V, in float32, or float64 where Z is float64; products are in that precision, under autocast too.
        before: F_0; None is zeros.
        decay: lambda; None is 1.
        rate: of what is written.
        largest: norm that F keeps within, scaled down after every chunk that takes it further; None is no bound.
    """
    b, n, _, f = hidden.shape
    dtype = values.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        keys = hidden.to(dtype)
        updates = rate * (values.mT @ keys)
        weights = [values.new_zeros(b, values.shape[-1], f) if before is None else before.to(dtype)]
        for update in updates.unbind(1):
            kept = weights[-1] if decay is None else decay * weights[-1]
            weights.append(within(kept + update, largest))
        after = torch.stack(weights, dim=1)
        return (keys @ after[:, :n].mT).to(hidden.dtype), after


def within(weights: Float[Tensor, "b d f"], largest: Float[Tensor, ""] | None) -> Float[Tensor, "b d f"]:
    """The weights, scaled down in each row where their norm is larger."""
    if largest is None:
        return weights
    norms = torch.linalg.vector_norm(weights, dim=(1, 2), keepdim=True)
    return weights * (largest / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)


def filtered(targets: Float[Tensor, "*places c d"], taps: Float[Tensor, "d k"]) -> Float[Tensor, "*places c d"]:
    """v_i = sum over k of taps[:, k] * targets[i + k - K // 2], an odd number K of taps, with zeros around the c."""
    count, c = taps.shape[1], targets.shape[-2]
    padded = F.pad(targets, (0, 0, count // 2, count // 2))
    parts = [taps[:, k] * padded[..., k : k + c, :] for k in range(count)]
    return torch.stack(parts).sum(0)
