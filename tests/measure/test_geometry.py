"""Distances between representations: what they are by definition, what leaves them unchanged, what chance gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer.measure.geometry import (
    chance_distance,
    distance_error,
    linear_cka,
    measure_moves,
    on_shared_directions,
    participation,
    procrustes_distance,
)

SIZES = st.tuples(st.integers(4, 40), st.integers(1, 8), st.integers(0, 100))


def vectors(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(vectors(d, d, seed))[0]


@given(SIZES, st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_rotation_scale_and_shift_are_no_distance(sizes: tuple[int, int, int], scale: float, shift: float) -> None:
    n, d, seed = sizes
    x = vectors(n, d, seed)
    assert procrustes_distance(x, scale * x @ rotation(d, seed + 1) + shift) < 1e-7


@given(SIZES)
def test_it_is_symmetric_within_0_and_1_and_the_residual_of_the_best_rotation(sizes: tuple[int, int, int]) -> None:
    n, d, seed = sizes
    x, y = vectors(n, d, seed), vectors(n, d, seed + 1000)
    distance = procrustes_distance(x, y)
    assert 0 <= distance <= 1
    assert procrustes_distance(y, x) == pytest.approx(distance, abs=1e-7)
    a, b = (z - z.mean(0) for z in (x, y))
    a, b = a / a.norm(), b / b.norm()
    u, s, vh = torch.linalg.svd(a.mT @ b)
    residual = float((a @ u @ vh - b).norm()) / math.sqrt(2)
    assert distance**2 == pytest.approx(residual**2, abs=1e-12)
    assert distance**2 == pytest.approx(1 - float(s.sum()), abs=1e-12)
    if distance > 0.01:  # below, the root makes more of the rounding of what is in it
        assert distance == pytest.approx(residual, abs=1e-12)
    other = rotation(d, seed + 2)  # no rotation is better
    assert float((a @ other - b).norm()) / math.sqrt(2) >= distance - 1e-9


def test_what_is_constant_has_no_shape() -> None:
    x, zero = vectors(20, 3), torch.zeros(20, 3)
    assert procrustes_distance(zero, x) == procrustes_distance(x, zero + 7) == procrustes_distance(zero, zero) == 1
    assert linear_cka(x, zero + 7) == 0
    assert participation(zero + 7) == 0
    moves = measure_moves(zero, [x])
    assert (moves["distance"], moves["shared"], moves["cka"], moves["rank"]) == ([1.0], [1.0], [0.0], 0.0)


@pytest.mark.parametrize(("n", "d"), [(200, 32), (2000, 32), (2000, 256), (20_000, 32)])
def test_chance_is_as_derived(n: int, d: int) -> None:
    draws = [procrustes_distance(vectors(n, d, seed), vectors(n, d, seed + 100)) for seed in range(5)]
    assert sum(draws) / len(draws) == pytest.approx(chance_distance(n, d), abs=0.01)


def test_few_inputs_make_unrelated_vectors_look_alike() -> None:
    assert procrustes_distance(vectors(8, 256), vectors(8, 256, 1)) < 0.15


@pytest.mark.parametrize(("n", "d"), [(50, 32), (200, 32), (2000, 32), (400, 256)])
def test_cka_of_unrelated_vectors_is_around_0_and_of_turned_ones_1(n: int, d: int) -> None:
    draws = [linear_cka(vectors(n, d, seed), vectors(n, d, seed + 500)) for seed in range(20)]
    assert abs(sum(draws) / len(draws)) < 0.02
    x = vectors(n, d)
    assert linear_cka(x, 3 * x @ rotation(d) - 5) == pytest.approx(1, abs=1e-9)


@given(SIZES)
def test_cka_is_the_unbiased_hsic_of_its_definition(sizes: tuple[int, int, int]) -> None:
    n, d, seed = sizes
    x, y = vectors(n, d, seed), vectors(n, d + 1, seed + 1000)

    def hsic(a: Tensor, b: Tensor) -> float:
        k, m = (z @ z.mT * (1 - torch.eye(n)) for z in (a, b))
        whole = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
        return float(whole) / (n * (n - 3))

    size = hsic(x, x) * hsic(y, y)
    expected = hsic(x, y) / math.sqrt(size) if size > 0 else 0.0
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(st.integers(1, 12), st.integers(0, 4))
def test_the_rank_of_equal_directions_is_their_number(k: int, more: int) -> None:
    axes = torch.linalg.qr(torch.cat([torch.ones(40, 1), vectors(40, k)], dim=1))[0][:, 1:]  # centred
    x = torch.cat([axes, torch.zeros(40, more)], dim=1) @ rotation(k + more)
    assert participation(5 * x + 2) == pytest.approx(k)


def test_shared_directions_have_variance_1_and_are_those_of_the_clean_ones() -> None:
    x = vectors(500, 6) * torch.tensor([9.0, 4.0, 1.0, 0.5, 0.1, 0.0])
    y = x + 0.1 * vectors(500, 6, 1)
    own, moved = on_shared_directions(x, y, 3)
    torch.testing.assert_close(own.mT @ own / 500, torch.eye(3, dtype=torch.float64))
    assert moved.shape == (500, 3)
    assert on_shared_directions(x, y, 6)[0].shape == (500, 5)  # one direction has no variance
    # Noise that is alike in all directions hides behind the large ones, and not where all are alike.
    assert procrustes_distance(own, moved) > 1.5 * procrustes_distance(x, y)


def test_no_perturbation_is_no_distance() -> None:
    x = vectors(100, 5)
    moves = measure_moves(x, [x, x + 0.3 * vectors(100, 5, 1)])
    assert moves["distance"][0] < 1e-7
    assert moves["shared"][0] < 1e-7
    assert moves["cka"][0] == pytest.approx(1)
    assert 0 < moves["distance"][1] < moves["null"][1] - moves["null_band"][1]
    assert all(len(values) == 2 for name, values in moves.items() if name != "rank")
    assert distance_error(x, x) < 1e-7


def test_unrelated_vectors_lie_within_their_null() -> None:
    outside = 0
    for seed in range(20):
        moves = measure_moves(vectors(300, 6, seed), [vectors(300, 6, seed + 100)], seed=seed)
        outside += moves["distance"][0] < moves["null"][0] - moves["null_band"][0]
        outside += abs(moves["cka"][0]) > moves["cka_band"][0]
    assert outside <= 10  # of 40; bands of 8 shuffles are rough


def test_the_error_is_about_what_other_inputs_give() -> None:
    def moved(seed: int) -> tuple[Tensor, Tensor]:
        x = vectors(400, 4, seed)
        return x, x + 0.4 * vectors(400, 4, seed + 1000)

    distances = torch.tensor([procrustes_distance(*moved(seed)) for seed in range(40)])
    errors = torch.tensor([distance_error(*moved(seed)) for seed in range(40)])
    assert 0.6 < float(errors.mean() / distances.std()) < 1.6
