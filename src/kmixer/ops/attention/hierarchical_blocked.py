"""Hierarchical attention, a block of queries at a time: backend `blocked`.

No block of weights is kept for the backward, which makes it again, so that memory is linear in the length. A coarse
score is added where it belongs without being copied out. Custom operators, which torch.compile keeps whole: their loop
over blocks would make it translate every length anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from kmixer.ops.gradients import first_order, refuse_transforms

# Queries of a block: its scores stay in the second cache level for a thousand keys.
BLOCK = 128


def blocked_hierarchical_attention(
    queries: list[Tensor], keys: list[Tensor], values: Tensor, weights: Tensor, causal: bool
) -> Tensor:
    """y (b, h, t, f) of all positions, all in one dtype; arguments as `hierarchical_attention`."""
    refuse_transforms("backend 'blocked'", *queries, *keys, values, weights)
    y: Tensor = _forward(queries, keys, values, weights, causal)[0]
    return y


@custom_op("kmixer::blocked_hierarchical", mutates_args=())
def _forward(
    queries: list[Tensor], keys: list[Tensor], values: Tensor, weights: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """The output, and each query's highest score and sum of exp(score - highest) (b, h, t, 2).

    Both are kept: the logarithm of a normaliser would be rounded to the digits of the highest score.
    """
    y = values.new_empty(values.shape)
    normaliser = values.new_empty(*values.shape[:3], 2)
    for start, stop, seen in _blocks(values.shape[2], len(queries), causal):
        scores = _block_scores(weights, queries, keys, start, stop, seen, causal)
        highest = scores.amax(-1, keepdim=True)
        attended = scores.sub_(highest).exp_()
        total = attended.sum(-1, keepdim=True)
        normaliser[:, :, start:stop] = torch.cat([highest, total], dim=-1)
        attended.div_(total)
        torch.matmul(attended, values[:, :, :seen], out=y[:, :, start:stop])
    return y, normaliser


@_forward.register_fake
def _(
    queries: list[Tensor], keys: list[Tensor], values: Tensor, weights: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), values.new_empty(*values.shape[:3], 2)


@custom_op("kmixer::blocked_hierarchical_backward", mutates_args=())
def _backward(
    queries: list[Tensor],
    keys: list[Tensor],
    values: Tensor,
    weights: Tensor,
    y: Tensor,
    normaliser: Tensor,
    grad: Tensor,
    causal: bool,
) -> list[Tensor]:
    """Gradients of all queries, all keys, the values and the weights."""
    scale = queries[0].shape[-1] ** -0.5
    grad_weights, grad_values = torch.zeros_like(weights), torch.zeros_like(values)
    grad_queries = [torch.zeros_like(q) for q in queries]
    grad_keys = [torch.zeros_like(k) for k in keys]
    carried = (grad * y).sum(-1, keepdim=True)
    for start, stop, seen in _blocks(values.shape[2], len(queries), causal):
        scores = _block_scores(weights, queries, keys, start, stop, seen, causal)
        highest, total = normaliser[:, :, start:stop].split(1, dim=-1)
        attended = scores.sub_(highest).exp_().div_(total)
        here = grad[:, :, start:stop]
        grad_values[:, :, :seen] += attended.mT @ here
        inner = here @ values[:, :, :seen].mT
        inner.sub_(carried[:, :, start:stop]).mul_(attended)  # gradient of the scores
        for level in range(len(queries)):
            rows, columns = slice(start >> level, -(-stop >> level)), slice(0, -(-seen >> level))
            q, k = queries[level][:, :, rows], keys[level][:, :, columns]
            gathered = _gather(inner, level)
            alpha = weights[:, level, None, None] * scale
            product = gathered @ k
            grad_queries[level][:, :, rows] += alpha * product
            grad_keys[level][:, :, columns] += alpha * (gathered.mT @ q)
            # sum over the block of gathered * (q k^T), through what is already there
            grad_weights[:, level] += scale * (product * q).sum((0, 2, 3))
    return [*grad_queries, *grad_keys, grad_values, grad_weights]


@_backward.register_fake
def _(
    queries: list[Tensor],
    keys: list[Tensor],
    values: Tensor,
    weights: Tensor,
    y: Tensor,
    normaliser: Tensor,
    grad: Tensor,
    causal: bool,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (*queries, *keys, values, weights)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, keys, values, weights, ctx.causal = inputs
    ctx.levels = len(queries)
    ctx.save_for_backward(*queries, *keys, values, weights, *output)


@first_order
def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    kept, n = ctx.saved_tensors, ctx.levels
    made = _backward(list(kept[:n]), list(kept[n : 2 * n]), *kept[2 * n :], grad, ctx.causal)
    return made[:n], made[n : 2 * n], made[-2], made[-1], None


_forward.register_autograd(_gradients, setup_context=_keep)


def _blocks(t: int, levels: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, end of the queries, number of keys) of every block; blocks begin at whole cells of every level."""
    size = max(BLOCK, 1 << (levels - 1))
    return [(start, min(start + size, t), min(start + size, t) if causal else t) for start in range(0, t, size)]


def _block_scores(weights: Tensor, queries: Any, keys: Any, start: int, stop: int, seen: int, causal: bool) -> Tensor:
    """Scores (b, h, stop - start, seen) of a block of queries, those of later keys at -inf."""
    scale = queries[0].shape[-1] ** -0.5
    scores: Tensor | None = None
    for level, (q, k) in enumerate(zip(queries, keys, strict=True)):
        rows, columns = slice(start >> level, -(-stop >> level)), slice(0, -(-seen >> level))
        small = (weights[:, level, None, None] * scale * q[:, :, rows]) @ k[:, :, columns].mT
        if scores is None:
            scores = small
        else:
            _spread_add(scores, small, level)
    assert scores is not None
    if causal:
        later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., start:].masked_fill_(later, -torch.inf)
    return scores


def _spread_add(scores: Tensor, small: Tensor, level: int) -> None:
    """scores[..., i, j] += small[..., i >> level, j >> level], for any number of rows and columns."""
    cell = 1 << level
    rows, columns = scores.shape[-2] // cell * cell, scores.shape[-1] // cell * cell
    whole = scores[..., :rows, :columns].unflatten(-1, (-1, cell)).unflatten(-3, (-1, cell))
    whole += small[..., : rows // cell, None, : columns // cell, None]
    if columns < scores.shape[-1]:  # the last, cut column of cells
        part = scores[..., :rows, columns:].unflatten(-2, (-1, cell))
        part += small[..., : rows // cell, None, -1:]
    if rows < scores.shape[-2]:  # the last, cut row of cells
        spread = small[..., -1:, :].repeat_interleave(cell, dim=-1)[..., : scores.shape[-1]]
        scores[..., rows:, :] += spread


def _gather(scores: Tensor, level: int) -> Tensor:
    """The sums over cells of 2^level rows and columns; cut cells at the end count what they have."""
    if level == 0:
        return scores
    cell = 1 << level
    spare = (0, -scores.shape[-1] % cell, 0, -scores.shape[-2] % cell)
    padded = torch.nn.functional.pad(scores, spare) if any(spare) else scores
    return padded.unflatten(-1, (-1, cell)).sum(-1).unflatten(-2, (-1, cell)).sum(-2)
