"""Causal base kernel: a learned lower-triangular map over time, the same for every channel.

    y_i = sum_{j <= i} K[i, j] x_j

* `dense`     K is a free (W, W) matrix, tied to absolute positions inside a window of W.
* `low_rank`  K = U V^T with U, V (W, R); tied to absolute positions likewise.
* `toeplitz`  K[i, j] = w[i - j] with W learned lags. Streams for ever.
* `conv`      the same with a short filter. Streams for ever.

Source: Koneko 2026 (Zenodo 19004569 and 19136398), base kernel; the author's later code for `conv`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.checks import check_tensors
from kmixer.ops.decay.recurrence import decayed_linear_attention
from kmixer.ops.gradients import first_order

Kind = Literal["dense", "low_rank", "toeplitz", "conv"]
KINDS: tuple[str, ...] = get_args(Kind)

# Up to this many lags the compiled filter reads every input from the first cache level.
MAX_NATIVE_LAGS = 64
# The compiled dense kernel works on vectors of this many channels.
NATIVE_LANES = 16
# Otherwise filters are applied to blocks of this many positions, or of the filter's length if that is more:
# one (block, block + lags) matrix product, instead of one pass over memory per lag.
MIN_BLOCK = 32


class LowRankState(NamedTuple):
    """State of a `low_rank` kernel: sums (b, R, d) of V_j x_j over the positions seen so far."""

    sums: Tensor
    position: int


# dense: the inputs seen so far (b, p, d). toeplitz, conv: the last inputs (b, lags - 1, d).
State = Tensor | LowRankState


def initial_state(kind: Kind, weights: tuple[Tensor, ...], batch_size: int, width: int) -> State:
    """The state before the first position, for inputs (batch_size, t, width)."""
    weight = weights[0]
    if kind == "low_rank":
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return LowRankState(weight.new_zeros(batch_size, weight.shape[1], width, dtype=dtype), 0)
    length = 0 if kind == "dense" else weight.shape[0] - 1
    return weight.new_zeros(batch_size, length, width)


def base_kernel(
    x: Float[Tensor, "b t d"],
    weights: tuple[Tensor, ...],
    *,
    kind: Kind,
    state: State | None = None,
) -> tuple[Float[Tensor, "b t d"], State]:
    """Apply a causal kernel over time: y_i = sum_{j <= i} K[i, j] x_j.

    Args:
        x: inputs (b, t, d).
        weights: (K,) with K (W, W) for `dense`, of which only the lower triangle is used;
            (U, V), each (W, R), for `low_rank`; (w,) with w (lags,) for `toeplitz` and `conv`.
        kind: one of the four kernels.
        state: what `initial_state` or an earlier call returned; the start of a sequence when None.

    Returns:
        y (b, t, d) and the state after the last position.

    Raises:
        InputError: an unknown kind, tensors on several devices or of a dtype that is not a real float, `dense` and
            `low_rank` past position W, a dense kernel that is not square, or a state of another filter.

    Source: Koneko 2026 (Zenodo 19004569 and 19136398), base kernel; the author's later code for `conv`.
    """
    if kind not in KINDS:
        raise InputError(f"base kernel: got {kind!r}; allowed: {', '.join(KINDS)}")
    kept = state.sums if isinstance(state, LowRankState) else state
    check_tensors("base_kernel", x=x, **{f"weight {i}": weight for i, weight in enumerate(weights)}, state=kept)
    if state is None:
        state = initial_state(kind, weights, x.shape[0], x.shape[-1])
    if x.shape[1] == 0:
        return x, state
    if kind == "low_rank":
        assert isinstance(state, LowRankState)
        return _low_rank(x, weights[0], weights[1], state)
    assert isinstance(state, Tensor)
    if kind == "dense":
        return _dense(x, weights[0], state)
    return _filter(x, weights[0], state)


def _check_window(kind: str, position: int, t: int, window: int) -> None:
    if position + t > window:
        raise InputError(
            f"the {kind} base kernel ends at position {window} and {position + t} were asked for; "
            "give at most that many, or use a model with a toeplitz or conv base kernel, which stream"
        )


def _dense(x: Tensor, kernel: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    position, t = seen.shape[1], x.shape[1]
    if kernel.shape[0] != kernel.shape[1]:
        raise InputError(f"the dense base kernel: got {tuple(kernel.shape)}; it is square")
    _check_window("dense", position, t, kernel.shape[0])
    if not torch.is_grad_enabled():
        x = x.clone()  # it is the state: a caller may fill the same memory again, which autograd would not allow
    if (
        position == 0
        and _float32(x, kernel)
        and x.shape[2] % NATIVE_LANES == 0
        and not torch.is_autocast_enabled("cpu")
    ):
        return _NativeDense.apply(x.contiguous(), kernel.contiguous()), x
    stop = position + t
    inputs = torch.cat([seen.to(x.dtype), x], dim=1) if position else x
    weights = kernel[position:stop, :stop].tril(position)
    # One product a row: a matrix times a batch would be a product of transposed copies.
    return torch.bmm(weights.expand(len(x), -1, -1), inputs), inputs


def _low_rank(x: Tensor, left: Tensor, right: Tensor, state: LowRankState) -> tuple[Tensor, LowRankState]:
    b, t, _ = x.shape
    window, rank = left.shape
    _check_window("low_rank", state.position, t, window)
    part = slice(state.position, state.position + t)
    # sum_{j <= i} (U_i . V_j) x_j is linear attention whose queries and keys are the rows of U and V
    # and which forgets nothing.
    y, sums = decayed_linear_attention(
        left[part].expand(b, t, rank),
        right[part].expand(b, t, rank),
        x,
        left.new_zeros(rank),
        state=state.sums,
    )
    return y, LowRankState(sums, state.position + t)


def _filter(x: Tensor, lags: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    b, t, d = x.shape
    past = lags.shape[0] - 1
    if history.shape[1] != past:
        raise InputError(f"state: got {history.shape[1]} inputs; a filter of {past + 1} lags keeps {past}")
    history = history.to(x.dtype)
    if _float32(x, lags) and len(lags) <= MAX_NATIVE_LAGS and history.shape == (b, past, d):
        y = _NativeFilter.apply(x.contiguous(), history.contiguous(), lags.contiguous())
        kept = torch.cat([history, x[:, max(0, t - past) :]], dim=1)
        return y, kept[:, kept.shape[1] - past :].clone()
    inputs = torch.cat([history, x], dim=1)
    block = max(MIN_BLOCK, past)
    if torch.compiler.is_compiling() and len(lags) <= MAX_NATIVE_LAGS:
        # As shifted sums, which a compiler fuses into one pass and which no length is special to.
        y = torch.stack([lags[i] * inputs[:, past - i : past - i + t] for i in range(len(lags))]).sum(0)
    elif t <= block:
        y = _toeplitz(lags, t) @ inputs
    else:
        padding = -t % block
        blocks = F.pad(x, (0, 0, 0, padding)).view(b, -1, block, d)
        before = torch.cat([history[:, None], blocks[:, :-1, block - past :]], dim=1)
        matrix = _toeplitz(lags, block)
        y = matrix[:, :past] @ before + matrix[:, past:] @ blocks
        y = y.view(b, t + padding, d)[:, :t].contiguous()
    # A copy: a view would keep all inputs in memory for as long as the state lives.
    return y, inputs[:, inputs.shape[1] - past :].clone()


def _float32(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype == torch.float32 and native.usable(x, weight)


class _NativeDense(torch.autograd.Function):
    """The dense kernel from position 0 on, compiled: it skips the triangle above the diagonal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        y = torch.empty_like(x)
        native.call("dense_forward", x, kernel, y, *x.shape, kernel.shape[1])
        ctx.save_for_backward(x, kernel)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, kernel = ctx.saved_tensors
        dx, dkernel = torch.empty_like(x), torch.zeros_like(kernel)
        native.call("dense_backward", x, kernel, dy.contiguous(), dx, dkernel, *x.shape, kernel.shape[1])
        return dx, dkernel


class _NativeFilter(torch.autograd.Function):
    """The filter, compiled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, history: Tensor, lags: Tensor) -> Tensor:
        y = torch.empty_like(x)
        native.call("filter_forward", x, history, lags, y, *x.shape, len(lags))
        ctx.save_for_backward(x, history, lags)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, history, lags = ctx.saved_tensors
        dx, dhistory = torch.empty_like(x), torch.empty_like(history)
        dlags = lags.new_empty(len(x), len(lags), dtype=torch.float64)
        native.call("filter_backward", x, history, lags, dy.contiguous(), dx, dhistory, dlags, *x.shape, len(lags))
        return dx, dhistory, dlags.sum(0).to(lags.dtype)


def _toeplitz(lags: Tensor, rows: int) -> Tensor:
    """The (rows, lags - 1 + rows) matrix that maps history and inputs to outputs."""
    past = lags.shape[0] - 1
    row = torch.arange(rows, device=lags.device)[:, None]
    column = torch.arange(past + rows, device=lags.device)[None, :]
    lag = row + past - column
    inside = (lag >= 0) & (lag <= past)
    return torch.where(inside, lags[lag.clamp(0, past)], lags.new_zeros(()))
