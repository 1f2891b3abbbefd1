"""Decayed linear attention by the compiled kernels for a CPU: backend `native`.

The recurrence with its state in the processor's cache; all float32, but for values, which may be bfloat16, and outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kmixer import native
from kmixer.ops.decay.operator import decay_operator

# The compiled backward leaves partial sums over blocks of this many channels (kWide in native/decay.cpp).
NATIVE_CHANNELS = 64


def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The compiled recurrence."""
    q, k, v, state = (x.contiguous() for x in (q, k, v, state))
    y, final = torch.empty_like(v), torch.empty_like(state)
    native.call("decay_forward", q, k, v, log_decay.exp(), state, y, final, *q.shape, v.shape[-1])
    return y, final


def backward(
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


native_decay = decay_operator("native_decay", forward, backward)
