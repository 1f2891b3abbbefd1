"""Both ways in which a K2 layer mixes time, on a CPU in two passes over memory: decayed linear attention, and onto what
that gives a filter of the same inputs. Each alone is `kmixer.ops.decay` and `kmixer.ops.base_kernel`, which define it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kmixer import native
from kmixer.native.dispatch import ELEMENTS
from kmixer.ops.base_kernel import MAX_NATIVE_LAGS, filter_gradients, inputs_to_keep
from kmixer.ops.decay.native import backward, forward
from kmixer.ops.gradients import HandWritten, first_order


def mixes(
    x: Tensor, weights: tuple[Tensor, ...], lags: Tensor, rank: int, state: Tensor | None, history: Tensor | None
) -> bool:
    """Whether `decayed_and_filtered` takes x (b, t, d), and what a layer makes of it with these weights."""
    if not (native.usable(x, dtypes=ELEMENTS) and native.usable(lags, *weights)):
        return False
    if not all(kept is None or native.usable(kept, dtypes=ELEMENTS) for kept in (state, history)):
        return False
    b, t, d = x.shape
    return (
        t > 1
        and 0 < len(lags) <= MAX_NATIVE_LAGS
        and 0 not in (b, rank, d)
        and (state is None or (state.shape == (b, rank, d) and state.dtype == torch.float32))
        and (history is None or history.shape == (b, len(lags) - 1, d))
    )


def decayed_and_filtered(
    q: Tensor, k: Tensor, x: Tensor, log_decay: Tensor, lags: Tensor, state: Tensor | None, history: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Decayed linear attention of q, k and x plus the filter `lags` of x, both states after it.

    Args:
        q, k: queries and keys (b, t, r).
        x: values, and inputs of the filter (b, t, d), float32 or bfloat16, as the sum is; all else is float32.
        log_decay: of the decays (r,), 0 at most.
        lags: weights of the filter (n,).
        state: of the decay path (b, r, d), zeros where it is None.
        history: the n - 1 inputs before x (b, n - 1, d), zeros where it is None.
    """
    b, _, d = x.shape
    state = q.new_zeros(b, q.shape[-1], d) if state is None else state
    history = x.new_zeros(b, len(lags) - 1, d) if history is None else history.to(x.dtype)
    tensors = (q, k, x, log_decay, state, lags, history)
    y, state = _Mixed.apply(*(tensor.contiguous() for tensor in tensors))
    return y, state, inputs_to_keep(history, x)


class _Mixed(HandWritten):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, x: Tensor, log_decay: Tensor, state: Tensor, lags: Tensor, history: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, final = forward(q, k, x, log_decay, state)
        native.call("filter_forward", x, history, lags, y, *x.shape, len(lags), 1)
        ctx.save_for_backward(q, k, x, log_decay, state, lags, history)
        return y, final

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> Any:
        q, k, x, log_decay, state, lags, history = ctx.saved_tensors
        dy = dy.contiguous()
        dq, dk, dx, dlog_decay, dstate = backward(q, k, x, log_decay, state, dy, dfinal)
        dhistory, dlags = filter_gradients(x, history, lags, dy, dx, add=True)
        return dq, dk, dx, dlog_decay, dstate, dlags, dhistory
