"""Gaussian kernel attention by backend, and as it is usually written down.

`one product` is that: squared distances from x x^T, all (t, t) weights in memory, masked and renormalised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kmixer.bench.operators import Operator, Way
from kmixer.ops import gaussian_attention
from kmixer.ops.attention.gaussian import Backend


def _inputs(b: int, h: int, t: int, e: int) -> list[Tensor]:
    x = torch.randn(b, h, t, e).requires_grad_()
    return [x, torch.full((h,), math.log(e**0.5)).requires_grad_()]


def one_product(inputs: list[Tensor], causal: bool, window: int | None) -> Tensor:
    """The definition by one matrix product."""
    x, log_sigma = inputs
    squares = x.square().sum(-1)
    distances = squares[..., :, None] + squares[..., None, :] - 2 * x @ x.mT
    kernel = torch.exp(-0.5 * distances * torch.exp(-2 * log_sigma)[:, None, None])
    if causal:
        mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
        kernel = kernel * (mask if window is None else mask.triu(1 - window))
    return kernel / kernel.sum(-1, keepdim=True) @ x


def _by(backend: Backend) -> Way:
    return lambda inputs, causal, window: gaussian_attention(*inputs, causal=causal, window=window, backend=backend)


OPERATOR = Operator(
    _inputs,
    {
        "naive": _by("naive"),
        "one product": one_product,
        "sdpa": _by("sdpa"),
        "auto": _by("auto"),
    },
)
