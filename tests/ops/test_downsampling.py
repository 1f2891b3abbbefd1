"""The strided filter against its formula, and its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer.errors import InputError
from kmixer.ops.downsampling import filter_and_halve


def split(rows: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    return rows[:, :tail], rows[:, tail:]


@given(st.integers(1, 5), st.integers(0, 12), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
def test_it_is_its_formula(taps: int, more: int, b: int, d: int, tail: int) -> None:
    generator = torch.Generator().manual_seed(taps + 10 * more)
    x = torch.randn(b, taps + more, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(d, taps, generator=generator, dtype=torch.float64)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    found = filter_and_halve(*split(x, tail), weight)
    assert found.shape == (b, more // 2 + 1, d)
    for k in range(found.shape[1]):
        expected = sum(weight[:, r] * x[:, 2 * k + taps - 1 - r] for r in range(taps))
        torch.testing.assert_close(found[:, k], expected)
    torch.testing.assert_close(filter_and_halve(*split(x, tail), weight, mixing), found @ mixing)


def test_its_gradients_are_right() -> None:
    torch.manual_seed(0)
    for n in (3, 7, 8):
        tail = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
        x = torch.randn(2, n - 2, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
        mixing = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(filter_and_halve, (tail, x, weight, mixing))
        assert torch.autograd.gradgradcheck(filter_and_halve, (tail, x, weight))


@pytest.mark.parametrize("mixes", [False, True])
@given(
    st.integers(1, 5),
    st.one_of(st.integers(0, 12), st.integers(90, 110)),  # one row, some, and more than a tile of the kernel
    st.integers(1, 3),
    st.sampled_from([1, 4, 17, 32, 40, 300]),
    st.integers(0, 5),
    st.booleans(),
)
def test_float32_agrees_with_float64(mixes: bool, taps: int, more: int, b: int, d: int, tail: int, apart: bool) -> None:
    generator = torch.Generator().manual_seed(taps + 10 * more)
    wide = torch.randn(b, taps + more, 2 * d, generator=generator)
    weight = torch.randn(d, taps, generator=generator)
    mixing = torch.randn(d, d, generator=generator) / d**0.5
    gradient = torch.randn(b, more // 2 + 1, d, generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        rows = (wide[..., ::2] if apart else wide[..., :d].contiguous()).to(dtype)  # channels that lie apart too
        leaves = [
            leaf.detach().to(dtype).requires_grad_() for leaf in ((rows, weight, mixing) if mixes else (rows, weight))
        ]
        y = filter_and_halve(*split(leaves[0], tail), *leaves[1:])
        results.append((y, *torch.autograd.grad(y, leaves, gradient.to(dtype))))
    for fast, exact in zip(*results, strict=True):
        torch.testing.assert_close(fast.double(), exact, atol=2e-5, rtol=1e-5)


def test_second_derivatives_in_float32_are_refused_where_the_kernel_is_compiled() -> None:
    x, weight = torch.randn(1, 5, 2, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    y = filter_and_halve(x[:, :0], x, weight)
    if type(y.grad_fn).__name__ != "_CompiledBackward":
        pytest.skip("there are no compiled kernels")
    with pytest.raises(InputError, match="second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
