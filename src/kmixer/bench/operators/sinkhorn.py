"""Sinkhorn attention by backend, with as many half-steps as its layer has by default."""

from __future__ import annotations

import torch
from torch import Tensor

from kmixer.bench.operators import Operator, Way
from kmixer.ops import sinkhorn_attention
from kmixer.ops.attention.sinkhorn import BACKENDS, Backend


def _inputs(b: int, h: int, t: int, e: int) -> list[Tensor]:
    return [torch.randn(b, h, t, e).requires_grad_() for _ in range(3)]


def _by(backend: Backend) -> Way:
    """Both ways alone, which is all that it is timed for."""
    return lambda inputs, causal, window: sinkhorn_attention(*inputs, backend=backend)


_OTHERS = [name for name in BACKENDS if name not in ("naive", "auto")]
OPERATOR = Operator(_inputs, {"naive": _by("naive")} | {name: _by(name) for name in _OTHERS})  # type: ignore[arg-type]
