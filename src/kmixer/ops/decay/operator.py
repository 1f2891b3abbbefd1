"""What backends of decayed linear attention share that are operators of torch's: torch.compile keeps them whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import custom_op

from kmixer.ops.gradients import first_order

# The largest rank whose state the Triton kernels hold in registers.
TRITON_MAX_RANK = 128
# exp(LEAST_LOG_DECAY) is 0 in every precision, as exp(-inf) is; but 0 times it is 0, where 0 times -inf is NaN.
LEAST_LOG_DECAY = -1e4

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
        of_five: Five = gradients(*ctx.saved_tensors, dy, dfinal)
        return of_five

    operator.register_autograd(of_inputs, setup_context=keep)
    return operator
