"""Second moments against their definition on a grid, and against samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kmixer.measure.moments import (
    Activation,
    NormMap,
    activation_moments,
    correlations,
    functions_of,
    grid_moments,
    norm_moments,
    relu_kernel,
    relu_slope_kernel,
)

CORRELATIONS = (-0.3, 0.0, 0.5, 0.9, 0.99)


def pair(q_i: float, q_j: float, rho: float) -> Tensor:
    p = rho * math.sqrt(q_i * q_j)
    return torch.tensor([[q_i, p], [p, q_j]], dtype=torch.float64)


def on_grid(norm: NormMap, covariance: Tensor) -> tuple[float, float]:
    f, slope = functions_of(norm)
    (q_i, p), (_, q_j) = covariance.tolist()
    value, derivative = grid_moments(f, slope, norm.alpha, q_i, q_j, p)
    return float(value), float(derivative)


@pytest.mark.parametrize("alpha", [0.3, 0.9, 2.0])
@pytest.mark.parametrize("q", [0.01, 1.0, 40.0])
def test_the_closed_forms_of_erf_are_the_grid(alpha: float, q: float) -> None:
    for rho in CORRELATIONS:
        covariance = pair(q, 0.7 * q, rho)
        moments = norm_moments(NormMap("erf", alpha), covariance)
        expected = on_grid(NormMap("erf", alpha), covariance)
        assert [float(part[0, 1]) for part in moments] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "norm",
    [NormMap("tanh", 0.5), NormMap("tanh", 0.9), NormMap("tanh", 0.9, 0.4), NormMap("erf", 0.5, -0.3, 1.7)],
    ids=str,
)
def test_the_series_is_the_grid_where_norms_begin(norm: NormMap) -> None:
    """alpha^2 q up to 5: to 3e-6; a pair of equal tokens always."""
    for q in (4e-4, 1.0, 5 / norm.alpha**2):
        for rho in (*CORRELATIONS, 1.0):
            covariance = pair(q, 0.8 * q, rho)
            moments = norm_moments(norm, covariance)
            expected = on_grid(norm, covariance)
            assert [float(part[0, 1]) for part in moments] == pytest.approx(expected, abs=3e-6)
            same = on_grid(norm, pair(q, q, 1.0))
            assert [float(part[0, 0]) for part in moments] == pytest.approx(same, abs=1e-12)


def test_the_series_stays_near_where_norms_saturate() -> None:
    covariance = pair(40.0, 40.0, 0.99)
    norm = NormMap("tanh", 0.9)
    moments = norm_moments(norm, covariance)
    assert [float(part[0, 1]) for part in moments] == pytest.approx(on_grid(norm, covariance), abs=1e-3)


def test_the_grid_is_fine_enough_for_tanh() -> None:
    """Where 61 Gauss-Hermite nodes are wrong by 0.06, half the step changes nothing."""
    f, slope = functions_of(NormMap("tanh", 0.9))
    coarse = grid_moments(f, slope, 0.9, 50.0, 50.0, 10.0)
    fine = grid_moments(f, slope, 1.8, 50.0, 50.0, 10.0)
    assert torch.stack([*coarse]) == pytest.approx(torch.stack([*fine]), abs=1e-14)


def test_a_norm_that_divides_by_the_size_keeps_correlations() -> None:
    covariance = pair(2.0, 0.5, 0.3)
    value, slope = norm_moments(NormMap("standard", gain=2.0), covariance)
    assert torch.allclose(value, 4 * correlations(covariance))
    assert float(slope[0, 1]) == pytest.approx(4.0)


def test_a_small_alpha_makes_a_norm_linear() -> None:
    covariance, alpha = pair(1.0, 2.0, 0.4), 1e-4
    for kind, slope in (("tanh", 1.0), ("erf", 2 / math.sqrt(math.pi))):
        moments = norm_moments(NormMap(kind, alpha), covariance)  # type: ignore[arg-type]
        assert torch.allclose(moments.value, (slope * alpha) ** 2 * covariance, rtol=1e-6)
        assert torch.allclose(moments.slope, torch.full_like(covariance, (slope * alpha) ** 2), rtol=1e-6)


def samples(rho: float) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, rho * x + math.sqrt(1 - rho**2) * y


def assert_mean(draws: Tensor, expected: Tensor) -> None:
    """Within four standard errors."""
    error = float(draws.std()) / math.sqrt(len(draws))
    assert float(draws.mean()) == pytest.approx(float(expected), abs=4 * error)


def test_the_kernels_of_relu_are_those_of_samples() -> None:
    rho = torch.tensor(0.6, dtype=torch.float64)
    u, v = samples(0.6)
    assert_mean(u.relu() * v.relu(), relu_kernel(rho))
    assert_mean(((u > 0) & (v > 0)).double(), relu_slope_kernel(rho))


FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "squared_relu": lambda x: x.relu().square(),
}


def slope_of(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations_are_those_of_samples(activation: Activation) -> None:
    f = FUNCTIONS[activation]
    u, v = (scale * x for scale, x in zip((0.8, 1.5), samples(0.7), strict=True))
    moments = activation_moments(activation, pair(0.64, 2.25, 0.7))
    assert_mean(f(u) * f(v), moments.value[0, 1])
    assert_mean(slope_of(f, u) * slope_of(f, v), moments.slope[0, 1])
    assert_mean(f(u).square(), moments.value[0, 0])


def test_the_series_of_gelu_is_the_grid() -> None:
    gelu = FUNCTIONS["gelu"]
    for rho in CORRELATIONS:
        expected = grid_moments(gelu, lambda x: slope_of(gelu, x), 1.0, 1.0, 0.6, rho * math.sqrt(0.6))
        moments = activation_moments("gelu", pair(1.0, 0.6, rho))
        assert [float(part[0, 1]) for part in moments] == pytest.approx([float(part) for part in expected], abs=1e-6)
