"""Sinkhorn attention, a block of rows at a time: potentials are kept, weights made again; backend `blocked`.

The weights P = exp(S + f + g) of a half-step over rows are those of the one over columns after it but for its own
sums, g' = g - log sum_i P_ij, so that one product q k^T serves two half-steps. Custom operators, which torch.compile
keeps whole: their loop over blocks would make it translate every length anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from kmixer.ops.gradients import first_order, refuse_transforms

# Numbers of a block of weights: with its gradient they stay in the second cache level.
BLOCK_NUMBERS = 1 << 16
# A sum over a column below this many times the smallest number has lost digits: it is made again.
LOST_DIGITS = 1e12


def blocked_sinkhorn_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, iterations: int, scale: float
) -> Tensor:
    """y (b, h, t, f), all in one dtype; arguments as `sinkhorn_attention`."""
    refuse_transforms("backend 'blocked'", queries, keys, values)
    b, h = queries.shape[:2]
    flat = (tensor.flatten(0, 1) for tensor in (queries, keys, values))
    closed = None if mask is None else (~mask).repeat_interleave(h, 0)  # (b h, t)
    y: Tensor = _forward(*flat, closed, iterations, scale)[0]
    return y.unflatten(0, (b, h))


@custom_op("kmixer::blocked_sinkhorn", mutates_args=())
def _forward(
    queries: Tensor, keys: Tensor, values: Tensor, closed: Tensor | None, iterations: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (n, t, f), and the potentials f of every half-step over rows, g before each of them (steps, n, t)."""
    n, t, _ = queries.shape
    steps = iterations // 2 + 1
    y = values.new_empty(values.shape)
    f, g = (queries.new_zeros(steps, n, t) for _ in range(2))
    if closed is not None:
        g[0].masked_fill_(closed, -torch.inf)
    for heads in _heads(n, t):
        q, k, v = queries[heads] * scale, keys[heads], values[heads]
        shut = None if closed is None else closed[heads]
        for step in range(steps):
            last = step + 1 == steps
            before, potentials = g[step, heads], f[step, heads]
            sums = before.new_zeros(before.shape)
            for rows in _rows(t, len(q)):
                weights = torch.baddbmm(before.unsqueeze(1), q[:, rows], k.mT)
                highest = weights.amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)  # a row of -inf alone
                total = weights.sub_(highest).exp_().sum(-1, keepdim=True)
                potentials[:, rows] = -(total.log() + highest).squeeze(-1).masked_fill(total.squeeze(-1) == 0, 0)
                if shut is not None:
                    potentials[:, rows].masked_fill_(shut[:, rows], -torch.inf)
                    total = total.masked_fill(shut[:, rows, None], torch.inf)
                if last:
                    torch.bmm(weights.div_(total), v, out=y[heads, rows])
                else:
                    sums += (1 / total).mT.bmm(weights).squeeze(1)
            if not last:
                g[step + 1, heads] = _after_columns(q, k, potentials, before, sums)
    return y, f, g


def _after_columns(q: Tensor, k: Tensor, f: Tensor, before: Tensor, sums: Tensor) -> Tensor:
    """g - log of the sums over columns of exp(S + f + g)."""
    potentials = before - sums.log()
    potentials.masked_fill_(before == -torch.inf, -torch.inf)
    if bool((sums < LOST_DIGITS * torch.finfo(sums.dtype).tiny).logical_and_(before > -torch.inf).any()):
        for columns in _rows(k.shape[1], len(k)):
            again = torch.logsumexp(torch.baddbmm(f.unsqueeze(1), k[:, columns], q.mT), -1)
            potentials[:, columns] = torch.where(before[:, columns] == -torch.inf, -torch.inf, -again)
    return potentials


@custom_op("kmixer::blocked_sinkhorn_backward", mutates_args=())
def _backward(
    queries: Tensor, keys: Tensor, values: Tensor, y: Tensor, f: Tensor, g: Tensor, grad: Tensor, scale: float
) -> list[Tensor]:
    """Gradients of queries, keys and values: of the half-steps one after the other, the last first."""
    n, t, _ = queries.shape
    made = [torch.zeros_like(tensor) for tensor in (queries, keys, values)]
    carried = (grad * y).sum(-1, keepdim=True)
    for heads in _heads(n, t):
        q, k, v, here = queries[heads] * scale, keys[heads], values[heads], grad[heads]
        dq, dk, dv = (tensor[heads] for tensor in made)
        of_columns = q.new_zeros(q.shape[:2])  # the gradient of g
        for rows in _rows(t, len(q)):
            weights = _weights(q[:, rows], k, f[-1, heads, rows], g[-1, heads])
            dv.baddbmm_(weights.mT, here[:, rows])
            changes = torch.baddbmm(carried[heads, rows], here[:, rows], v.mT, beta=-1).mul_(weights)
            of_columns += changes.sum(1)
            _add_products(changes, q, k, dq, dk, rows, 1)
        for step in range(len(f) - 2, -1, -1):
            after, before = g[step + 1, heads], g[step, heads]
            # exp(S + f + g) before the half-step over columns, over the same after it
            ratio = torch.exp(before - after).nan_to_num_(0)  # of what is closed, -inf - -inf
            earlier = torch.zeros_like(of_columns)
            for rows in _rows(t, len(q)):
                weights = _weights(q[:, rows], k, f[step, heads, rows], after)
                of_rows = -weights.bmm(of_columns.unsqueeze(-1))  # the gradient of f
                earlier -= of_rows.mT.bmm(weights).squeeze(1)
                weights.mul_(torch.baddbmm(of_columns.unsqueeze(1), of_rows, ratio.unsqueeze(1)))
                _add_products(weights, q, k, dq, dk, rows, -1)
            of_columns = earlier.mul_(ratio)
    made[0].mul_(scale)
    return made


def _weights(q: Tensor, k: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """exp(S + f + g) of a block of rows."""
    return torch.baddbmm(g.unsqueeze(1), q, k.mT).add_(f.unsqueeze(-1)).exp_()


def _add_products(changes: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, rows: slice, sign: int) -> None:
    """What the changes of a block of scores add to the gradients of its queries, and of all keys."""
    dq[:, rows].baddbmm_(changes, k, alpha=sign)
    dk.baddbmm_(changes.mT, q[:, rows], alpha=sign)


def _heads(n: int, t: int) -> Iterator[slice]:
    """The batch rows and heads that are computed together: several where all weights of one are few."""
    count = max(1, BLOCK_NUMBERS // (t * t))
    return (slice(start, start + count) for start in range(0, n, count))


def _rows(t: int, heads: int) -> Iterator[slice]:
    """Blocks of rows whose weights over t columns are BLOCK_NUMBERS in so many heads."""
    count = max(1, BLOCK_NUMBERS // (t * heads))
    return (slice(start, start + count) for start in range(0, t, count))


@_forward.register_fake
def _(
    queries: Tensor, keys: Tensor, values: Tensor, closed: Tensor | None, iterations: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    f, g = (queries.new_empty(iterations // 2 + 1, *queries.shape[:2]) for _ in range(2))
    return values.new_empty(values.shape), f, g


@_backward.register_fake
def _(
    queries: Tensor, keys: Tensor, values: Tensor, y: Tensor, f: Tensor, g: Tensor, grad: Tensor, scale: float
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (queries, keys, values)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, keys, values, _, _, ctx.scale = inputs
    ctx.save_for_backward(queries, keys, values, *output)


@first_order
def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return *_backward(*ctx.saved_tensors, grad, ctx.scale), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
