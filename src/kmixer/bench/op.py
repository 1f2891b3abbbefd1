"""Decayed linear attention: every backend on one shape, equality first."""

from __future__ import annotations

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


def bench_op(r: int, d: int, t: int, b: int, backends: list[str], repeats: int, flops: float) -> list[dict[str, Any]]:
    """One row a backend: seconds, tokens a second, times faster than `mask`, part of the fused bound.

    The bound is a recurrence that only computes: 3 vector operations for each of r d state elements,
    at two floating-point operations a lane each, against the measured matmul rate `flops`.
    """
    torch.manual_seed(0)
    tensors = [torch.randn(b, t, r) / r**0.5, torch.randn(b, t, r) / r**0.5, torch.randn(b, t, d)]
    inputs = [x.requires_grad_() for x in [*tensors, torch.linspace(0.5, 0.99, r).log()]]
    with torch.no_grad():
        exact, _ = decayed_linear_attention(*(x.double() for x in inputs), backend="block")
    rows = [_row(inputs, exact, backend, repeats, flops) for backend in backends]
    slowest = next((row for row in rows if row["backend"] == "mask"), None)
    for row in rows:
        row |= {"r": r, "d": d, "t": t, "b": b}
        if slowest:
            row["times_faster_than_mask"] = slowest["training_seconds"] / row["training_seconds"]
    return rows


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


def _row(inputs: list[Tensor], exact: Tensor, backend: Any, repeats: int, flops: float) -> dict[str, Any]:
    r, d = inputs[0].shape[-1], inputs[2].shape[-1]
    tokens = inputs[2].shape[0] * inputs[2].shape[1]

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
    bound = flops / (6 * r * d)
    return {
        "backend": backend,
        "relative_error": error,
        "first_call_seconds": first.first,
        "forward_seconds": first.median,
        "training_seconds": both.median,
        "forward_tokens_per_second": tokens / first.median,
        "part_of_fused_bound": tokens / first.median / bound,
    }
