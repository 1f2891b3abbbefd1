"""How gradients grow with depth in theory: wide random layers at initialisation, tokens mixed by a fixed matrix A.

With S (n, n) the covariance of tokens, G (n, n) that of gradients, * elementwise, T and H the moments of a norm and f
the activation (`kmixer.measure.moments`), a block does

    S1 = S + s_ov A T(S) A^T
    S' = S1 + s_2 E f(x_i) f(x_j),    x ~ N(0, s_1 T(S1))
    G <- G * (1 + s_1 s_2 E[f'(x_i) f'(x_j)] * H(S1))      backward, from G = I at the top
    G <- G + s_ov H(S) * (A^T G A)
    J(L, l) = trace(G) / n

where s is fan_in times the variance of the entries of a matrix, s_ov the product of two. With A = 1 / n and equal
tokens this is the recurrence of Alekseev 2026 (arXiv 2604.11890); for any A it is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kmixer.measure.moments import Activation, NormMap, activation_moments, norm_moments

# From so many blocks on, with noise of 3 %, the right law has the smaller residual in 97 of 100 draws or more.
LEAST_BLOCKS = 24
# A verdict needs a residual so many times that of the other law,
LEAST_RATIO = 1.5
# and a law that leaves no more than this part of the variance.
MOST_LEFT = 0.05
# and something to explain: J(L, 0) of e^(1/2) or more. Below, all laws are lines.
LEAST_GROWTH = 0.5
# Alpha is advised from this grid.
ALPHA_STEP, LARGEST_ALPHA = 0.05, 2.0

Law = Literal["power", "stretched", "neither", "shallow", "flat"]


class TheoryBlock(NamedTuple):
    """A block as the theory sees it."""

    mixing_norm: NormMap
    mixing: Tensor  # A (n, n): what a position takes of each
    mixing_strength: float  # s_ov
    feed_forward_norm: NormMap
    activation: Activation
    strength_in: float  # s_1
    strength_out: float  # s_2


class Theory(NamedTuple):
    """What the recurrence gives for b inputs."""

    growth: Tensor  # (b, L + 1), J(L, l) for l = 0 to L
    covariances: Tensor  # (b, L + 1, n, n), S of the tokens after l blocks


def predict(blocks: Sequence[TheoryBlock], covariance: Tensor) -> Theory:
    """J(L, l) of these blocks, for tokens that enter with covariance h h^T / d, (b, n, n)."""
    s = covariance.double()
    covariances, slopes = [s], []
    for block in blocks:
        a = block.mixing.double()
        mixed = norm_moments(block.mixing_norm, s)
        s = s + block.mixing_strength * a @ mixed.value @ a.T
        normed = norm_moments(block.feed_forward_norm, s)
        active = activation_moments(block.activation, block.strength_in * normed.value)
        s = s + block.strength_out * active.value
        covariances.append(s)
        by_feed_forward = block.strength_in * block.strength_out * active.slope * normed.slope
        slopes.append((block.mixing_strength * mixed.slope, by_feed_forward))
    g = torch.eye(s.shape[-1], dtype=s.dtype).expand_as(s)
    growth = [_trace(g)]
    for block, (by_mixing, by_feed_forward) in zip(reversed(blocks), reversed(slopes), strict=True):
        a = block.mixing.double()
        g = g * (1 + by_feed_forward)
        g = g + by_mixing * (a.T @ g @ a)
        growth.append(_trace(g))
    return Theory(torch.stack(growth[::-1], dim=-1), torch.stack(covariances, dim=1))


def _trace(g: Tensor) -> Tensor:
    return torch.diagonal(g, dim1=-2, dim2=-1).mean(-1)


def fit_laws(log_growth: Sequence[float]) -> dict[str, Any]:
    """Which law log J(L, l), l = 0 to L, follows: a power of l + 1, or an exponential of sqrt(l + 1).

    Returns:
        "law": "power" or "stretched" where one is honest to name; "shallow" below LEAST_BLOCKS blocks; "flat" where J
        hardly grows; "neither" where the two fit alike, or none well. "exponent" and "rate", minus the slopes against
        log(l + 1) and sqrt(l + 1); "residuals" of both, root mean square in nats.
    """
    y = torch.tensor(log_growth, dtype=torch.float64)
    depth = torch.arange(1, len(y) + 1, dtype=torch.float64)
    (exponent, power), (rate, stretched) = (_line(x, y) for x in (depth.log(), depth.sqrt()))
    smaller, larger = sorted((power, stretched))
    law: Law = "neither"
    if len(y) - 1 < LEAST_BLOCKS:
        law = "shallow"
    elif abs(log_growth[0]) < LEAST_GROWTH:
        law = "flat"
    elif larger >= LEAST_RATIO * smaller and smaller**2 <= MOST_LEFT * float(y.var(correction=0)):
        law = "power" if power < stretched else "stretched"
    return {
        "law": law,
        "exponent": exponent,
        "rate": rate,
        "residuals": {"power": power, "stretched": stretched},
    }


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Minus the slope of the line of least squares, and the root mean square of what it leaves."""
    if len(x) < 2:
        return 0.0, 0.0
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    return -float(slope), float((y - slope * x).square().mean().sqrt())


def agreement(log_measured: Sequence[float], log_theory: Sequence[float]) -> float:
    """exp(mean |log(measured / theory)|) over the layers, the last left out where both are 1: 1 is perfect."""
    differences = [abs(a - b) for a, b in zip(log_measured, log_theory, strict=True)][:-1]
    return math.exp(sum(differences) / len(differences)) if differences else 1.0


def advised_alpha(growth_of: Callable[[float], float], bound: float) -> float | None:
    """The largest alpha of the grid whose J(L, 0) is at most the bound; None where the smallest is above it.

    J(L, 0) grows with alpha in all the range of the grid, so that halving finds it.
    """
    low, high = 0, round(LARGEST_ALPHA / ALPHA_STEP)
    while low < high:
        middle = (low + high + 1) // 2
        if growth_of(ALPHA_STEP * middle) <= bound:
            low = middle
        else:
            high = middle - 1
    return round(ALPHA_STEP * low, 2) if low else None
