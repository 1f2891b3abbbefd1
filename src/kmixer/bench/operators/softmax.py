"""Softmax attention: torch's fused kernel, and ours, the fastest at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from kmixer.bench.operators import Operator
from kmixer.ops.attention.softmax import sdpa_attention, softmax_attention


def _inputs(b: int, h: int, t: int, e: int) -> list[Tensor]:
    return [torch.randn(b, h, t, e).requires_grad_() for _ in range(3)]


OPERATOR = Operator(
    _inputs,
    {
        "softmax, torch": lambda inputs, causal, window: sdpa_attention(*inputs, causal=causal, reach=window),
        "softmax": lambda inputs, causal, window: softmax_attention(*inputs, causal=causal, reach=window),
    },
)
