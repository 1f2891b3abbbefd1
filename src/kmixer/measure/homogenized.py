"""A model of attention at random whose overlaps have laws: what the measurement of overlap is tested on.

Unit tokens x_i of R^d, in every layer with fresh matrices of H heads:

    x_i <- N(x_i + (eta / H) sum_h V_h m_h(x_i)),    m_h(x) = sum_k softmax_k(<A_h x, x_k>) x_k

V_ij ~ N(0, 1 / d); A = W W'^T with Gaussian entries, scaled so that a score of unit tokens has deviation s. Time is
t = eta^2 L (d - 1) / (d H). Two laws of the overlap g, of tokens that all have it at the start (a simplex):

    s = 0       m = g + (1 - g) / n obeys m' = m (1 - m)
    any s       g' = ((d - 2 + g^2) S - (d - 1) g P) / d,  S = g + (1 - g) c2,  P = g + (1 - g) c1

with c1 = E sum_k pi_ik^2 and c2 = E sum_k pi_ik pi_jk for scores that are Gaussian with covariance s^2 G_ij G_kl.
Source: Koubbi, Geshkovski, Rigollet 2026 (arXiv 2604.01978), which prints g' = S - g P, the limit of wide tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Draws of scores for c1 and c2, and steps of the integration for a unit of time.
DRAWS, STEPS = 4096, 50


def simplex(runs: int, n: int, d: int, overlap: float, generator: torch.Generator) -> Tensor:
    """Unit tokens (runs, n, d), all pairs with this overlap, in random directions."""
    gram = torch.full((n, n), overlap, dtype=torch.float64) + (1 - overlap) * torch.eye(n, dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn(runs, d, n, generator=generator, dtype=torch.float64))[0]
    return torch.linalg.cholesky(gram) @ directions.mT


def simulate(
    x: Tensor, time: float, *, eta: float = 0.2, heads: int = 2, deviation: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Times (L + 1,) and m of every run (L + 1, runs), from tokens x (runs, n, d)."""
    generator = torch.Generator().manual_seed(seed)
    runs, n, d = x.shape
    layers = round(time * heads * d / (eta**2 * (d - 1)))

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(runs, heads, d, d, generator=generator, dtype=x.dtype)

    sizes = [_with_diagonal(x)]
    for _ in range(layers):
        weights = torch.full((runs, heads, n, n), 1 / n, dtype=x.dtype)
        if deviation:
            a = normal(1.0) @ normal(deviation / math.sqrt(d)).mT
            weights = torch.softmax(x[:, None] @ a.mT @ x[:, None].mT, dim=-1)
        moved = (weights @ x[:, None] @ normal(1 / math.sqrt(d)).mT).mean(1)
        x = torch.nn.functional.normalize(x + eta * moved, dim=-1)
        sizes.append(_with_diagonal(x))
    times = torch.arange(layers + 1, dtype=torch.float64) * eta**2 * (d - 1) / (d * heads)
    return times, torch.stack(sizes)


def _with_diagonal(x: Tensor) -> Tensor:
    return x.mean(1).square().sum(-1)


def logistic(times: Tensor, start: float) -> Tensor:
    """m at these times without scores."""
    return start / (start + (1 - start) * torch.exp(-times))


def overlap_in_theory(times: Tensor, start: float, n: int, d: int, deviation: float, seed: int = 0) -> Tensor:
    """g at these times (k,), rising from 0, with scores of this deviation."""
    draws = torch.randn(2, DRAWS, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def drift(g: float) -> float:
        c1, c2 = _concentrations(g, deviation, draws)
        s, p = g + (1 - g) * c2, g + (1 - g) * c1
        return ((d - 2 + g * g) * s - (d - 1) * g * p) / d

    values, g, now = [], start, 0.0
    for time in times.tolist():
        steps = max(1, math.ceil((time - now) * STEPS))
        step = (time - now) / steps
        for _ in range(steps if time > now else 0):
            half = g + 0.5 * step * drift(g)
            g, now = g + step * drift(half), now + step
        values.append(g)
        now = time
    return torch.tensor(values, dtype=torch.float64)


def _concentrations(g: float, deviation: float, draws: Tensor) -> tuple[float, float]:
    """c1 and c2 by the mean over draws: scores of two queries i, j with the covariance s^2 G_ij G_kl.

    Rows correlate by g as the columns do: a score is made of a part that is alike for all keys, which softmax does not
    see, and one of its own; of two queries with overlap g, both are alike by g.
    """
    own = math.sqrt(max(0.0, 1 - g))
    first = own * draws[0]
    second = own * (g * draws[0] + math.sqrt(max(0.0, 1 - g * g)) * draws[1])
    pi, other = (torch.softmax(deviation * scores, dim=-1) for scores in (first, second))
    return float(pi.square().sum(-1).mean()), float((pi * other).sum(-1).mean())
