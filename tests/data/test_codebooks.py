"""Codebooks of numbers: the nearest centre of every value; learned ones lie better; noise is where it was asked for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer.data.codebooks import Codebook, draw_noise, learned_codebook, uniform_codebook

MAKERS = pytest.mark.parametrize("make", [uniform_codebook, learned_codebook])


def skewed(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4 * 7 - 2


def error_of(codebook: Codebook, values: Tensor) -> float:
    scaled = codebook.scaled(values)
    return float((codebook.centres[codebook.encode(scaled)] - scaled).square().mean())


@MAKERS
@given(codes=st.integers(2, 40), n=st.integers(50, 300), seed=st.integers(0, 20))
def test_a_value_has_the_code_of_its_nearest_centre(make: object, codes: int, n: int, seed: int) -> None:
    assert callable(make)
    values = skewed(n, seed)
    codebook = make(values, codes)
    scaled = codebook.scaled(values)
    assert (float(scaled.min()), float(scaled.max())) == (0.0, 1.0)
    assert len(codebook.centres) == codes
    assert (codebook.centres.diff() >= 0).all()
    distance = (scaled[:, None] - codebook.centres).abs()
    chosen = distance.gather(1, codebook.encode(scaled)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.min(1).values)
    again = make(values, codes)
    assert torch.equal(again.centres, codebook.centres)


@pytest.mark.parametrize("codes", [4, 16, 64])
def test_learned_codes_lie_better_and_are_the_means_of_theirs(codes: int) -> None:
    values = skewed(4000)
    learned = learned_codebook(values, codes)
    assert error_of(learned, values) < error_of(uniform_codebook(values, codes), values)
    scaled = learned.scaled(values)
    tokens = learned.encode(scaled)
    if codes == 4:  # Lloyd's steps have ended
        means = torch.stack([scaled[tokens == code].mean() for code in range(codes)])
        torch.testing.assert_close(means, learned.centres)


def test_more_codes_than_values() -> None:
    values = torch.tensor([0.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    assert error_of(learned_codebook(values, 9), values) == pytest.approx(0, abs=1e-20)


def test_values_outside_of_the_range_have_the_codes_at_its_ends() -> None:
    codebook = uniform_codebook(torch.tensor([0.0, 1.0]), 8)
    assert codebook.encode(torch.tensor([-3.0, 0.01, 0.99, 5.0])).tolist() == [0, 0, 7, 7]


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3, 1.0])
def test_noise_is_at_the_share_of_the_positions_that_was_asked_for(rate: float) -> None:
    scaled = torch.full((200, 64), 0.5, dtype=torch.float64)
    noise = draw_noise(tuple(scaled.shape), 0)
    changed = noise.added(scaled, rate) != scaled
    n = scaled.numel()
    assert abs(int(changed.sum()) - rate * n) <= 4 * math.sqrt(n * rate * (1 - rate))
    assert not (changed & ~(noise.added(scaled, min(1.0, 2 * rate)) != scaled)).any()  # nested
    assert float((noise.added(scaled, 1.0) - scaled).std()) == pytest.approx(0.1, rel=0.03)


def test_no_noise_changes_nothing() -> None:
    scaled = torch.rand(3, 5, dtype=torch.float64)
    assert torch.equal(draw_noise((3, 5), 1).added(scaled, 0.0), scaled)
