"""The strided filter against its formula, and its gradients."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kmixer.ops.downsampling import filter_and_halve


@given(st.integers(1, 5), st.integers(0, 12), st.integers(1, 3), st.integers(1, 4))
def test_it_is_its_formula(taps: int, more: int, b: int, d: int) -> None:
    generator = torch.Generator().manual_seed(taps + 10 * more)
    x = torch.randn(b, taps + more, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(d, taps, generator=generator, dtype=torch.float64)
    found = filter_and_halve(x, weight)
    assert found.shape == (b, more // 2 + 1, d)
    for k in range(found.shape[1]):
        expected = sum(weight[:, r] * x[:, 2 * k + taps - 1 - r] for r in range(taps))
        torch.testing.assert_close(found[:, k], expected)


def test_its_gradients_are_right() -> None:
    torch.manual_seed(0)
    for n in (3, 7, 8):
        x = torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(filter_and_halve, (x, weight))
        assert torch.autograd.gradgradcheck(filter_and_halve, (x, weight))
