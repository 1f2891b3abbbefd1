"""Linear maps: the compiled kernel is torch's own, for any number of rows and any widths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.fused import dropout, linear_dropout_add
from kmixer.ops.linear import MAX_WEIGHTS, linear_map

compiled = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")


def make(rows: tuple[int, ...], d: int, m: int, biased: bool) -> list[Tensor]:
    """x, weight and, perhaps, bias."""
    generator = torch.Generator().manual_seed(sum(rows) + d + m)
    shapes = ((*rows, d), (m, d), (m,))[: 2 + biased]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weigh = torch.cos(torch.arange(y.numel())).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weigh).sum(), leaves)]


# Rows beyond a tile of the kernel; widths below, at and beyond whole vectors.
@given(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 47, 48, 49, 120])),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
)
def test_it_is_its_definition(rows: tuple[int, int], d: int, m: int, biased: bool) -> None:
    tensors = make(rows, d, m, biased)
    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = gradients(F.linear(*leaves), leaves)
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        for actual, exact in zip(gradients(linear_map(*leaves), leaves), expected, strict=True):
            size_of_terms = 1 + (rows[0] * rows[1] + d + m) ** 0.5
            assert (actual - exact).abs().max().item() <= error * size_of_terms * (1 + exact.abs().max().item())


def test_any_layout_of_the_inputs() -> None:
    x, weight = (y.float() for y in make((7, 40), 24, 40, False))
    expected = F.linear(x, weight)
    torch.testing.assert_close(linear_map(x.transpose(0, 1), weight).transpose(0, 1), expected)
    torch.testing.assert_close(linear_map(x, weight.T.contiguous().T), expected)
    both = torch.stack([x, x], -1)
    torch.testing.assert_close(linear_map(both[..., 1], weight), expected)


def test_no_rows_and_large_matrices() -> None:
    weight = torch.randn(MAX_WEIGHTS // 64 + 1, 64)
    assert linear_map(torch.randn(0, 64), weight[:5]).shape == (0, 5)
    x = torch.randn(3, 64)
    torch.testing.assert_close(linear_map(x, weight), F.linear(x, weight))


@compiled
def test_the_same_threads_give_the_same_bits() -> None:
    leaves = [x.float().requires_grad_() for x in make((3, 333), 50, 70, True)]
    first, second = (gradients(linear_map(*leaves), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@compiled
def test_second_derivatives_are_refused() -> None:
    leaves = [x.float().requires_grad_() for x in make((2, 3), 16, 32, True)]
    with pytest.raises(InputError, match="second"):
        torch.autograd.grad(linear_map(*leaves).square().sum(), leaves, create_graph=True)


def test_autocast_is_left_to_torch() -> None:
    x, weight = (y.float() for y in make((2, 3), 16, 32, False))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_map(x, weight).dtype == torch.bfloat16


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 7, 32])
def test_a_residual_and_dropout_are_those_of_the_sum_made_after_it(dtype: torch.dtype, outputs: int) -> None:
    """Both draw the same elements from the same seed; the gradient of what is dropped is dropped."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator) for shape in ((2, 53, 9), (outputs, 9), (outputs,), (2, 53, outputs))
    )
    upstream = torch.randn(2, 53, outputs, generator=generator).to(dtype)
    results = []
    for fused in (True, False):
        leaves = [z.clone().requires_grad_() for z in (x.to(dtype), residual.to(dtype), weight, bias)]
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            if fused:
                y = linear_dropout_add(leaves[1], leaves[0], *leaves[2:], 0.3)
            else:
                mapped = linear_map(leaves[0], leaves[2], leaves[3])
                y = leaves[1] + dropout(mapped, 0.3)
        y.backward(upstream)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
        assert (one - other).abs().max() <= rounding * (1 + other.abs().max())
