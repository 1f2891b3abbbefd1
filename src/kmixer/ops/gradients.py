"""Backward functions written by hand, which have no derivative of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from kmixer.errors import InputError


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a hand-written backward refuse second derivatives, instead of leaving them out silently."""

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            raise InputError(
                "this backward has no derivative of its own: for second derivatives use float64, with backend "
                "'recurrent' for decayed_linear_attention, 'naive' for hierarchical_attention and gaussian_attention; "
                "softmax attention has none on a CPU"
            )
        return backward(ctx, *gradients)

    return checked
