"""Hierarchical attention by backend, with as many levels as its layer has by default."""

from __future__ import annotations

import torch
from torch import Tensor

from kmixer.bench.operators import Operator, Way
from kmixer.ops import hierarchical_attention
from kmixer.ops.attention.hierarchical import BACKENDS, Backend

LEVELS = 3


def _inputs(b: int, h: int, t: int, e: int) -> list[Tensor]:
    """Queries of every level, keys of every level, values, weights of the levels."""
    rows_of = [-(-t >> level) for level in range(LEVELS)]
    queries, keys = ([torch.randn(b, h, rows, e).requires_grad_() for rows in rows_of] for _ in range(2))
    values = torch.randn(b, h, t, e).requires_grad_()
    return [*queries, *keys, values, torch.full((h, LEVELS), 1 / LEVELS).requires_grad_()]


def _by(backend: Backend) -> Way:
    def way(inputs: list[Tensor], causal: bool, window: int | None) -> Tensor:
        *rows, values, weights = inputs
        queries, keys, t = rows[:LEVELS], rows[LEVELS:], values.shape[2]
        return hierarchical_attention(queries, keys, values, weights, t=t, causal=causal, backend=backend)

    return way


_OTHERS = [name for name in BACKENDS if name not in ("naive", "auto")]
OPERATOR = Operator(_inputs, {"naive": _by("naive")} | {name: _by(name) for name in _OTHERS})  # type: ignore[arg-type]
