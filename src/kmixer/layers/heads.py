"""What attention layers share: heads, the positions they keep, and a look at their weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.layers.rotary import Rotation, rotate, rotation
from kmixer.ops.gradients import HandWritten, first_order
from kmixer.state import AState, in_order, longest, owned, rows
from kmixer.trail import joined


def split_heads(x: Float[Tensor, "b t d"], heads: int) -> Float[Tensor, "b h t e"]:
    """Contiguous slices of the channels, one per head."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_apart(
    projected: Float[Tensor, "b t _"], heads: int, parts: int, *, rotated: int = 0, angles: Rotation | None = None
) -> tuple[Float[Tensor, "b h t e"], ...]:
    """The heads of queries, keys and values that stand side by side, or of some of them: a tensor each.

    Args:
        projected: (b, t, parts d).
        heads: h, of width e = d / h.
        rotated: how many of the parts, the first ones, are rotated by the `angles` of the t positions, or of those
            that every row has.
    """
    of_all_rows = angles is None or angles.cosine.ndim == 2
    if projected.dtype == torch.float32 and of_all_rows and native.usable(projected):
        apart: tuple[Tensor, ...] = _HeadsApart.apply(projected, heads, parts, rotated, *(angles or (None, None)))
        return apart
    projections = [split_heads(part, heads) for part in projected.chunk(parts, dim=-1)]
    if rotated == 0 or angles is None:
        return tuple(projections)
    return *rotate(torch.stack(projections[:rotated]), angles).unbind(0), *projections[rotated:]


class _HeadsApart(HandWritten):
    """Written by hand: one pass over all parts, and autograd would copy them, rotate, and copy again."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, heads: int, parts: int, rotated: int, cosine: Tensor | None, sine: Tensor | None
    ) -> tuple[Tensor, ...]:
        b, t, width = projected.shape
        ctx.save_for_backward(cosine, sine)
        ctx.rotated, ctx.shape = rotated, (b, heads, t, width // (parts * heads))
        apart = tuple(projected.new_empty(ctx.shape) for _ in range(parts))
        _move(ctx, projected.contiguous(), apart, cosine, sine, back=False)
        return apart

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        b, heads, t, e = ctx.shape
        together = gradients[0].new_empty(b, t, len(gradients) * heads * e)
        _move(ctx, together, tuple(gradient.contiguous() for gradient in gradients), *ctx.saved_tensors, back=True)
        return together, None, None, None, None, None


def _move(
    ctx: Any, together: Tensor, apart: tuple[Tensor, ...], cosine: Tensor | None, sine: Tensor | None, *, back: bool
) -> None:
    """From one tensor into those apart, or back."""
    row = 0 if cosine is None else cosine.stride(0)
    parts = native.addresses(apart)
    native.call("heads_apart", together, parts, cosine, sine, row, len(apart), ctx.rotated, *ctx.shape, int(back))


def merge_heads(y: Float[Tensor, "b h t e"], added: Float[Tensor, "b t d"] | None = None) -> Float[Tensor, "b t d"]:
    """The slices side by side again, and what is `added` to them."""
    merged = y.transpose(1, 2).flatten(2)
    return merged if added is None else merged + added.to(merged.dtype)


def check_takes_state(causal: bool, state: object) -> None:
    """Raises InputError for a state given to a layer that has none."""
    if state is not None and not causal:
        raise InputError("state: a layer with causal=False sees all positions at once and takes none")


def positions_after(position: Int[Tensor, " b"], t: int) -> Int[Tensor, "b 1 t"]:
    """The next t positions of every row."""
    return position[:, None, None] + torch.arange(t, device=position.device)


def angles_after(position: Int[Tensor, " b"], start: int | None, t: int, e: int, dtype: torch.dtype) -> Rotation:
    """The angles of the next t positions: from `start` on where all rows stand there, else each row's own."""
    if start is None:
        return rotation(positions_after(position, t), e, dtype)
    if native.plain(position):
        return _angles_from(start, t, e, dtype, torch.is_inference_mode_enabled())
    return rotation(torch.arange(start, start + t, device=position.device), e, dtype)


@functools.lru_cache(maxsize=2)  # one layer asks after the other
def _angles_from(start: int, t: int, e: int, dtype: torch.dtype, inference: bool) -> Rotation:
    """On a CPU, kept for the layers that follow. Tables of inference mode serve there alone: autograd refuses them."""
    return rotation(torch.arange(start, start + t, device="cpu"), e, dtype)


def seen_before(cache: Float[Tensor, "b h s e"], position: Int[Tensor, " b"], start: int | None) -> Tensor:
    """The cache without the padding at its beginning that no row needs; a view."""
    return last_rows(cache, longest(position, cache.shape[2]) if start is None else start)


def last_rows(cache: Float[Tensor, "b h s e"], count: int) -> Float[Tensor, "b h _ e"]:
    """The last positions of a cache, `count` or all of them; a view, or the cache itself."""
    return cache if count >= cache.shape[2] else cache[:, :, cache.shape[2] - count :]


def after(past: Float[Tensor, "b h s e"], new: Float[Tensor, "b h t e"]) -> Float[Tensor, "b h _ e"]:
    """New positions after those kept from before, in the dtype of the new ones, which autocast may decide."""
    return torch.cat([past.to(new.dtype), new], dim=2) if past.shape[2] else new


def kept(tensor: Float[Tensor, "b h s e"], reach: int | None) -> Float[Tensor, "b h _ e"]:
    """The positions that later ones may look at, where each sees `reach` of them, itself included; None is all."""
    if reach is None or tensor.shape[2] < reach:
        return owned(tensor)
    return tensor[:, :, tensor.shape[2] - reach + 1 :].clone()  # a view would keep them all in memory


def mask_of_each(
    position: Int[Tensor, " b"], t: int, s: int, reach: int | None, *, exclude_self: bool = False
) -> Bool[Tensor, "b 1 t s"]:
    """True where the last t of s positions may look, in rows that stand at other positions and are padded before.

    Args:
        position: of the first of the t, in every row.
        reach: how many positions each sees, itself included; None is all.
        exclude_self: they do not see themselves, but for position 0, which sees nothing else.
    """
    query = positions_after(position, t)[..., None]
    key = positions_after(position - (s - t), s)[:, :, None]  # below 0: padding
    allowed = (key >= 0) & (key <= query)
    if reach is not None:
        allowed = allowed & (key > query - reach)
    return allowed & ((key < query) | (query == 0)) if exclude_self else allowed


def in_groups(
    layer: Callable[..., tuple[Tensor, AState]],
    x: Float[Tensor, "b t d"],
    state: AState,
    position: Tensor,
    added: Float[Tensor, "b t d"] | None,
    *,
    trail: bool = False,
) -> tuple[Tensor, AState]:
    """`layer(x, state, added=added)` for rows at positions (b,): those at one position together, then the next.

    For a layer that can do no more than rows of one position at once. It reads positions from the state, so that
    torch.compile cannot hold it in one graph.
    """
    groups: dict[int, list[int]] = {}
    for row, at in enumerate(position.tolist()):
        groups.setdefault(at, []).append(row)
    members = [*groups.values()]
    answers = [
        layer(x[chosen], rows(state, chosen), added=None if added is None else added[chosen], trail=trail)
        for chosen in members
    ]
    states = [state for _, state in answers]
    return in_order([y for y, _ in answers], members), joined(states, members, trail=trail)


def identity_values(like: Float[Tensor, "b h t e"]) -> Float[Tensor, "b h t t"]:
    """Values that are the rows of the identity: attending to them gives the weights themselves."""
    t = like.shape[2]
    return torch.eye(t, dtype=like.dtype, device=like.device).expand(*like.shape[:2], t, t)
