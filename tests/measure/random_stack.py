"""Random residual stacks whose mixing is a fixed matrix, with the strengths of a ViT-L: what theory is held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kmixer.measure.moments import NormMap
from kmixer.measure.signal import symmetric_inputs

# Value and output matrices together, and those of the feed-forward part.
S_OV, S_21 = 0.168, 0.671


def symmetric(n: int, q: float = 1.0, p: float = 0.2) -> Tensor:
    """Covariance of n equal tokens."""
    return torch.full((n, n), p, dtype=torch.float64) + (q - p) * torch.eye(n, dtype=torch.float64)


def uniform(n: int) -> Tensor:
    return torch.full((n, n), 1 / n, dtype=torch.float64)


def causal(n: int) -> Tensor:
    """The mean of what has been seen."""
    ones = torch.ones(n, n, dtype=torch.float64).tril()
    return ones / ones.sum(1, keepdim=True)


def _lags(n: int) -> Tensor:
    return torch.arange(n)[:, None] - torch.arange(n)


def convolution(n: int, taps: int = 8, rate: float = 0.15) -> Tensor:
    """A filter whose taps add to 1."""
    lag = _lags(n)
    weights = torch.exp(-rate * torch.arange(taps, dtype=torch.float64))
    weights = weights / weights.sum()
    return torch.where((lag >= 0) & (lag < taps), weights[lag.clamp(0, taps - 1)], 0.0)


def decaying(n: int, decay: float = 0.9) -> Tensor:
    """Sums that forget, not divided by anything."""
    lag = _lags(n)
    return torch.where(lag >= 0, decay ** lag.clamp(min=0).double(), 0.0)


def random_growth(norm: NormMap, mixing: Tensor, width: int, count: int, seed: int, probes: int = 2) -> float:
    """J(L, 0) of one random stack with relu, by random signs; LayerNorm where the norm divides by the size."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(strength: float) -> Tensor:
        return torch.randn(width, width, generator=generator) * math.sqrt(strength / width)

    def normed(x: Tensor) -> Tensor:
        if norm.kind == "standard":
            return torch.nn.functional.layer_norm(x, (width,))
        return torch.erf(norm.alpha * x)

    a = mixing.float()
    x = start = symmetric_inputs(1.0, 0.2, seed)(torch.zeros(1, len(a), width)).requires_grad_()
    for _ in range(count):
        v, o, up, down = (matrix(math.sqrt(strength)) for strength in (S_OV, S_OV, S_21, S_21))
        x = x + a @ normed(x) @ v @ o
        x = x + (normed(x) @ up).relu() @ down
    total = 0.0
    for _ in range(probes):
        signs = (2 * torch.randint(2, x.shape, generator=generator) - 1).float()
        (gradient,) = torch.autograd.grad(x, start, signs, retain_graph=True)
        total += float(gradient.double().square().mean())
    return total / probes
