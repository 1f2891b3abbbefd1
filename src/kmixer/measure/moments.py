"""Second moments of what a norm or an activation makes of Gaussian coordinates: what mean-field theory is made of.

For u, v of mean 0 with variances q_i, q_j and covariance p, T = E f(u) f(v) and H = E f'(u) f'(v). The closed forms:

    RMSNorm, LayerNorm   T = p / sqrt(q_i q_j)                        H = 1 / sqrt(q_i q_j)
    erf(a x)             T = (2 / pi) asin(2 a^2 p / sqrt(B_i B_j))   H = (4 a^2 / pi) / sqrt(B_i B_j - 4 a^4 p^2)
                         B = 1 + 2 a^2 q
    relu, relu^2         the arc-cosine kernels of Cho and Saul 2009

Everything else is a series in the correlation, sum_k c_k(i) c_k(j) rho^k, c_k the coefficients in normalised Hermite
polynomials. They are taken on a uniform grid, which is exact to rounding for smooth functions; Gauss-Hermite nodes are
wrong in the third digit where a sqrt(q) is 2. `grid_moments` is the definition that they are held to.

Sources: Alekseev 2026 (arXiv 2604.11890); unequal variances and tanh are ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Activation = Literal["relu", "gelu", "squared_relu"]

# Standard deviations that a grid reaches on either side: a normal density is 1e-18 there. The polynomials grow, so that
# theirs reaches further.
REACH, SERIES_REACH = 9.0, 12.0
# Of a grid, in standard deviations, and of what the function changes over.
STEP, STEP_OF_SCALE = 0.1, 0.2
# Terms of a series. Of tanh(a x) they fall like exp(-(pi / (a sqrt(q))) sqrt(2 k)), and by rho^k on top of that.
NORM_TERMS, ACTIVATION_TERMS = 96, 24


class Moments(NamedTuple):
    """E f(u_i) f(u_j) and E f'(u_i) f'(u_j), each (..., n, n)."""

    value: Tensor
    slope: Tensor


class NormMap(NamedTuple):
    """What a norm does to one coordinate: gain * f(alpha x + shift), or gain * x / sqrt(q)."""

    kind: Literal["standard", "erf", "tanh"]
    alpha: float = 1.0
    shift: float = 0.0
    gain: float = 1.0


def norm_moments(norm: NormMap, covariance: Tensor) -> Moments:
    """Of a norm over coordinates with this covariance (..., n, n) between tokens."""
    if norm.kind == "standard":
        scale = _scales(covariance)
        value, slope = covariance / scale, 1 / scale
    elif norm.kind == "erf" and norm.shift == 0:
        value, slope = _erf_moments(norm.alpha, covariance)
    else:
        f, derivative = functions_of(norm)
        value, slope = _series(f, derivative, norm.alpha, covariance, NORM_TERMS)
        return Moments(value, slope)  # the functions have the gain in them
    return Moments(norm.gain**2 * value, norm.gain**2 * slope)


def activation_moments(activation: Activation, covariance: Tensor) -> Moments:
    """Of an activation of coordinates with this covariance (..., n, n) between tokens."""
    if activation == "gelu":
        return _series(_gelu, _gelu_slope, 1.0, covariance, ACTIVATION_TERMS)
    scale, rho = _scales(covariance), correlations(covariance)
    if activation == "relu":
        return Moments(scale * relu_kernel(rho), relu_slope_kernel(rho))
    angle = torch.arccos(rho)
    second = 3 * torch.sin(angle) * rho + (math.pi - angle) * (1 + 2 * rho.square())
    return Moments(scale.square() * second / (2 * math.pi), 4 * scale * relu_kernel(rho))


def relu_kernel(rho: Tensor) -> Tensor:
    """E relu(u) relu(v) of unit variances and correlation rho."""
    return ((1 - rho.square()).clamp(min=0).sqrt() + rho * (math.pi - torch.arccos(rho))) / (2 * math.pi)


def relu_slope_kernel(rho: Tensor) -> Tensor:
    """P(u > 0, v > 0) at correlation rho."""
    return 0.25 + torch.arcsin(rho) / (2 * math.pi)


def correlations(covariance: Tensor) -> Tensor:
    """Covariances (..., n, n) over the roots of both variances, in [-1, 1]."""
    return (covariance / _scales(covariance)).clamp(-1, 1)


def functions_of(norm: NormMap) -> tuple[Function, Function]:
    """A norm of one coordinate, and its slope. Not for those that divide by the size of the whole vector."""
    alpha, shift, gain = norm.alpha, norm.shift, norm.gain
    if norm.kind == "tanh":
        return (
            lambda x: gain * torch.tanh(alpha * x + shift),
            lambda x: gain * alpha * (1 - torch.tanh(alpha * x + shift).square()),
        )
    assert norm.kind == "erf"
    return (
        lambda x: gain * torch.erf(alpha * x + shift),
        lambda x: gain * alpha * 2 / math.sqrt(math.pi) * torch.exp(-(alpha * x + shift).square()),
    )


def grid_moments(f: Function, derivative: Function, alpha: float, q_i: float, q_j: float, p: float) -> Moments:
    """T and H, each (), by a uniform grid in two dimensions: the definition, for any smooth function.

    Args:
        f, derivative: the function and its slope, which change over x of about 1 / alpha.
        q_i, q_j, p: variances and covariance.
    """
    half = 0.5 * math.acos(max(-1.0, min(1.0, p / math.sqrt(q_i * q_j))))
    x, weight = _grid(_step(alpha, math.sqrt(max(q_i, q_j))), REACH)
    together, apart = math.cos(half) * x[:, None], math.sin(half) * x
    u, v = math.sqrt(q_i) * (together + apart), math.sqrt(q_j) * (together - apart)
    weights = weight[:, None] * weight
    return Moments(*((weights * g(u) * g(v)).sum() for g in (f, derivative)))


def _erf_moments(alpha: float, covariance: Tensor) -> Moments:
    spread = 1 + 2 * alpha**2 * torch.diagonal(covariance, dim1=-2, dim2=-1)
    product = spread.unsqueeze(-1) * spread.unsqueeze(-2)
    value = 2 / math.pi * torch.arcsin(2 * alpha**2 * covariance / product.sqrt())
    slope = 4 * alpha**2 / math.pi / (product - 4 * alpha**4 * covariance.square()).sqrt()
    return Moments(value, slope)


def _series(f: Function, derivative: Function, alpha: float, covariance: Tensor, terms: int) -> Moments:
    """Both moments of a function that changes over x of about 1 / alpha, by so many terms."""
    deviation = torch.diagonal(covariance, dim1=-2, dim2=-1).sqrt()
    # Steps in powers of two, so that few tables serve all layers.
    finest = _step(alpha, float(deviation.max()))
    x, weight, polynomials = _hermite(STEP / 2 ** math.ceil(math.log2(STEP / finest)), terms)
    rho = correlations(covariance)
    at = deviation.unsqueeze(-1) * x
    return Moments(*(_sum(g(at), weight, polynomials, rho) for g in (f, derivative)))


def _sum(values: Tensor, weight: Tensor, polynomials: Tensor, rho: Tensor) -> Tensor:
    """The series of what takes these values (..., n, m) on the grid, at correlations rho (..., n, n).

    What the terms leave of E f(u)^2 stands for the terms that are not there, so that rho = 1 is exact.
    """
    coefficients = (values * weight) @ polynomials  # (..., n, terms)
    rest = ((values.square() * weight).sum(-1) - coefficients.square().sum(-1)).clamp(min=0).sqrt()
    total = rest.unsqueeze(-1) * rest.unsqueeze(-2)
    for k in reversed(range(coefficients.shape[-1])):
        c = coefficients[..., k]
        total = torch.addcmul(c.unsqueeze(-1) * c.unsqueeze(-2), total, rho)
    return total


def _step(alpha: float, deviation: float) -> float:
    return min(STEP, STEP_OF_SCALE / max(alpha * deviation, 1e-12))


def _grid(step: float, reach: float) -> tuple[Tensor, Tensor]:
    """Places, and the weight of each under a standard normal distribution: (m,) both."""
    count = math.ceil(reach / step)
    x = step * torch.arange(-count, count + 1, dtype=torch.float64)
    return x, step * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


@functools.lru_cache(maxsize=16)
def _hermite(step: float, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places and weights (m,) of a grid, and he_k / sqrt(k!) there (m, terms)."""
    x, weight = _grid(step, SERIES_REACH)
    rows = [torch.ones_like(x), x]
    for k in range(1, terms - 1):
        rows.append((x * rows[k] - math.sqrt(k) * rows[k - 1]) / math.sqrt(k + 1))
    return x, weight, torch.stack(rows[:terms], dim=-1)


def _scales(covariance: Tensor) -> Tensor:
    """sqrt(q_i q_j), (..., n, n); on the diagonal exactly q, as arcsin is steep where a correlation is 1."""
    variance = torch.diagonal(covariance, dim1=-2, dim2=-1)
    return (variance.unsqueeze(-1) * variance.unsqueeze(-2)).sqrt()


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x)


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
