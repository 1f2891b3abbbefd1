"""Decayed linear attention on a GPU: the `triton` backend of `decayed_linear_attention`.

The sequence is cut into segments, so that a small batch still fills the card:

1. each segment's own update of the state (`segment_updates`), all segments at once;
2. the states between segments, by a scan with the decays to the power of the segment (`scan_segments`);
3. the outputs of all segments at once, each walking through its chunks from its own first state (`outputs`).

The backward does 1 and 2 in reverse for the gradients of the same states, then walks forward for dq and
backward for dk and dv. A sequence of one segment takes step 3 alone. Sums over programs (tiles of d for dq
and dk, all programs for dlog_decay) go through buffers and torch.sum: two runs agree bit for bit.

Importing this module imports triton; `kmixer.ops.decay.recurrence` does so when the backend is used.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from kmixer.errors import InputError
from kmixer.ops.decay import kernels
from kmixer.ops.decay.operator import TRITON_MAX_RANK

# tl.dot takes no side under 16, and at 16 the scaled queries and keys of a decay of 0.01 reach exp(34.5) only.
CHUNK = 16
# Smaller decays are taken as this one. It makes exp(69) of the queries and keys, which leaves 19 nats of float32
# to the inputs, and moves a weight of the sum that an output is by 1e-4 at most.
MIN_LOG_DECAY = math.log(1e-4)
# Three TF32 products keep float32; one errs by 2^-11, less than the rounding of 16-bit outputs.
PRECISION = {torch.float32: "tf32x3", torch.bfloat16: "tf32", torch.float16: "tf32"}
INTERPRETED = not isinstance(kernels.outputs, triton.JITFunction)


class Configuration(NamedTuple):
    """How the kernels run at one rank: positions a segment, columns of d a program, warps, pipeline stages."""

    segment: int
    columns: int
    warps: int
    stages: int


# By rank, padded. A segment is long enough that its float32 state (r d) weighs less than its values (t d).
# A program of the backward holds two (rank, columns) float32 tiles. Compiled for sm_90, no row spills registers for
# 16-bit inputs; float32 spills up to 0.5 KB a thread at rank 128. Not yet tuned by timing on a GPU.
_CONFIGURATIONS = {
    16: Configuration(128, 64, 4, 2),
    32: Configuration(256, 64, 4, 2),
    64: Configuration(512, 64, 8, 2),
    128: Configuration(512, 32, 8, 2),
}


def configuration(r: int, d: int) -> Configuration:
    """The row of the table for rank r, with no more columns than d needs."""
    chosen = _CONFIGURATIONS[_padded(r)]
    return chosen._replace(columns=min(chosen.columns, _padded(d)))


def triton_decay(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y (b, t, d) in the dtype of v and the final state (b, r, d) in float32, for t of 1 and more.

    Raises:
        InputError: tensors elsewhere than on a GPU (outside Triton's interpreter), float64, or a rank over 128.
    """
    if v.device.type != "cuda" and not INTERPRETED:
        raise InputError(
            f"backend 'triton' needs tensors on a CUDA device; got {v.device.type} "
            "(on a CPU it runs for tests only, with TRITON_INTERPRET=1 set before triton is imported)"
        )
    dtypes = [x.dtype for x in (q, k, v)]
    if not set(dtypes) <= set(PRECISION):
        raise InputError(f"backend 'triton' takes float32, bfloat16 and float16; got q, k, v in {dtypes}")
    if not 1 <= q.shape[-1] <= TRITON_MAX_RANK:
        raise InputError(f"backend 'triton' takes a rank r from 1 to {TRITON_MAX_RANK}; got {q.shape[-1]}")
    log_decay = log_decay.float().clamp(min=MIN_LOG_DECAY)
    y, final, _ = _forward(q.contiguous(), k.contiguous(), v.contiguous(), log_decay, state.float().contiguous())
    return y, final


@custom_op(
    "kmixer::decay_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor state) -> (Tensor, Tensor, Tensor)",
)
def _forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states between segments, which the backward needs."""
    y, final, interior = _empty_outputs(q, k, v, log_decay, state)
    launch = _Launch(q, v)
    with torch.cuda.device_of(v):
        launch.boundaries(k, v, log_decay, state, interior, reverse=False)
        launch(kernels.outputs, q, k, v, log_decay, state, interior, y, final)
    return y, final, interior


@_forward.register_fake
def _empty_outputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, t, d = v.shape
    r = q.shape[-1]
    # A graph may leave b and t open; int() fixes the rank and width, which choose the kernels.
    boundaries = -(-t // configuration(int(r), int(d)).segment) - 1
    return torch.empty_like(v), torch.empty_like(state), state.new_empty(b, boundaries, r, d)


@custom_op(
    "kmixer::decay_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor state, Tensor interior, Tensor dy, Tensor dfinal)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, interior: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch = _Launch(q, v)
    dinterior, dv, dstate = torch.empty_like(interior), torch.empty_like(v), torch.empty_like(state)
    by_query, by_key = (state.new_empty(launch.programs, q.shape[-1]) for _ in range(2))
    dq, dk = launch.tiled_like(q), launch.tiled_like(k)
    with torch.cuda.device_of(v):
        launch.boundaries(q, dy, log_decay, dfinal, dinterior, reverse=True)
        launch(kernels.query_gradients, q, k, v, log_decay, state, interior, dy, dfinal, dinterior, dq, by_query)
        launch(kernels.key_value_gradients, q, k, v, log_decay, dy, dfinal, dinterior, dk, dv, by_key, dstate)
    return _summed(dq, q), _summed(dk, k), dv, by_query.sum(0) + by_key.sum(0), dstate


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, interior: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (q, k, v, log_decay, state))


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[2])
    # The third output has no gradient; do not make zeros of its size.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v, log_decay, state, interior = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy.contiguous()
    dfinal = torch.zeros_like(state) if dfinal is None else dfinal.contiguous()
    return _backward(q, k, v, log_decay, state, interior, dy, dfinal)


_forward.register_autograd(_gradients, setup_context=_keep_inputs)


class _Launch:
    """Starts kernels over every tile of every segment of every row of the batch."""

    def __init__(self, q: Tensor, v: Tensor) -> None:
        (self.b, self.t, self.d), self.r = v.shape, q.shape[-1]
        self.chosen = configuration(self.r, self.d)
        self.segments = triton.cdiv(self.t, self.chosen.segment)
        self.tiles = triton.cdiv(self.d, self.chosen.columns)
        self.programs = self.b * self.segments * self.tiles
        self.precision = PRECISION[v.dtype]

    def __call__(self, kernel: Any, *tensors: Tensor, programs: int | None = None, **options: bool) -> None:
        kernel[(self.programs if programs is None else programs,)](
            *tensors,
            self.t,
            self.segments,
            r=self.r,
            d=self.d,
            LENGTH=self.chosen.segment,
            CHUNK=CHUNK,
            RANK=_padded(self.r),
            D=self.chosen.columns,
            PRECISION=self.precision,
            num_warps=self.chosen.warps,
            num_stages=self.chosen.stages,
            **options,
        )

    def boundaries(
        self, keys: Tensor, values: Tensor, log_decay: Tensor, edge: Tensor, interior: Tensor, *, reverse: bool
    ) -> None:
        """Fill `interior` (b, segments - 1, r, d) with the states between segments, or with their gradients."""
        slots = self.segments - 1
        if slots == 0:
            return
        programs = self.b * slots * self.tiles
        self(kernels.segment_updates, keys, values, log_decay, edge, interior, programs=programs, REVERSE=reverse)
        columns = min(128, _padded(self.d))
        kernels.scan_segments[(self.b * self.r * triton.cdiv(self.d, columns),)](
            interior,
            log_decay,
            slots,
            r=self.r,
            d=self.d,
            LENGTH=self.chosen.segment,
            GROUP=CHUNK,
            D=columns,
            REVERSE=reverse,
            num_warps=4,
        )

    def tiled_like(self, x: Tensor) -> Tensor:
        """Room for each tile's part of a gradient (b, t, tiles, r); one tile writes the gradient itself."""
        dtype = x.dtype if self.tiles == 1 else torch.float32
        return x.new_empty(self.b, self.t, self.tiles, self.r, dtype=dtype)


def _summed(parts: Tensor, like: Tensor) -> Tensor:
    return parts.view_as(like) if parts.shape[2] == 1 else parts.sum(2).to(like.dtype)


def _padded(n: int) -> int:
    """The side of a matrix for tl.dot that holds n: a power of two from 16 on."""
    return max(16, triton.next_power_of_2(n))
