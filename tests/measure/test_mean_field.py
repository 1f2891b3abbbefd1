"""The recurrence against numbers, limits, and random networks; the laws that it ends in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kmixer.measure.mean_field import (
    TheoryBlock,
    advised_alpha,
    agreement,
    fit_laws,
    predict,
)
from kmixer.measure.moments import NormMap, relu_kernel, relu_slope_kernel
from tests.measure.random_stack import S_21, S_OV, causal, convolution, decaying, random_growth, symmetric, uniform

LAYER, ERF = NormMap("standard"), NormMap("erf", 0.5)


def blocks(norm: NormMap, mixing: Tensor, count: int = 12) -> list[TheoryBlock]:
    return [TheoryBlock(norm, mixing, S_OV, norm, "relu", math.sqrt(S_21), math.sqrt(S_21))] * count


def growth(norm: NormMap, mixing: Tensor, count: int = 12) -> float:
    return float(predict(blocks(norm, mixing, count), symmetric(len(mixing))[None]).growth[0, 0])


# ReLU, q_0 = 1, p_0 = 0.2, 197 tokens that see each other: J(L, 0) of 12 and 24 blocks.
NUMBERS = {
    LAYER: (4.384, 7.135),
    NormMap("erf", 0.3): (1.461, 2.080),
    ERF: (2.192, 4.048),
    NormMap("erf", 0.9): (4.290, 11.26),
    NormMap("tanh", 0.5): (1.908, 3.248),
}


@pytest.mark.parametrize("norm", NUMBERS, ids=lambda norm: f"{norm.kind}-{norm.alpha}")
def test_the_numbers_of_tokens_that_see_each_other(norm: NormMap) -> None:
    rounded = tuple(float(f"{growth(norm, uniform(197), count):.4g}") for count in (12, 24))
    assert rounded == NUMBERS[norm]


@pytest.mark.parametrize(
    ("mixing", "layer", "erf"),
    [(causal(16), 5.100, 2.397), (convolution(16), 4.900, 2.301), (decaying(16), 24.7, 15.8)],
    ids=["causal", "convolution", "decay"],
)
def test_the_numbers_of_other_mixings(mixing: Tensor, layer: float, erf: float) -> None:
    assert growth(LAYER, mixing) == pytest.approx(layer, rel=3e-3)
    assert growth(ERF, mixing) == pytest.approx(erf, rel=3e-3)


def scalar_growth(n: int, count: int) -> float:
    """The author's recurrence of two numbers, for LayerNorm and equal tokens that see each other."""
    q, p = 1.0, 0.2
    steps = []
    for _ in range(count):
        slope = 1 / q
        m = p / q + (1 - p / q) / n
        q1, p1 = q + S_OV * m, p + S_OV * m
        rho = torch.tensor(p1 / q1, dtype=torch.float64)
        steps.append((slope, 1 / q1, float(relu_slope_kernel(rho))))
        q, p = q1 + S_21 / 2, p1 + S_21 * float(relu_kernel(rho))
    j, k = 1.0, 0.0
    for slope, slope1, same in reversed(steps):
        j1, k1 = (1 + S_21 * slope1 / 2) * j, (1 + S_21 * same * slope1) * k
        j, k = (1 + S_OV * slope / n) * j1 + S_OV * slope * k1, (1 + S_OV * slope) * k1 + S_OV * slope / n * j1
    return j


def test_equal_tokens_give_the_scalar_recurrence() -> None:
    assert growth(LAYER, uniform(16)) == pytest.approx(scalar_growth(16, 12), rel=3e-3)
    assert growth(LAYER, uniform(197)) == pytest.approx(scalar_growth(197, 12), rel=3e-4)


MIXINGS: list[tuple[str, Callable[[int], Tensor]]] = [("uniform", uniform), ("causal", causal)]


@pytest.mark.parametrize(("name", "mixing"), MIXINGS, ids=[name for name, _ in MIXINGS])
@pytest.mark.parametrize("norm", [LAYER, ERF], ids=["layer", "erf"])
def test_random_networks_grow_as_in_theory(norm: NormMap, name: str, mixing: Callable[[int], Tensor]) -> None:
    """Within three standard errors and 3 %: one initialisation deviates by 10 %."""
    measured = torch.tensor([random_growth(norm, mixing(16), 128, 12, seed) for seed in range(8)]).log()
    error = float(measured.std()) / math.sqrt(len(measured))
    assert float(measured.mean()) == pytest.approx(math.log(growth(norm, mixing(16))), abs=3 * error + 0.03)


def test_one_token_multiplies_its_branches() -> None:
    alone = torch.ones(1, 1, dtype=torch.float64)
    theory = predict(blocks(LAYER, alone, 5), alone[None])
    expected = 1.0
    for q in theory.covariances[0, :-1, 0, 0].tolist():
        expected *= (1 + S_OV / q) * (1 + S_21 / 2 / (q + S_OV))
    assert float(theory.growth[0, 0]) == pytest.approx(expected, rel=1e-12)


def test_a_small_alpha_is_a_linear_map() -> None:
    alone, alpha = torch.ones(1, 1, dtype=torch.float64), 1e-3
    slope = (2 * alpha / math.sqrt(math.pi)) ** 2
    value = float(predict(blocks(NormMap("erf", alpha), alone, 5), alone[None]).growth[0, 0])
    assert value - 1 == pytest.approx(((1 + S_OV * slope) * (1 + S_21 * slope / 2)) ** 5 - 1, rel=1e-4)


def test_no_blocks_change_nothing() -> None:
    assert predict([], symmetric(4)[None]).growth.tolist() == [[1.0]]


def test_inputs_of_a_batch_are_apart() -> None:
    first, second = symmetric(6), symmetric(6, 2.0, 0.5)
    together = predict(blocks(ERF, causal(6), 3), torch.stack([first, second])).growth
    for row, covariance in zip(together, (first, second), strict=True):
        assert torch.allclose(row, predict(blocks(ERF, causal(6), 3), covariance[None]).growth[0])


def noisy(law: Callable[[float], float], count: int, seed: int) -> list[float]:
    noise = 0.03 * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    top = law(count + 1.0)
    return [top - law(layer + 1.0) + float(noise[layer]) for layer in range(count)] + [0.0]


def test_a_verdict_names_the_law_of_deep_stacks() -> None:
    power = [fit_laws(noisy(lambda depth: 0.8 * math.log(depth), 24, seed)) for seed in range(20)]
    stretched = [fit_laws(noisy(lambda depth: 0.5 * math.sqrt(depth), 24, seed)) for seed in range(20)]
    assert {fit["law"] for fit in power} == {"power"}
    assert {fit["law"] for fit in stretched} == {"stretched"}
    assert power[0]["exponent"] == pytest.approx(0.8, abs=0.05)
    assert stretched[0]["rate"] == pytest.approx(0.5, abs=0.05)


def test_no_verdict_where_none_is_honest() -> None:
    assert fit_laws(noisy(lambda depth: 0.8 * math.log(depth), 23, 0))["law"] == "shallow"
    assert fit_laws(noisy(lambda depth: 0.01 * depth, 24, 0))["law"] == "flat"
    assert fit_laws(noisy(lambda depth: 0.4 * math.log(depth) + 0.25 * math.sqrt(depth), 24, 0))["law"] == "neither"
    assert fit_laws([0.0])["law"] == "shallow"


def test_agreement_is_a_mean_factor() -> None:
    assert agreement([math.log(2), 0.0], [0.0, 0.0]) == pytest.approx(2)
    assert agreement([math.log(2), -math.log(2), 0.0], [0.0, 0.0, 0.0]) == pytest.approx(2)
    assert agreement([0.3, 0.0], [0.3, 0.0]) == 1


def test_the_advised_alpha_is_the_largest_that_grows_no_more() -> None:
    assert advised_alpha(lambda alpha: alpha, 0.52) == 0.5
    assert advised_alpha(lambda alpha: alpha, 9) == 2.0
    assert advised_alpha(lambda alpha: alpha, 0.01) is None


@pytest.mark.parametrize("kind", ["erf", "tanh"])
def test_growth_rises_with_alpha(kind: str) -> None:
    """So that halving finds the advised alpha."""
    values = [growth(NormMap(kind, alpha), causal(8), 6) for alpha in (0.05, 0.2, 0.5, 1.0, 1.5, 2.0)]  # type: ignore[arg-type]
    assert all(a < b for a, b in itertools.pairwise(values))
