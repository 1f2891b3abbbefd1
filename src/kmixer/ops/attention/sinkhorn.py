"""Sinkhorn normalisation of scores, and attention with it: rows and columns of exp(S) brought to their sums in turn.

    f = -logsumexp_j(S_ij + g_j),   g = -logsumexp_i(S_ij + f_i),   f again, ...     n half-steps, n odd, g = 0 at first
    W = exp(S_ij + f_i + g_j),      y_i = sum_j W_ij v_j

n = 1 is softmax. The last half-step is over rows, so that rows add to 1 after any number of them; columns do at
convergence only, and W is nearly doubly stochastic where the scores are small.

* `naive`    the definition: all (t, t) matrices in memory, and every derivative.
* `blocked`  a block of rows at a time: potentials f and g are kept, weights made again in a backward written by hand.
             Memory linear in t.
* `native`   the same as a compiled kernel for a CPU.

Source: Sander et al. 2022, "Sinkformers" (arXiv 2110.11773): Sinkformer-type normalisation.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.attention.sinkhorn_blocked import blocked_sinkhorn_attention
from kmixer.ops.attention.sinkhorn_converged import converged_sinkhorn
from kmixer.ops.attention.sinkhorn_native import native_sinkhorn_attention
from kmixer.ops.attention.sinkhorn_steps import potentials_of, rows_to_one
from kmixer.ops.attention.softmax import softmax_attention
from kmixer.ops.checks import check_tensors
from kmixer.ops.gradients import refuse_transforms

Backend = Literal["auto", "naive", "blocked", "native"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# What the compiled kernel computes in float32.
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def check_iterations(iterations: int) -> None:
    """Raises InputError for a number of half-steps that is not odd."""
    if iterations < 1 or iterations % 2 == 0:
        raise InputError(f"iterations: got {iterations}; allowed: an odd number, 1 or more, which ends on rows")


def sinkhorn(
    scores: Float[Tensor, "... t s"],
    iterations: int,
    rows: Float[Tensor, "... t"] | None = None,
    columns: Float[Tensor, "... s"] | None = None,
) -> Float[Tensor, "... t s"]:
    """W = exp(S + f + g) after so many half-steps, by the definition; differentiable as often as asked.

    Args:
        scores: S (..., t, s). Minus infinity is no weight; a row of nothing else has none at all.
        iterations: n, odd.
        rows: log of what each row adds to (..., t); zeros when None.
        columns: log of what each column is brought to (..., s); zeros when None. A number added to all of them changes
            nothing, as the last half-step is over rows.

    Returns:
        W (..., t, s), computed in float32 where the scores are narrower, in their dtype.

    Raises:
        InputError: an even number of iterations, tensors on several devices or of a dtype that is not a real float.
    """
    check_iterations(iterations)
    check_tensors("sinkhorn", scores=scores, rows=rows, columns=columns)
    accurate = scores.to(torch.promote_types(scores.dtype, torch.float32))
    exponents = accurate
    for _ in range(iterations // 2):
        f = potentials_of(exponents, -1)
        f = f if rows is None else f + rows
        g = potentials_of(accurate + f[..., :, None], -2)
        g = g if columns is None else g + columns
        exponents = accurate + g[..., None, :]
    weights = rows_to_one(exponents)
    return (weights if rows is None else weights * torch.exp(rows)[..., :, None]).to(scores.dtype)


def column_residual(weights: Float[Tensor, "... t t"], mask: Bool[Tensor, "... t"] | None = None) -> Tensor:
    """max_j |sum_i W_ij - 1| (...,): how far W is from doubly stochastic; over the positions of the mask."""
    residual = (weights.sum(-2) - 1).abs()
    return (residual if mask is None else residual.masked_fill(~mask, 0)).amax(-1)


def sinkhorn_attention(
    queries: Float[Tensor, "b h t e"],
    keys: Float[Tensor, "b h t e"],
    values: Float[Tensor, "b h t f"],
    *,
    iterations: int = 5,
    mask: Bool[Tensor, "b t"] | None = None,
    scale: float | None = None,
    tolerance: float | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "b h t f"]:
    """Average values with the weights of `sinkhorn`, scores scale q_i . k_j.

    A key's normaliser is a sum over all queries: there is no causal form of it for more than one half-step.

    Args:
        queries, keys, values: (b, h, t, e), (b, h, t, e) and (b, h, t, f), of the same positions.
        iterations: n, odd; with 1 it is softmax attention.
        mask: True where a position counts (b, t). The others are neither queries nor keys, and their output is 0; what
            is left is as it would be alone.
        scale: of the products; 1 / sqrt(e) when None.
        tolerance: go on until no column is further than this from adding to 1, for at most MAX_HALF_STEPS half-steps,
            whatever `iterations` says; the gradient is then that of the limit. All (t, t) weights in memory.
        backend: "auto" is softmax attention's kernels for n = 1, else "native" where it can run, or else "blocked", and
            "naive" inside torch.func.

    Returns:
        y (b, h, t, f), in the dtype of the values; potentials are float32 where that is narrower.

    Raises:
        InputError: an even number of iterations, an unknown backend, shapes that do not fit each other, tensors on
            several devices or of a dtype that is not a real float; a backend that cannot compute this; torch.func or
            forward mode with another backend than "naive", or with a tolerance.

    Source: Sander et al. 2022 (arXiv 2110.11773).
    """
    if backend not in BACKENDS:
        raise InputError(f"backend: got {backend!r}; allowed: {', '.join(BACKENDS)}")
    check_iterations(iterations)
    check_tensors("sinkhorn_attention", queries=queries, keys=keys, values=values)
    _check_shapes(queries, keys, values, mask)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    if queries.shape[2] == 0:
        return values
    transformed = native.transformed(queries, keys, values)
    if transformed and (tolerance is not None or backend not in ("auto", "naive")):
        refuse_transforms("tolerance" if tolerance is not None else f"backend {backend!r}", queries, keys, values)
    compiled = native.usable(queries, keys, values, dtypes=NARROW)
    if backend == "native" and not compiled:
        raise InputError(
            "backend 'native': it needs the compiled kernels, tensors on a CPU, and no float64; allowed: auto, naive, "
            "blocked"
        )
    if tolerance is None and iterations == 1 and backend == "auto" and mask is None and not transformed:
        return softmax_attention(queries, keys, values, causal=False, scale=scale)
    dtype = torch.promote_types(values.dtype, torch.float32)
    with torch.autocast(values.device.type, enabled=False):
        q, k, v = (tensor.to(dtype) for tensor in (queries, keys, values))
        if tolerance is None and backend != "naive" and not transformed:
            by_kernel = compiled and backend != "blocked"
            attention = native_sinkhorn_attention if by_kernel else blocked_sinkhorn_attention
            return attention(q, k, v, mask, iterations, scale).to(values.dtype)
        scores = scale * (q @ k.mT)
        if mask is not None:
            both = mask[:, None, :, None] & mask[:, None, None, :]
            scores = scores.masked_fill(~both, -torch.inf)
        weights = sinkhorn(scores, iterations) if tolerance is None else converged_sinkhorn(scores, tolerance)
        return (weights @ v).to(values.dtype)


def _check_shapes(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    if keys.shape != queries.shape or values.shape[:3] != queries.shape[:3]:
        raise InputError(
            f"keys and values: got {tuple(keys.shape)} and {tuple(values.shape)} for queries {tuple(queries.shape)}; "
            "they are of the same positions"
        )
    expected = (queries.shape[0], queries.shape[2])
    if mask is not None and (tuple(mask.shape) != expected or mask.dtype != torch.bool):
        raise InputError(f"mask: got {tuple(mask.shape)} in {mask.dtype}; allowed: {expected} in torch.bool")
