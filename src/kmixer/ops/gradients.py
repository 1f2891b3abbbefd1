"""Backward functions written by hand, which have no derivative of their own and take no part in torch.func."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from kmixer import native
from kmixer.errors import InputError

INSTEAD = (
    "use float64, with backend 'recurrent' for decayed_linear_attention, 'naive' for hierarchical_attention, "
    "gaussian_attention and sinkhorn_attention; softmax attention has none on a CPU"
)


class HandWritten(torch.autograd.Function):
    """A function with a backward of its own; without gradients it is its `forward` alone, which costs less to call.

    For functions that run only where `native.usable`: nothing but autograd's backward would ask for the context.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        return super().apply(*arguments) if torch.is_grad_enabled() else cls.forward(_Forgotten(), *arguments)


class _Forgotten:
    """The context of a call that no backward follows."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a hand-written backward refuse second derivatives, instead of leaving them out silently.

    Its gradients arrive with their numbers in memory: a view that stands for negated numbers is copied.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            raise InputError(f"this backward has no derivative of its own: for second derivatives {INSTEAD}")
        # torch.func or forward mode over an earlier graph, or is_grads_batched=True
        if native.transformed(*gradients) or any(x is not None and is_legacy_batchedtensor(x) for x in gradients):
            raise InputError(
                "this backward has no part in torch.func, is_grads_batched=True and derivatives in forward mode: for "
                f"one {INSTEAD}"
            )
        return backward(ctx, *(None if x is None else x.resolve_neg() for x in gradients))

    return checked


def refuse_transforms(operator: str, *tensors: Tensor) -> None:
    """Refuse torch.func (grad, vmap, jvp) and forward mode, whose tangents torch drops at a custom operator silently.

    Raises:
        InputError: inside one of them.
    """
    if native.transformed(*tensors):
        raise InputError(
            f"{operator} has no part in torch.func and no derivative in forward mode: for one {INSTEAD}, or leave the "
            "choice to backend 'auto'"
        )
