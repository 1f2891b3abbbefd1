"""Reading a state from hidden vectors: what holds it linearly, what holds it otherwise, what does not hold it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kmixer.measure.decoding import decode, explained


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_linear_map_is_read_linearly_and_a_curve_by_neighbours_only() -> None:
    state = 2 * uniform(40, 50) - 1
    hidden = torch.stack([state, 3 - 2 * state], dim=-1)
    read = decode(hidden, {"itself": state, "square": state**2})
    assert read["itself"]["linear"] == pytest.approx(1)
    assert read["itself"]["nearest"] > 0.99
    assert read["square"]["linear"] < 0.1
    assert read["square"]["nearest"] > 0.99


def test_what_is_not_there_is_not_read() -> None:
    read = decode(uniform(60, 40, 3), {"other": uniform(60, 40, seed=1)})["other"]
    assert read["linear"] < 0.01
    assert read["nearest"] < 0.01


def test_constant_vectors_and_no_states() -> None:
    read = decode(torch.ones(8, 30, 4), {"x": uniform(8, 30)})["x"]
    assert abs(read["linear"]) < 0.1
    assert decode(uniform(4, 5, 2), {}) == {}


def test_the_halves_are_different_sequences() -> None:
    """A number of its own in every sequence helps no other."""
    state = uniform(30, 1, seed=2).expand(30, 20)
    hidden = torch.eye(30, dtype=torch.float64)[:, None].expand(30, 20, 30)
    assert decode(hidden, {"x": state})["x"]["linear"] < 0.2


def test_r2_is_its_definition() -> None:
    truth = torch.tensor([[0.0], [1.0], [2.0]])
    assert explained(truth, truth) == [1.0]
    assert explained(truth, torch.ones(3, 1)) == [0.0]
    assert explained(truth, truth.flip(0)) == [-3.0]
