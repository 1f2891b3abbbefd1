"""Backward functions written by hand, which have no derivative of their own and none in forward mode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from kmixer.errors import InputError

INSTEAD = (
    "use float64, with backend 'recurrent' for decayed_linear_attention, 'naive' for hierarchical_attention and "
    "gaussian_attention; softmax attention has none on a CPU"
)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a hand-written backward refuse second derivatives, instead of leaving them out silently."""

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            raise InputError(f"this backward has no derivative of its own: for second derivatives {INSTEAD}")
        return backward(ctx, *gradients)

    return checked


def refuse_tangents(tensors: Iterable[Tensor]) -> None:
    """Refuse the tangents of forward-mode derivatives, which torch drops at a custom operator without a word.

    Raises:
        InputError: a tensor that has one.
    """
    if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in tensors):
        raise InputError(f"this operator has no derivative in forward mode: for one {INSTEAD}")
