"""What the backends of decayed linear attention that are operators of torch's share: torch.compile keeps them whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import custom_op

from kmixer.ops.gradients import first_order

Two = tuple[Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def decay_operator(name: str, forward: Callable[..., Two], backward: Callable[..., Five]) -> Callable[..., Two]:
    """The operator kmixer::NAME of two functions.

    Args:
        forward: of q, k, v, log_decay and state, shaped as for `decayed_linear_attention` and of one dtype; gives y
            (b, t, d) and the state after the last position (b, r, d).
        backward: of the same five and the gradients of both; gives those of the five.
    """
    operator = custom_op(f"kmixer::{name}", forward, mutates_args=())
    gradients = custom_op(f"kmixer::{name}_backward", backward, mutates_args=())

    @operator.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Two:
        return v.new_empty(v.shape), state.new_empty(state.shape)

    @gradients.register_fake
    def _(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape) for x in inputs[:5])

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: Two) -> None:
        ctx.save_for_backward(*inputs)

    @first_order
    def of_inputs(ctx: Any, dy: Tensor, dfinal: Tensor) -> Five:
        found: Five = gradients(*ctx.saved_tensors, dy, dfinal)
        return found

    operator.register_autograd(of_inputs, setup_context=keep)
    return operator
