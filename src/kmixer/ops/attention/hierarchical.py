"""Hierarchical attention: one softmax over scores of several resolutions.

    S_ij = sum_l alpha_l q^l_[i / 2^l] . k^l_[j / 2^l] / sqrt(e)      [.]: rounded down
    y_i  = sum_j softmax_j(S_ij over the allowed j) v_j

Level l has ceil(t / 2^l) queries and keys, so that all score products cost sum_l 4^-l < 4/3 of those of level 0.

* `naive`    the formula: every level's scores spread to (t, t) and added.
* `blocked`  blocks of queries: a coarse score is added where it belongs without being copied out, and no
             block is kept for the backward, which makes it again. Memory linear in t.
* `native`   the same as a compiled kernel for a CPU.
* `sdpa`     softmax attention whose queries are alpha_0 q^0_i, alpha_1 q^1_[i / 2], ... side by side, and the keys
             likewise: L times the products of level 0, in torch's fused attention, which a GPU makes faster than
             fewer products with their scores in memory.

Source: Cirrincione 2026 (arXiv 2604.08829), of which the abstract fixes levels, level-specific scores and convex
weights; indexing by the rounded-down position is our reading.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.attention.hierarchical_blocked import blocked_hierarchical_attention
from kmixer.ops.attention.native import native_attention
from kmixer.ops.attention.softmax import causal_mask, sdpa_attention
from kmixer.ops.checks import check_tensors
from kmixer.ops.gradients import refuse_transforms

Backend = Literal["auto", "naive", "blocked", "native", "sdpa"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# The compiled kernel's blocks are whole cells of so many levels (kBlock in native/hierarchical.cpp).
MAX_NATIVE_LEVELS = 6
# What it computes in float32.
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def hierarchical_attention(
    queries: list[Float[Tensor, "b h _ e"]],
    keys: list[Float[Tensor, "b h _ e"]],
    values: Float[Tensor, "b h s f"],
    weights: Float[Tensor, "h l"],
    *,
    t: int,
    causal: bool = True,
    backend: Backend = "auto",
) -> Float[Tensor, "b h t f"]:
    """Average values by the softmax of weighted scores of several levels.

    Args:
        queries: of each level l, the rows [p / 2^l] to [(s - 1) / 2^l] where p = s - t is the position of the
            first query (b, h, rows, e).
        keys: of each level l, the ceil(s / 2^l) rows (b, h, rows, e).
        values: (b, h, s, f), of all s positions.
        weights: of the levels in every head (h, L), convex: 0 or more, summing to 1.
        t: number of queries, the last t of the s positions.
        causal: position i sees the keys j <= i.
        backend: "auto" is "sdpa" on a GPU. Elsewhere it is, for queries that are all positions, "native" where it
            can run, or else "blocked", and "naive" for the last few of them.

    Returns:
        y (b, h, t, f), in the dtype of the values; computed in float32 where that is narrower, but for "sdpa".

    Raises:
        InputError: an unknown backend or one that cannot compute this, levels that do not fit each other or the values,
            tensors on several devices or of a dtype that is not a real float; torch.func or forward mode with another
            backend than "naive", which "auto" takes there.

    Source: Cirrincione 2026 (arXiv 2604.08829), abstract; the indexing is our reading.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend: got {backend!r}; allowed: {', '.join(BACKENDS)}")
    tensors = {f"queries of level {level}": q for level, q in enumerate(queries)}
    tensors |= {f"keys of level {level}": k for level, k in enumerate(keys)}
    check_tensors("hierarchical_attention", **tensors, values=values, weights=weights)
    s = values.shape[2]
    _check(queries, keys, values, weights, t)
    if t == 0:
        return values[:, :, :0]
    tensors_of_all = (*queries, *keys, values, weights)
    transformed = native.transformed(*tensors_of_all)
    compiled = t == s and len(queries) <= MAX_NATIVE_LEVELS and native.usable(*tensors_of_all, dtypes=NARROW)
    if backend == "auto" and transformed:
        backend = "naive"
    elif backend == "auto":
        backend = "sdpa" if values.is_cuda else "native" if compiled else "blocked" if t == s else "naive"
    if transformed and backend != "naive":
        refuse_transforms(f"backend {backend!r}", *tensors_of_all)
    if backend == "native" and not compiled:
        raise InputError(
            "backend 'native': it needs the compiled kernels, tensors on a CPU, all positions as queries, at most "
            f"{MAX_NATIVE_LEVELS} levels, and no float64; allowed: auto, naive, blocked, sdpa"
        )
    if backend == "blocked" and t != s:
        raise InputError(
            f"backend 'blocked': got {t} queries of {s} positions, it needs all; allowed: auto, naive, sdpa"
        )
    if backend == "sdpa":
        return _side_by_side(queries, keys, values, weights, t, causal)
    dtype = torch.promote_types(values.dtype, torch.float32)
    queries, keys = ([z.to(dtype) for z in levels] for levels in (queries, keys))
    with torch.autocast(values.device.type, enabled=False):
        if backend == "native":
            scale = queries[0].shape[-1] ** -0.5
            y = native_attention(queries, keys, values.to(dtype), weights.to(dtype), causal=causal, scale=scale)
            return y.to(values.dtype)
        if backend == "blocked":
            y = blocked_hierarchical_attention(queries, keys, values.to(dtype), weights.to(dtype), causal)
            return y.to(values.dtype)
        scores = hierarchical_scores(queries, keys, weights.to(dtype), s=s, t=t)
        if causal:
            scores = scores.masked_fill(~causal_mask(t, s, None, scores.device), -torch.inf)
        return (torch.softmax(scores, dim=-1) @ values.to(dtype)).to(values.dtype)


def _side_by_side(
    queries: list[Tensor], keys: list[Tensor], values: Tensor, weights: Tensor, t: int, causal: bool
) -> Tensor:
    s, e = values.shape[2], queries[0].shape[-1]
    wide_queries, wide_keys = [], []
    for level, (q, k) in enumerate(zip(queries, keys, strict=True)):
        weighted = weights[:, level, None, None].to(values.dtype) * q.to(values.dtype)
        wide_queries.append(_spread(weighted, level, (s - t) % (1 << level), t))
        wide_keys.append(_spread(k.to(values.dtype), level, 0, s))
    q, k = torch.cat(wide_queries, -1), torch.cat(wide_keys, -1)
    with torch.autocast(values.device.type, enabled=False):
        return sdpa_attention(q, k, values, causal=causal, scale=e**-0.5)


def _spread(rows: Tensor, level: int, first: int, count: int) -> Tensor:
    """`count` rows (b, h, count, e) from `first` on, after every row is repeated 2^level times."""
    return rows.unsqueeze(3).expand(-1, -1, -1, 1 << level, -1).flatten(2, 3)[:, :, first : first + count]


def hierarchical_scores(
    queries: list[Float[Tensor, "b h _ e"]],
    keys: list[Float[Tensor, "b h _ e"]],
    weights: Float[Tensor, "h l"],
    *,
    s: int,
    t: int,
) -> Float[Tensor, "b h t s"]:
    """The scores S of `hierarchical_attention`, before the mask."""
    positions, columns = torch.arange(s - t, s, device=weights.device), torch.arange(s, device=weights.device)
    scores = None
    for level, (q, k) in enumerate(zip(queries, keys, strict=True)):
        rows = (positions >> level) - ((s - t) >> level)
        small = weights[:, level, None, None] * (q @ k.mT) / q.shape[-1] ** 0.5
        spread = small[:, :, rows][:, :, :, columns >> level]
        scores = spread if scores is None else scores + spread
    assert scores is not None
    return scores


def _check(queries: list[Tensor], keys: list[Tensor], values: Tensor, weights: Tensor, t: int) -> None:
    s = values.shape[2]
    if not len(queries) == len(keys) == weights.shape[-1] > 0:
        raise InputError(
            f"levels: got {len(queries)} of queries, {len(keys)} of keys, {weights.shape[-1]} weights; as many of each"
        )
    if not 0 <= t <= s:
        raise InputError(f"t: got {t} queries for {s} positions")
    like = (*values.shape[:2], queries[0].shape[3])
    if tuple(weights.shape) != (like[1], len(keys)):
        raise InputError(f"weights: got {tuple(weights.shape)}; allowed: {(like[1], len(keys))}, heads and levels")
    for level, (q, k) in enumerate(zip(queries, keys, strict=True)):
        for what, tensor in (("queries", q), ("keys", k)):
            if (shape := (*tensor.shape[:2], tensor.shape[3])) != like:
                raise InputError(f"level {level}: got {what} {shape}; allowed: {like}, batch, heads and head width")
        rows = ((s - 1) >> level) - ((s - t) >> level) + 1 if t else 0
        if (q.shape[2] != rows and t) or k.shape[2] != -(-s >> level):
            raise InputError(
                f"level {level}: got {q.shape[2]} queries and {k.shape[2]} keys; {t} queries of {s} positions have "
                f"{rows} and {-(-s >> level)} there"
            )
