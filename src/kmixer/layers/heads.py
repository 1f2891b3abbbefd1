"""What attention layers share: heads, the positions they keep, and a look at their weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kmixer.errors import InputError


def split_heads(x: Float[Tensor, "b t d"], heads: int) -> Float[Tensor, "b h t e"]:
    """Contiguous slices of the channels, one a head."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(y: Float[Tensor, "b h t e"]) -> Float[Tensor, "b t d"]:
    """The slices side by side again."""
    return y.transpose(1, 2).flatten(2)


def check_state(causal: bool, state: object) -> None:
    """Raises InputError for a state given to a layer that has none."""
    if state is not None and not causal:
        raise InputError("state: a layer with causal=False sees all positions at once and takes none")


def after(past: Float[Tensor, "b h s e"], new: Float[Tensor, "b h t e"]) -> Float[Tensor, "b h _ e"]:
    """New positions after those kept from before, in the dtype of the new ones, which autocast may decide."""
    return torch.cat([past.to(new.dtype), new], dim=2) if past.shape[2] else new


def kept(tensor: Float[Tensor, "b h s e"], reach: int | None) -> Float[Tensor, "b h _ e"]:
    """The positions that later ones may look at, where each sees `reach` of them, itself included; None is all."""
    return tensor if reach is None else tensor[:, :, max(0, tensor.shape[2] - reach + 1) :]


def identity_values(like: Float[Tensor, "b h t e"]) -> Float[Tensor, "b h t t"]:
    """Values that are the rows of the identity: attending to them gives the weights themselves."""
    t = like.shape[2]
    return torch.eye(t, dtype=like.dtype, device=like.device).expand(*like.shape[:2], t, t)
