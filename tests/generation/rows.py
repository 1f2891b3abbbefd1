"""Rows of probabilities for tests: with zeros and tiny numbers, one-hot, equal, or from logits that filters cut."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

# Weights with many zeros; 1e-12 and 1e-300 stand for what rounding and underflow leave.
WEIGHTS = st.one_of(st.just(0.0), st.floats(0.01, 1.0), st.sampled_from([1e-300, 1e-12, 1e-3, 1.0]))


@st.composite
def row(draw: st.DrawFn, v: int) -> Tensor:
    weights = draw(st.lists(WEIGHTS, min_size=v, max_size=v))
    if max(weights) < 1e-6:
        weights[draw(st.integers(0, v - 1))] = 1.0
    x = torch.tensor(weights, dtype=torch.float64)
    return x / x.sum()


@st.composite
def pairs(draw: st.DrawFn, largest: int = 6) -> tuple[Tensor, Tensor]:
    """p and q (v,), equal now and then."""
    v = draw(st.integers(2, largest))
    q = draw(row(v))
    return draw(st.one_of(row(v), st.just(q))), q


def random_rows(count: int, v: int, seed: int, sharpness: float = 2.0) -> Tensor:
    """(count, v) without zeros."""
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(sharpness * torch.randn(count, v, generator=generator, dtype=torch.float64), -1)
