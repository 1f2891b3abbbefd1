"""Decayed linear attention by the compiled kernels for a CPU: backend `native`.

The recurrence with its state in the processor's cache, as custom operators that torch.compile keeps whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from kmixer import native
from kmixer.ops.gradients import first_order

# The compiled backward leaves partial sums over blocks of this many channels (kWide in native/decay.cpp).
NATIVE_CHANNELS = 64


def native_decay(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y (b, t, d) and the final state (b, r, d), all float32; arguments as `decayed_linear_attention`."""
    y, final = _native_forward(q, k, v, log_decay, state)
    return y, final


@custom_op("kmixer::native_decay", mutates_args=())
def _native_forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The compiled recurrence."""
    q, k, v, state = (x.contiguous() for x in (q, k, v, state))
    y, final = torch.empty_like(v), torch.empty_like(state)
    native.call("decay_forward", q, k, v, log_decay.exp(), state, y, final, *q.shape, v.shape[-1])
    return y, final


@_native_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@custom_op("kmixer::native_decay_backward", mutates_args=())
def _native_backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs: the recurrence again, and then that of dS backwards in time."""
    q, k, v, state, dy, dfinal = (x.contiguous() for x in (q, k, v, state, dy, dfinal))
    b, _, r = q.shape
    blocks = -(-v.shape[-1] // NATIVE_CHANNELS)
    dq, dk = q.new_empty(blocks, *q.shape), k.new_empty(blocks, *k.shape)
    dv, dstate = torch.empty_like(v), torch.empty_like(state)
    dlog_decay = log_decay.new_empty(blocks, b, r, dtype=torch.float64)
    inputs = (q, k, v, log_decay.exp(), state, dy, dfinal)
    native.call("decay_backward", *inputs, dq, dk, dv, dlog_decay, dstate, *q.shape, v.shape[-1])
    return dq.sum(0), dk.sum(0), dv, dlog_decay.sum((0, 1)).to(log_decay.dtype), dstate


@_native_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_decay, state))


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


@first_order
def _native_gradients(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
    return _native_backward(*ctx.saved_tensors, dy, dfinal)


_native_forward.register_autograd(_native_gradients, setup_context=_keep_inputs)
