"""Fused softmax attention with windows: softmax over the allowed keys of scale q k^T, times the values.

A compiled kernel for whole sequences in float32 on a CPU, and torch's own kernels for the rest, all in memory
linear in t. What torch's lack is cut to fit: fewer queries than keys, and windows. A window of a whole sequence (t = s)
that is longer than twice the window goes in blocks, in time linear in t; any other is a mask (t, s).
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.attention.native import native_attention
from kmixer.ops.checks import check_tensors

# FlexAttention wants head widths in powers of two, this at least.
MIN_FLEX_WIDTH = 16

# A block of the compiled kernel's scores leaves the second cache level beyond this, or beyond half of it where all is
# seen, and torch's kernel is faster.
MAX_NATIVE_LENGTH = 4096


def causal_mask(queries: int, keys: int, reach: int | None, device: torch.device) -> Bool[Tensor, "t s"]:
    """True where the last `queries` of `keys` positions may look: themselves and before, `reach` keys in all."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if reach is None else mask.triu(keys - queries - reach + 1)


def softmax_attention(
    queries: Float[Tensor, "b h t e"],
    keys: Float[Tensor, "b h s e"],
    values: Float[Tensor, "b h s f"],
    *,
    causal: bool = True,
    reach: int | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h t f"]:
    """Attention by the fastest of the kernels at hand; inside torch.func (grad, vmap, jvp) by its definition.

    Args:
        queries: (b, h, t, e), the last t of the s positions.
        keys, values: (b, h, s, e) and (b, h, s, f).
        causal: position i sees itself and the positions before it.
        reach: of these the last `reach` only, itself included.
        scale: of the products; 1 / sqrt(e) when None.

    Raises:
        InputError: tensors on several devices or of a dtype that is not a real float.
    """
    check_tensors("softmax attention", queries=queries, keys=keys, values=values)
    b, h, t, e = queries.shape
    whole = t == keys.shape[2] and (reach is None or reach >= t)
    tensors = (queries, keys, values)
    if (
        whole
        and keys.shape == queries.shape
        and values.shape[:3] == keys.shape[:3]
        and native.usable(*tensors)
        and b * h >= torch.get_num_threads()
        and t <= MAX_NATIVE_LENGTH // (1 if causal else 2)
    ):
        scale = e**-0.5 if scale is None else scale
        return native_attention([queries], [keys], values, queries.new_ones(h, 1), causal=causal, scale=scale)
    if native.transformed(*tensors):
        return plain_attention(*tensors, causal=causal, reach=reach, scale=scale)
    return sdpa_attention(*tensors, causal=causal, reach=reach, scale=scale)


def plain_attention(
    queries: Float[Tensor, "b h t e"],
    keys: Float[Tensor, "b h s e"],
    values: Float[Tensor, "b h s f"],
    *,
    causal: bool = True,
    reach: int | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h t f"]:
    """The definition, for torch.func and forward mode, of which torch's fused kernels have no part. Memory t s."""
    scores = (queries.shape[-1] ** -0.5 if scale is None else scale) * (queries @ keys.mT)
    if causal:
        mask = causal_mask(queries.shape[2], keys.shape[2], reach, queries.device)
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1) @ values


def sdpa_attention(
    queries: Float[Tensor, "b h t e"],
    keys: Float[Tensor, "b h s e"],
    values: Float[Tensor, "b h s f"],
    *,
    causal: bool = True,
    reach: int | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h t f"]:
    """The same through torch's scaled_dot_product_attention, fused where torch has a kernel for it."""
    (t, e), (s, f) = queries.shape[2:], values.shape[2:]
    if keys.shape[3] != e:
        raise InputError(f"keys: got width {keys.shape[3]} for queries of {e}; they have the same")
    if e != f:  # the fused kernels want one width for all three
        padded = (F.pad(tensor, (0, max(e, f) - tensor.shape[-1])) for tensor in (queries, keys, values))
        scale = e**-0.5 if scale is None else scale
        return sdpa_attention(*padded, causal=causal, reach=reach, scale=scale)[..., :f]
    if not causal:
        return F.scaled_dot_product_attention(queries, keys, values, scale=scale)
    if reach is not None and reach < s:
        if t == s and s > 2 * reach:
            return _in_blocks(queries, keys, values, reach, scale)
    elif t == 1:
        return F.scaled_dot_product_attention(queries, keys, values, scale=scale)
    elif t == s:
        # is_causal aligns its triangle to the upper left, which is right for as many keys as queries.
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
    mask = causal_mask(t, s, reach, queries.device)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)


def _in_blocks(queries: Tensor, keys: Tensor, values: Tensor, reach: int, scale: float | None) -> Tensor:
    """A window in O(t reach): blocks of `reach` queries, each against its own block of keys and the one before."""
    b, h, t, _ = queries.shape
    count = -(-t // reach)

    def blocks(tensor: Tensor) -> Tensor:
        """(b, h, t, e) to (b h, n, reach, e); positions past the end are zero, and no real query sees them."""
        padded = tensor.new_zeros(b, h, count * reach, tensor.shape[-1])
        padded[:, :, :t] = tensor
        return padded.view(b * h, count, reach, -1)

    q, k, v = blocks(queries), blocks(keys), blocks(values)
    y = values.new_empty(b * h, count, reach, values.shape[-1])
    y[:, :1] = F.scaled_dot_product_attention(q[:, :1], k[:, :1], v[:, :1], is_causal=reach > 1, scale=scale)
    two_keys, two_values = (torch.cat([tensor[:, :-1], tensor[:, 1:]], dim=2) for tensor in (k, v))
    mask = causal_mask(reach, 2 * reach, reach, queries.device)
    y[:, 1:] = F.scaled_dot_product_attention(q[:, 1:], two_keys, two_values, attn_mask=mask, scale=scale)
    return y.view(b, h, count * reach, -1)[:, :, :t]


def flex_attention(
    queries: Float[Tensor, "b h t e"],
    keys: Float[Tensor, "b h s e"],
    values: Float[Tensor, "b h s f"],
    *,
    causal: bool = True,
    reach: int | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h t f"]:
    """The same through torch's FlexAttention, which skips the blocks that a window masks.

    Compiled on a GPU. On a CPU it is not, holds all weights in memory, is slow and has no gradient:
    asked for one there, it raises InputError.
    """
    if not queries.is_cuda and torch.is_grad_enabled() and any(z.requires_grad for z in (queries, keys, values)):
        raise InputError("backend 'flex': FlexAttention has no gradient on a CPU; allowed there: sdpa, naive")
    from torch.nn.attention.flex_attention import create_block_mask

    t, s = queries.shape[2], keys.shape[2]
    past = s - t

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query + past
        return seen if reach is None else seen & (key > query + past - reach)

    mask = create_block_mask(allowed, None, None, t, s, device=queries.device.type) if causal else None
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    width = max(MIN_FLEX_WIDTH, 1 << (max(queries.shape[-1], values.shape[-1]) - 1).bit_length())
    padded = (F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in (queries, keys, values))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # the docstring says so
        y: Tensor = _flex_kernel(queries.is_cuda)(*padded, block_mask=mask, scale=scale)
    return y[..., : values.shape[-1]]


@cache
def _flex_kernel(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
