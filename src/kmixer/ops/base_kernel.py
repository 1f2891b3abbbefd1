"""Causal base kernel: a learned lower-triangular map over time, the same for every channel.

    y_i = sum_{j <= i} K[i, j] x_j

* `dense`     K is a free (W, W) matrix, tied to absolute positions inside a window of W.
* `low_rank`  K = U V^T with U, V (W, R); tied to absolute positions likewise.
* `toeplitz`  K[i, j] = w[i - j] with W learned lags. Streams for ever.
* `conv`      the same with a short filter. Streams for ever.

Source: Koneko 2026 (Zenodo 19004569 and 19136398), base kernel; Koneko's later code for `conv`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.native.dispatch import ELEMENTS
from kmixer.ops.checks import check_tensors
from kmixer.ops.decay.recurrence import decayed_linear_attention
from kmixer.ops.gradients import HandWritten, first_order
from kmixer.state import known_position, longest
from kmixer.trail import cached, counted, folded, last_inputs

Kind = Literal["dense", "low_rank", "toeplitz", "conv"]
KINDS: tuple[str, ...] = get_args(Kind)

# Up to this many lags the compiled filter reads every input from the first cache level.
MAX_NATIVE_LAGS = 64
# The compiled dense kernel works on vectors of this many channels.
NATIVE_LANES = 16
# Otherwise filters are applied to blocks of this many positions, or of the filter's length if that is more:
# one (block, block + lags) matrix product, instead of one pass over memory per lag.
MIN_BLOCK = 32


class DenseState(NamedTuple):
    """State of a `dense` kernel: the inputs (b, p, d) of the positions (b,) seen so far, padded at their beginning."""

    inputs: Tensor
    position: Tensor


class LowRankState(NamedTuple):
    """State of a `low_rank` kernel: sums (b, R, d) of V_j x_j over the positions (b,) seen so far."""

    sums: Tensor
    position: Tensor


# toeplitz, conv: the last inputs (b, lags - 1, d).
State = Tensor | DenseState | LowRankState


def initial_state(kind: Kind, weights: tuple[Tensor, ...], batch_size: int, width: int) -> State:
    """The state before the first position, for inputs (batch_size, t, width)."""
    weight = weights[0]
    if kind in ("toeplitz", "conv"):
        return weight.new_zeros(batch_size, weight.shape[0] - 1, width)
    position = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
    if kind == "dense":
        return DenseState(weight.new_zeros(batch_size, 0, width), position)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return LowRankState(weight.new_zeros(batch_size, weight.shape[1], width, dtype=dtype), position)


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

    Source: Koneko 2026 (Zenodo 19004569 and 19136398), base kernel; Koneko's later code for `conv`.
    """
    if kind not in KINDS:
        raise InputError(f"base kernel: got {kind!r}; allowed: {', '.join(KINDS)}")
    kept = state if state is None or isinstance(state, Tensor) else state[0]
    check_tensors("base_kernel", x=x, **{f"weight {i}": weight for i, weight in enumerate(weights)}, state=kept)
    start = 0 if state is None else None
    if state is None:
        state = initial_state(kind, weights, x.shape[0], x.shape[-1])
    if x.shape[1] == 0:
        return x, state
    if isinstance(state, LowRankState):
        return _low_rank(x, weights[0], weights[1], state, start)
    if isinstance(state, DenseState):
        return _dense(x, weights[0], state, start)
    return _filter(x, weights[0], state)


def trail_of(x: Float[Tensor, "b t d"], weights: tuple[Tensor, ...], state: State | None, after: State) -> Any:
    """The trail (`kmixer.trail`) of a call of `base_kernel` with inputs x, from its state and the one that it gave."""
    t = x.shape[1]
    if isinstance(state, DenseState) and isinstance(after, DenseState):
        return DenseState(cached(after.inputs, state.position, t), counted(state.position, t))
    if isinstance(state, LowRankState) and isinstance(after, LowRankState):
        keys = weights[1][_positions(state.position, t)]
        return LowRankState(folded(state.sums, None, keys, x, after.sums), counted(state.position, t))
    assert isinstance(state, Tensor)
    return last_inputs(state, x)


def _check_window(kind: str, position: Tensor, start: int | None, t: int, window: int) -> None:
    """Raises InputError where a row would go on past the end. Under torch.compile torch's own check of an index does.

    `start` is the position of all rows where it is known to be one.
    """
    if start is None and torch.compiler.is_compiling():
        return
    stop = t + (max(position.tolist(), default=0) if start is None else start)
    if stop > window:
        raise InputError(
            f"the {kind} base kernel ends at position {window} and {stop} were asked for; "
            "give at most that many, or use a model with a toeplitz or conv base kernel, which stream"
        )


def _dense(x: Tensor, kernel: Tensor, state: DenseState, start: int | None) -> tuple[Tensor, DenseState]:
    t, position = x.shape[1], state.position
    if kernel.shape[0] != kernel.shape[1]:
        raise InputError(f"the dense base kernel: got {tuple(kernel.shape)}; it is square")
    start = known_position(position) if start is None else start
    _check_window("dense", position, start, t, kernel.shape[0])
    if not torch.is_grad_enabled():
        x = x.clone()  # it is the state: a caller may fill the same memory again, which autograd would not allow
    if start == 0:
        if native.usable(x, kernel, products=True) and x.shape[2] % NATIVE_LANES == 0:
            return _NativeDense.apply(x.contiguous(), kernel.contiguous()), DenseState(x, position + t)
        inputs = x
    else:
        kept = state.inputs.shape[1]
        seen = state.inputs[:, kept - (longest(position, kept) if start is None else start) :]
        inputs = torch.cat([seen.to(x.dtype), x], dim=1)
    if start is not None:
        weights = kernel[start : start + t, : start + t].tril(start).expand(len(x), -1, -1)
    else:
        weights = _rows_of_each(kernel, position, t, inputs.shape[1])
    # One product a row: a matrix times a batch would be a product of transposed copies.
    return torch.bmm(weights, inputs), DenseState(inputs, position + t)


def _rows_of_each(kernel: Tensor, position: Tensor, t: int, s: int) -> Tensor:
    """What the last t of s inputs take of all of them, where rows of the batch stand at other positions: (b, t, s)."""
    row = _positions(position, t)[:, :, None]
    column = (position[:, None] + torch.arange(t - s, t, device=position.device))[:, None, :]  # below 0: padding
    weights = kernel[row, column.clamp(min=0)]
    return torch.where((column >= 0) & (column <= row), weights, weights.new_zeros(()))


def _positions(position: Tensor, t: int) -> Tensor:
    """The next t positions of every row (b, t)."""
    return position[:, None] + torch.arange(t, device=position.device)


def _low_rank(
    x: Tensor, left: Tensor, right: Tensor, state: LowRankState, start: int | None
) -> tuple[Tensor, LowRankState]:
    b, t, _ = x.shape
    window, rank = left.shape
    _check_window("low_rank", state.position, start, t, window)
    if start is None:
        positions = _positions(state.position, t)
        queries, keys = left[positions], right[positions]
    else:
        queries, keys = left[:t].expand(b, t, rank), right[:t].expand(b, t, rank)
    # sum_{j <= i} (U_i . V_j) x_j is linear attention whose queries and keys are the rows of U and V
    # and which forgets nothing.
    y, sums = decayed_linear_attention(queries, keys, x, left.new_zeros(rank), state=state.sums)
    return y, LowRankState(sums, state.position + t)


def _filter(x: Tensor, lags: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    b, t, d = x.shape
    past = lags.shape[0] - 1
    if history.shape[1] != past:
        raise InputError(f"state: got {history.shape[1]} inputs; a filter of {past + 1} lags keeps {past}")
    history = history.to(x.dtype)
    known = native.usable(x, dtypes=ELEMENTS) and native.usable(lags)
    if known and len(lags) <= MAX_NATIVE_LAGS and history.shape == (b, past, d):
        y = _NativeFilter.apply(x.contiguous(), history.contiguous(), lags.contiguous())
        return y, inputs_to_keep(history, x)
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


def inputs_to_keep(history: Float[Tensor, "b n d"], x: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
    """The last n of both, a copy: a view would keep all inputs in memory for as long as the state lives."""
    past = history.shape[1]
    kept = torch.cat([history, x[:, max(0, x.shape[1] - past) :]], dim=1)
    return kept[:, kept.shape[1] - past :].clone()


def filter_gradients(
    x: Tensor, history: Tensor, lags: Tensor, dy: Tensor, dx: Tensor, *, add: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of history and lags, by the kernel; that of x is written to dx, or added to it."""
    dhistory, dlags = torch.empty_like(history), lags.new_empty(len(x), len(lags), dtype=torch.float64)
    native.call("filter_backward", x, history, lags, dy, dx, dhistory, dlags, *x.shape, len(lags), int(add))
    return dhistory, dlags.sum(0).to(lags.dtype)


class _NativeDense(HandWritten):
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


class _NativeFilter(HandWritten):
    """The filter, compiled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, history: Tensor, lags: Tensor) -> Tensor:
        y = torch.empty_like(x)
        native.call("filter_forward", x, history, lags, y, *x.shape, len(lags), 0)
        ctx.save_for_backward(x, history, lags)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, history, lags = ctx.saved_tensors
        dx = torch.empty_like(x)
        return dx, *filter_gradients(x, history, lags, dy.contiguous(), dx, add=False)


def _toeplitz(lags: Tensor, rows: int) -> Tensor:
    """The (rows, lags - 1 + rows) matrix that maps history and inputs to outputs."""
    past = lags.shape[0] - 1
    row = torch.arange(rows, device=lags.device)[:, None]
    column = torch.arange(past + rows, device=lags.device)[None, :]
    lag = row + past - column
    inside = (lag >= 0) & (lag <= past)
    return torch.where(inside, lags[lag.clamp(0, past)], lags.new_zeros(()))
