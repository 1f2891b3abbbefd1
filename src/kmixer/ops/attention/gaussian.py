"""Gaussian kernel attention: weights fall with the distance of two tokens, and nothing is projected.

    W_ij = exp(-|x_i - x_j|^2 / (2 sigma^2)) / sum over the allowed j' of the same
    y_i  = sum_j W_ij v_j                     with v = x, unless other values are given

* `naive`  distances, mask, renormalisation: the definition. All (t, t) weights in memory.
* `sdpa`   the same weights as softmax attention. |x_i|^2 is constant in a row and cancels, so with
           q' = [x / sigma^2, 1] and k' = [x, -|x|^2 / (2 sigma^2)] the weights are softmax(q' k'^T):
           torch's fused attention computes them in memory linear in t; a window of a whole sequence that is
           longer than twice the window goes in blocks, in time linear in t.
* `flex`   the same through torch's FlexAttention; on a CPU slow, see `kmixer.ops.attention.softmax`.

Source: Kundu et al. 2026 (arXiv 2605.02144) for the mixer; the d + 1 form follows from its definition.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.attention.softmax import causal_mask, flex_attention, sdpa_attention, softmax_attention
from kmixer.ops.checks import check_tensors
from kmixer.ops.gradients import refuse_transforms

Backend = Literal["auto", "naive", "sdpa", "flex"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# Fused attention wants head widths in multiples of this.
WIDTH_MULTIPLE = 8
# Keys whose mean is the centre of a causal sequence. Few: the queries that do not see all of them are computed another
# way. Not the first alone, from which |x|^2 is twice what it is from the mean, and without bound where that key is far.
CENTRE_KEYS = 16


def gaussian_attention(
    x: Float[Tensor, "b h t d"],
    log_sigma: Float[Tensor, " h"],
    *,
    values: Float[Tensor, "b h s f"] | None = None,
    keys: Float[Tensor, "b h s d"] | None = None,
    causal: bool = True,
    window: int | None = None,
    window_inclusive: bool = False,
    exclude_self: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "b h t f"]:
    """Average values with weights exp(-|x_i - x_j|^2 / (2 sigma^2)), normalised over the allowed keys.

    Args:
        x: queries, and keys where none are given (b, h, t, d). float16 is computed in float32: 1 / sigma^2
            leaves its range.
        log_sigma: log of each head's bandwidth (h,), in the units of x.
        values: (b, h, s, f); the keys when None.
        keys: (b, h, s, d) with s >= t, of which the last t are x itself: those kept from earlier
            calls and the new ones. x when None.
        causal: position i sees the keys j <= i.
        window: position i sees the `window` keys i - window < j <= i only; itself is one of them.
        window_inclusive: count the window without position i itself: i - window <= j <= i.
        exclude_self: position i does not see itself, i > 0; position 0 has nothing else.
        backend: "auto" takes the same form as "sdpa" to the fastest kernel at hand, see `kmixer.ops.attention.softmax`.

    Returns:
        y (b, h, t, f), in the dtype of x; f is d where no values are given.

    Raises:
        InputError: an unknown backend; a window or exclude_self without causal; a window that leaves
            nothing to see; keys that are fewer than queries; tensors on several devices or of a dtype that is not a
            real float; torch.func or forward mode with another backend than "naive", which "auto" takes there.

    Source: Kundu et al. 2026 (arXiv 2605.02144).
    """
    if backend not in BACKENDS:
        raise InputError(f"backend: got {backend!r}; allowed: {', '.join(BACKENDS)}")
    check_tensors("gaussian_attention", x=x, log_sigma=log_sigma, keys=keys, values=values)
    keys = x if keys is None else keys
    values = keys if values is None else values
    if keys.shape[2] < x.shape[2] or values.shape[2] != keys.shape[2]:
        raise InputError(
            f"keys and values: got {keys.shape[2]} and {values.shape[2]} positions for {x.shape[2]} queries; "
            "they have the positions of the queries at their end"
        )
    if native.transformed(x, keys, values, log_sigma):
        if backend not in ("auto", "naive"):
            refuse_transforms(f"backend {backend!r}", x, keys, values, log_sigma)
        backend = "naive"
    reach = _reach(causal, window, window_inclusive, exclude_self)
    if x.shape[2] == 0:
        return x.new_empty(*x.shape[:3], values.shape[-1])
    if exclude_self:
        return _without_self(x, keys, values, log_sigma, reach, backend)
    return _attend(x, keys, values, log_sigma, causal, reach, backend)


def _reach(causal: bool, window: int | None, inclusive: bool, exclude_self: bool) -> int | None:
    """How many keys a position sees at most, itself included; None is all of them."""
    if not causal and (window is not None or exclude_self):
        raise InputError("window and exclude_self go with causal=True")
    if window is None:
        return None
    reach = window + inclusive
    if reach < 1 + exclude_self:
        raise InputError(f"window: got {window}; it leaves a position nothing to see")
    return reach


def _without_self(
    x: Tensor, keys: Tensor, values: Tensor, log_sigma: Tensor, reach: int | None, backend: Backend
) -> Tensor:
    """Query i sees the keys up to i - 1: the same attention, with keys and values one position late."""
    first = keys.shape[2] == x.shape[2]  # the first query is position 0
    late = x[:, :, 1:] if first else x
    y = values[:, :, :1].to(x.dtype)
    if late.shape[2]:
        late_reach = None if reach is None else reach - 1
        rest = _attend(late, keys[:, :, :-1], values[:, :, :-1], log_sigma, True, late_reach, backend)
        y = torch.cat([y, rest], dim=2) if first else rest
    return y


def _attend(
    x: Tensor, keys: Tensor, values: Tensor, log_sigma: Tensor, causal: bool, reach: int | None, backend: Backend
) -> Tensor:
    """Query i of t against the first s - t + i + 1 of s keys, or all; at most the last `reach` of them."""
    with torch.autocast(x.device.type, enabled=False):  # the dtype of x is the one that was asked for
        if backend == "naive":
            return _naive(x, keys, values, log_sigma, causal, reach).to(x.dtype)
        queries, features = as_softmax(x, keys, log_sigma, causal=causal)
        attention = {"auto": softmax_attention, "sdpa": sdpa_attention, "flex": flex_attention}[backend]
        y = attention(queries, features, values.to(queries.dtype), causal=causal, reach=reach, scale=1.0).to(x.dtype)
        past = keys.shape[2] - x.shape[2]
        # Queries that do not see all keys of the centre: by the definition, so that no later key rounds them otherwise.
        early = min(x.shape[2], max(0, CENTRE_KEYS - past)) if causal and _is_centred(x.dtype) else 0
        if early == 0:
            return y
        seen = keys[:, :, : past + early]
        seen_values = seen if values is keys else values[:, :, : past + early]
        first = _naive(x[:, :, :early], seen, seen_values, log_sigma, causal, reach)
        return torch.cat([first.to(x.dtype), y[:, :, early:]], dim=2)


def _naive(x: Tensor, keys: Tensor, values: Tensor, log_sigma: Tensor, causal: bool, reach: int | None) -> Tensor:
    accurate = torch.promote_types(x.dtype, torch.float32)
    x, keys, values = (tensor.to(accurate) for tensor in (x, keys, values))
    if native.transformed(x, keys, log_sigma):  # cdist has no derivative in forward mode
        squares = (x[..., :, None, :] - keys[..., None, :, :]).square().sum(-1)
    else:
        squares = torch.cdist(x, keys, compute_mode="donot_use_mm_for_euclid_dist").square()
    exponents = -0.5 * squares * torch.exp(-2 * log_sigma.to(accurate))[:, None, None]
    if causal:
        exponents = exponents.masked_fill(~causal_mask(x.shape[2], keys.shape[2], reach, x.device), -torch.inf)
    return torch.softmax(exponents, dim=-1) @ values


def _is_centred(dtype: torch.dtype) -> bool:
    """Whether a centre is subtracted: bfloat16 would round what is left by more than the centre saves."""
    return dtype != torch.bfloat16


def as_softmax(
    x: Float[Tensor, "b h t d"],
    keys: Float[Tensor, "b h s d"],
    log_sigma: Float[Tensor, " h"],
    *,
    causal: bool = True,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b h s e"]]:
    """q' and k' whose softmax attention, with scale 1, has the weights of Gaussian kernel attention.

    The kernel does not see a shift of all tokens, float numbers do: the mean of the keys is subtracted, so that what
    tokens share costs no digits. Where positions see the past only, it is the mean of the first CENTRE_KEYS: queries
    that see all of these are rounded by nothing later, and those before them do not take this form. The key's
    -|x|^2 / (2 sigma^2) stands in two columns, a rounded value and its remainder: in bfloat16 one column would be off
    by whole units. Widths are padded to a multiple of 8.
    """
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    accurate = torch.promote_types(dtype, torch.float32)
    precision = torch.exp(-2 * log_sigma.to(accurate))[:, None, None]
    if _is_centred(x.dtype):
        centre = keys[:, :, : CENTRE_KEYS if causal else None].mean(2, keepdim=True).detach()
        x, keys = x.to(dtype) - centre, keys.to(dtype) - centre
    bias = -0.5 * keys.to(accurate).square().sum(-1, keepdim=True) * precision
    high = bias.to(dtype)
    low = (bias - high.to(accurate)).detach().to(dtype)  # the gradient of both goes through `high`
    spare = -(keys.shape[-1] + 2) % WIDTH_MULTIPLE
    ones = x.new_ones(*x.shape[:-1], 2)
    queries = torch.cat([(x.to(accurate) * precision).to(dtype), ones.to(dtype)], dim=-1)
    features = torch.cat([keys, high, low], dim=-1)
    return F.pad(queries, (0, spare)), F.pad(features, (0, spare))
