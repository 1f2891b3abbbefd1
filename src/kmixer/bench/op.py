"""Decayed linear attention: every backend on one shape, equality first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kmixer.bench.measure import time_calls
from kmixer.errors import InputError
from kmixer.ops import decayed_linear_attention
from kmixer.ops.decay.recurrence import BACKENDS

# Largest relative difference from the recurrence in float64 that a float32 backend may show.
TOLERANCE = 1e-4
# mask holds several (b, t, r, d) tensors: past this many elements it is left out.
MAX_MASK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class OperatorSpeed:
    """One backend on one shape."""

    backend: str
    relative_error: float  # largest difference from the definition, relative to the largest output
    first_call_seconds: float
    forward_seconds: float
    training_seconds: float  # forward and backward
    forward_tokens_per_second: float
    part_of_fused_bound: float
    r: int
    d: int
    t: int
    b: int
    times_faster_than_mask: float | None = None  # of training; None where `mask` was left out

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def bench_op(r: int, d: int, t: int, b: int, backends: list[str], repeats: int, flops: float) -> list[OperatorSpeed]:
    """The speed of each backend, checked against the definition before it is timed.

    The bound is a recurrence that only computes: 3 vector operations for each of r d state elements,
    at two floating-point operations a lane each, against the measured matmul rate `flops`.
    """
    torch.manual_seed(0)
    tensors = [torch.randn(b, t, r) / r**0.5, torch.randn(b, t, r) / r**0.5, torch.randn(b, t, d)]
    inputs = [x.requires_grad_() for x in [*tensors, torch.linspace(0.5, 0.99, r).log()]]
    with torch.no_grad():
        exact, _ = decayed_linear_attention(*(x.double() for x in inputs), backend="block")
    speeds = [_speed(inputs, exact, backend, repeats, flops) for backend in backends]
    mask = next((speed for speed in speeds if speed.backend == "mask"), None)
    if mask is None:
        return speeds
    return [replace(speed, times_faster_than_mask=mask.training_seconds / speed.training_seconds) for speed in speeds]


def usable_backends(r: int, d: int, t: int, b: int) -> list[str]:
    """The backends that can run this shape on this machine in reasonable memory."""
    probe = [torch.ones(1, 2, 1), torch.ones(1, 2, 1), torch.ones(1, 2, 1), torch.zeros(1)]
    usable = []
    for backend in BACKENDS:
        if backend == "auto" or (backend == "mask" and b * t * r * d > MAX_MASK_ELEMENTS):
            continue
        try:
            decayed_linear_attention(*probe, backend=backend)  # type: ignore[arg-type]
        except InputError:
            continue
        usable.append(backend)
    return usable


def _speed(inputs: list[Tensor], exact: Tensor, backend: Any, repeats: int, flops: float) -> OperatorSpeed:
    r, (b, t, d) = inputs[0].shape[-1], inputs[2].shape

    def forward() -> None:
        with torch.no_grad():
            decayed_linear_attention(*inputs, backend=backend)

    def training() -> None:
        y, _ = decayed_linear_attention(*inputs, backend=backend)
        y.backward(torch.ones_like(y))

    with torch.no_grad():
        y, _ = decayed_linear_attention(*inputs, backend=backend)
        error = float((y.double() - exact).abs().max() / exact.abs().max())
    if error > TOLERANCE:
        raise RuntimeError(f"backend {backend} differs from the definition by {error:.1e}: not timed")
    first, both = time_calls(forward, repeats), time_calls(training, repeats)
    rate = b * t / first.median
    return OperatorSpeed(
        backend=backend,
        relative_error=error,
        first_call_seconds=first.first,
        forward_seconds=first.median,
        training_seconds=both.median,
        forward_tokens_per_second=rate,
        part_of_fused_bound=rate / (flops / (6 * r * d)),
        r=r,
        d=d,
        t=t,
        b=b,
    )
