"""Heads put apart and rotated: the one pass against its parts, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.layers.heads import heads_apart, split_heads
from kmixer.layers.rotary import Rotation, rotate, rotation


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    parts = draw(st.integers(1, 3))
    rotated = draw(st.integers(0, min(2, parts)))
    e = draw(st.sampled_from([2, 4, 6, 32])) if rotated else draw(st.integers(1, 9))
    return {
        "parts": parts,
        "rotated": rotated,
        "e": e,
        "heads": draw(st.integers(1, 3)),
        "b": draw(st.integers(1, 3)),
        "t": draw(st.integers(1, 9)),
        "start": draw(st.sampled_from([0, 1, 500])),
        "step": draw(st.sampled_from([1, 4])),
    }


def by_parts(projected: Tensor, heads: int, parts: int, rotated: int, angles: Rotation) -> list[Tensor]:
    """The definition: slices of channels, then of heads, then rotated."""
    apart = [split_heads(part, heads) for part in projected.chunk(parts, dim=-1)]
    return [rotate(part, angles) if index < rotated else part for index, part in enumerate(apart)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(case=cases())
def test_it_is_its_parts_with_every_gradient(dtype: torch.dtype, case: dict[str, Any]) -> None:
    b, t, heads, e, parts, rotated, step = (case[key] for key in ("b", "t", "heads", "e", "parts", "rotated", "step"))
    generator = torch.Generator().manual_seed(t)
    positions = torch.arange(case["start"], case["start"] + case["step"] * t)
    projected = torch.randn(b, t, parts * heads * e, generator=generator, dtype=dtype).requires_grad_()
    weights = [torch.randn(b, heads, t, e, generator=generator, dtype=dtype) for _ in range(parts)]
    exact = projected.detach().double().requires_grad_()
    found = heads_apart(projected, heads, parts, rotated=rotated, angles=rotation(positions, e, dtype).every(step, 0))
    expected = by_parts(exact, heads, parts, rotated, rotation(positions[::step], e, torch.float64))
    assert len(found) == parts
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4  # an angle of 500 radians in float32 is 3e-5 off
    for part, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(part.double(), wanted, atol=tolerance, rtol=tolerance)
    (gradient,) = torch.autograd.grad(sum((z * w).sum() for z, w in zip(found, weights, strict=True)), projected)
    wanted_sum = sum((z * w.double()).sum() for z, w in zip(expected, weights, strict=True))
    (wanted,) = torch.autograd.grad(wanted_sum, exact)
    torch.testing.assert_close(gradient.double(), wanted, atol=tolerance, rtol=tolerance)


def test_a_part_that_no_loss_needs_has_a_gradient_of_zero() -> None:
    projected = torch.randn(2, 5, 24, requires_grad=True)
    queries, _, _ = heads_apart(projected, 2, 3, rotated=2, angles=rotation(torch.arange(5), 4, torch.float32))
    queries.sum().backward()
    assert projected.grad is not None
    assert projected.grad[..., :8].abs().sum() > 0
    assert (projected.grad[..., 8:] == 0).all()


def test_rows_that_lie_apart_are_read_as_they_are() -> None:
    wide = torch.randn(2, 5, 2, 16)
    projected, angles = wide[:, :, 1], rotation(torch.arange(5), 4, torch.float32)
    found = heads_apart(projected, 2, 2, rotated=2, angles=angles)
    expected = heads_apart(projected.clone(), 2, 2, rotated=2, angles=angles)
    for part, wanted in zip(found, expected, strict=True):
        assert part.is_contiguous() or native.kernels() is None
        torch.testing.assert_close(part, wanted, atol=0, rtol=0)
