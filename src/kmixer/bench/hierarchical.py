"""Hierarchical attention beside softmax attention of equal width: the operator by backend, and the whole layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kmixer.bench.measure import time_in_turn
from kmixer.errors import InputError
from kmixer.layers import HierarchicalAttention, SoftmaxAttention
from kmixer.ops import hierarchical_attention
from kmixer.ops.attention.hierarchical import BACKENDS
from kmixer.ops.attention.softmax import sdpa_attention, softmax_attention

# Largest difference from `naive` in float64 that a backend may show before it is timed.
TOLERANCE = 1e-4
LEVELS, HEADS, BATCH = 3, 4, 2


def bench_backends(width: int, t: int, causal: bool, repeats: int) -> list[dict[str, Any]]:
    """A row a backend: seconds of forward and backward, relative to torch's fused softmax attention."""
    torch.manual_seed(0)
    rows_of = [-(-t >> level) for level in range(LEVELS)]
    queries, keys = ([torch.randn(BATCH, HEADS, n, width // HEADS).requires_grad_() for n in rows_of] for _ in range(2))
    values = torch.randn(BATCH, HEADS, t, width // HEADS).requires_grad_()
    weights = torch.full((HEADS, LEVELS), 1 / LEVELS).requires_grad_()

    def attend(backend: Any, *, exact: bool = False) -> Tensor:
        inputs: list[Any] = [queries, keys, values, weights]
        if exact:
            inputs = [[z.double() for z in each] if isinstance(each, list) else each.double() for each in inputs]
        return hierarchical_attention(*inputs, t=t, causal=causal, backend=backend)

    def attention(compute: Any) -> Callable[[], object]:
        return lambda: compute(queries[0], keys[0], values, causal=causal).sum().backward()

    def hierarchical(backend: str) -> Callable[[], object]:
        return lambda: attend(backend).sum().backward()

    calls = {"softmax, torch": attention(sdpa_attention), "softmax": attention(softmax_attention)}
    with torch.no_grad():
        exact = attend("naive", exact=True)
    errors = {}
    for backend in BACKENDS:
        if backend == "auto":
            continue
        try:
            with torch.no_grad():
                errors[backend] = float((attend(backend).double() - exact).abs().max())
        except InputError:  # this backend cannot run here
            continue
        if errors[backend] > TOLERANCE:
            raise RuntimeError(f"{backend} differs from naive by {errors[backend]:.1e}: not timed")
        calls[backend] = hierarchical(backend)
    shape = {"t": t, "causal": causal, "width": width, "b": BATCH}
    return [
        {"what": what, **shape} | ({"error": errors[what]} if what in errors else {}) | timed
        for what, timed in time_in_turn(calls, repeats).items()
    ]


def bench_layers(width: int, t: int, causal: bool, repeats: int) -> list[dict[str, Any]]:
    """Both layers, forward and backward, relative to softmax attention."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, t, width, requires_grad=True)

    def training(layer: nn.Module) -> Callable[[], object]:
        return lambda: layer(x)[0].sum().backward()

    calls = {
        "softmax layer": training(SoftmaxAttention(width, HEADS, causal=causal)),
        "hierarchical layer": training(HierarchicalAttention(width, HEADS, levels=LEVELS, causal=causal)),
    }
    shape = {"t": t, "causal": causal, "width": width, "b": BATCH}
    return [{"what": what, **shape, **timed} for what, timed in time_in_turn(calls, repeats).items()]
