"""Hierarchical attention beside softmax attention of equal width: the operator by backend, and the whole layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kmixer.bench.measure import time_calls
from kmixer.errors import InputError
from kmixer.layers import HierarchicalAttention, SoftmaxAttention
from kmixer.ops import hierarchical_attention
from kmixer.ops.attention import sdpa_attention, softmax_attention
from kmixer.ops.hierarchical import BACKENDS

# Largest difference from `naive` in float64 that a backend may show before it is timed.
TOLERANCE = 1e-4
LEVELS, HEADS, HEAD_WIDTH, BATCH = 3, 4, 64, 2


def bench_backends(t: int, causal: bool, repeats: int) -> list[dict[str, Any]]:
    """A row a backend: seconds of forward and backward, relative to torch's fused softmax attention."""
    torch.manual_seed(0)
    rows_of = [-(-t >> level) for level in range(LEVELS)]
    queries, keys = ([torch.randn(BATCH, HEADS, n, HEAD_WIDTH).requires_grad_() for n in rows_of] for _ in range(2))
    values = torch.randn(BATCH, HEADS, t, HEAD_WIDTH).requires_grad_()
    weights = torch.full((HEADS, LEVELS), 1 / LEVELS).requires_grad_()

    def attend(backend: Any, *, exact: bool = False) -> Tensor:
        inputs: list[Any] = [queries, keys, values, weights]
        if exact:
            inputs = [[z.double() for z in each] if isinstance(each, list) else each.double() for each in inputs]
        return hierarchical_attention(*inputs, t=t, causal=causal, backend=backend)

    shape = {"t": t, "causal": causal, "width": HEADS * HEAD_WIDTH, "b": BATCH}
    found: list[dict[str, Any]] = []
    for what, attention in {"softmax, torch": sdpa_attention, "softmax": softmax_attention}.items():
        timing = time_calls(
            lambda attention=attention: attention(queries[0], keys[0], values, causal=causal).sum().backward(),  # type: ignore[misc]
            repeats,
        )
        found.append({"what": what, **shape, "seconds": timing.median})
    with torch.no_grad():
        exact = attend("naive", exact=True)
    for backend in BACKENDS:
        if backend == "auto":
            continue
        try:
            with torch.no_grad():
                error = float((attend(backend).double() - exact).abs().max())
        except InputError:  # this backend cannot run here
            continue
        if error > TOLERANCE:
            raise RuntimeError(f"{backend} differs from naive by {error:.1e}: not timed")
        timing = time_calls(lambda backend=backend: attend(backend).sum().backward(), repeats)  # type: ignore[misc]
        found.append({"what": backend, **shape, "error": error, "seconds": timing.median})
    for row in found:
        row["relative"] = row["seconds"] / found[0]["seconds"]
    return found


def bench_layers(width: int, t: int, causal: bool, repeats: int) -> list[dict[str, Any]]:
    """Both layers, forward and backward, relative to softmax attention."""
    torch.manual_seed(0)
    layers = {
        "softmax layer": SoftmaxAttention(width, HEADS, causal=causal),
        "hierarchical layer": HierarchicalAttention(width, HEADS, levels=LEVELS, causal=causal),
    }
    x = torch.randn(BATCH, t, width, requires_grad=True)
    rows: list[dict[str, Any]] = []
    for name, layer in layers.items():
        timing = time_calls(lambda layer=layer: layer(x)[0].sum().backward(), repeats)  # type: ignore[misc]
        shape = {"what": name, "t": t, "causal": causal, "width": width, "b": BATCH}
        rows.append({**shape, "seconds": timing.median})
        rows[-1]["relative"] = timing.median / rows[0]["seconds"]
    return rows
