"""Bounded functions in the place of norms: what they are, and the compiled pass against its definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.feed_forward import Activation, feed_forward
from kmixer.ops.pointwise_norm import Function, Pointwise, keep_and_pointwise_norm, pointwise_norm

compiled = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")
functions = pytest.mark.parametrize("function", ["tanh", "erf"])
TORCH = {"tanh": torch.tanh, "erf": torch.erf}
PATHS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]  # of torch, and where they are built of the kernels


def make(rows: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, alpha, shift, gain, bias."""
    generator = torch.Generator().manual_seed(rows + d)
    x, gain, bias = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((rows, d), (d,), (d,)))
    return [2 * x, torch.tensor(0.7, dtype=dtype), torch.tensor(-0.2, dtype=dtype), gain, bias]


def definition(function: Function, x: Tensor, alpha: Tensor, shift: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return gain * TORCH[function](alpha * x + shift) + bias


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weigh = torch.cos(torch.arange(y.numel()).view(y.shape))
    return [y.detach(), *torch.autograd.grad((y * weigh).sum(), leaves)]


def assert_near(actual: list[Tensor], expected: list[Tensor], error: float) -> None:
    for mine, exact in zip(actual, expected, strict=True):
        # Sums of terms that cancel: their size grows with the root of their number.
        scale = 1 + exact.abs().max().item() + math.sqrt(max(t.numel() for t in expected) / exact.numel())
        assert (mine - exact).abs().max().item() <= error * scale


@functions
@given(st.sampled_from([1, 2, 7, 48, 49, 1000]), st.sampled_from([1, 3, 16, 17, 256]))
def test_it_is_its_definition_with_every_gradient(function: Function, rows: int, d: int) -> None:
    tensors = make(rows, d)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = gradients(leaves[0].sin() + definition(function, *leaves), leaves)
    for dtype, error in PATHS:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        x, *learned = leaves
        kept, y = keep_and_pointwise_norm(x, Pointwise(function, *learned))
        assert_near(gradients(kept.sin() + y, leaves), expected, error)


@functions
@pytest.mark.parametrize("missing", ["shift", "gain", "bias"])
def test_what_is_missing_is_not_there(function: Function, missing: str) -> None:
    for dtype, error in PATHS:
        x, *learned = make(5, 9, dtype)
        norm = Pointwise(function, *learned)._replace(**{missing: None})
        neutral = {"shift": torch.zeros((), dtype=dtype), "gain": torch.ones(9, dtype=dtype)}
        neutral["bias"] = torch.zeros(9, dtype=dtype)
        expected = pointwise_norm(x, norm._replace(**{missing: neutral[missing]}))
        torch.testing.assert_close(pointwise_norm(x, norm), expected, rtol=error, atol=error)


@functions
def test_values_are_as_near_as_float32_lets_them_be(function: Function) -> None:
    small = torch.logspace(-6, 0, 20001)
    x = torch.cat([torch.linspace(-12, 12, 100001), small, -small])[:, None]
    exact = TORCH[function](x.double())
    error = (pointwise_norm(x, Pointwise(function, torch.tensor(1.0))).double() - exact).abs()
    assert error.max() <= 2e-7
    assert (error / exact.abs())[x.abs() > 1e-6].max() <= 1e-6


@functions
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-8)])
def test_near_zero_it_is_a_line(function: Function, dtype: torch.dtype, error: float) -> None:
    slope = {"tanh": 1.0, "erf": 2 / math.sqrt(math.pi)}[function]
    x, gain = torch.tensor([[1.0, -1.0]], dtype=dtype), torch.tensor([3.0, 3.0], dtype=dtype)
    alpha = torch.tensor(1e-4, dtype=dtype)
    y = pointwise_norm(x, Pointwise(function, alpha, gain=gain))
    torch.testing.assert_close(y / (alpha * x * gain * slope), torch.ones_like(y), rtol=0, atol=error)


@functions
@given(
    st.lists(st.floats(-50, 50, width=32, allow_subnormal=False), min_size=2, max_size=40),
    st.floats(0.0625, 4, width=32),
)
def test_it_is_odd_bounded_and_never_falls(function: Function, numbers: list[float], alpha: float) -> None:
    x = torch.tensor(sorted(numbers))[:, None]
    norm = Pointwise(function, torch.tensor(alpha), gain=torch.tensor([2.5]))
    y = pointwise_norm(x, norm)
    assert torch.equal(pointwise_norm(-x, norm), -y)
    assert y.abs().max() <= 2.5
    assert (y.diff(dim=0) >= -3e-7).all()  # two units in the last place, of 2.5
    biased = pointwise_norm(x, norm._replace(bias=torch.tensor([0.5])))
    assert biased.abs().max() <= 3.0


@functions
def test_no_element_sees_another(function: Function) -> None:
    x, *learned = make(1, 6)
    jacobian = torch.autograd.functional.jacobian(lambda x: pointwise_norm(x, Pointwise(function, *learned)), x)
    jacobian = jacobian.reshape(6, 6)
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))
    assert jacobian.diagonal().abs().min() > 0


@functions
def test_gradients_by_differences(function: Function) -> None:
    leaves = [tensor.requires_grad_() for tensor in make(3, 4)]
    assert torch.autograd.gradcheck(lambda x, *learned: pointwise_norm(x, Pointwise(function, *learned)), leaves)


@functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(function: Function, dtype: torch.dtype) -> None:
    x = torch.tensor([[1e4, -1e4, math.inf, -math.inf, math.nan, 0.0]], dtype=dtype)
    gain, bias = torch.full((6,), 2.0, dtype=dtype), torch.full((6,), 0.25, dtype=dtype)
    y = pointwise_norm(x, Pointwise(function, torch.tensor(0.5, dtype=dtype), gain=gain, bias=bias))
    expected = torch.tensor([[2.25, -1.75, 2.25, -1.75, math.nan, 0.25]], dtype=dtype)
    assert torch.equal(y.nan_to_num(9.0), expected.nan_to_num(9.0))


@functions
def test_sixteen_bits_are_computed_in_float32(function: Function) -> None:
    x, *learned = make(7, 16, torch.float32)
    y = pointwise_norm(x.bfloat16(), Pointwise(function, *learned))
    exact = pointwise_norm(x.bfloat16().float(), Pointwise(function, *learned))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact.bfloat16(), rtol=8e-3, atol=1e-6)  # a unit in the last place


@functions
def test_either_output_may_go_unused(function: Function) -> None:
    x, *learned = (tensor.requires_grad_() for tensor in make(3, 5, torch.float32))
    kept, _ = keep_and_pointwise_norm(x, Pointwise(function, *learned))
    assert torch.equal(torch.autograd.grad(kept.sum(), x)[0], torch.ones(3, 5))
    _, y = keep_and_pointwise_norm(x, Pointwise(function, *learned))
    expected = torch.autograd.grad(definition(function, x, *learned).sin().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), x)[0], expected)


@functions
@given(st.sampled_from([1, 47, 48, 49, 100]), st.sampled_from([3, 16, 40]), st.sampled_from(["gelu", "squared_relu"]))
def test_inside_the_feed_forward_block(function: Function, rows: int, d: int, activation: Activation) -> None:
    m = 24
    generator = torch.Generator().manual_seed(rows)
    shapes = ((m, d), (m,), (d, m), (d,))
    tensors = [*make(rows, d), *(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)]

    def block(leaves: list[Tensor], *, by_hand: bool) -> Tensor:
        h, alpha, shift, gain, bias, up, up_bias, down, down_bias = leaves
        if not by_hand:
            norm = Pointwise(function, alpha, shift, gain, bias)
            return feed_forward(h, norm, up, up_bias, down, down_bias, eps=0.0, dropout=0.0, activation=activation)
        u = F.linear(definition(function, h, alpha, shift, gain, bias), up, up_bias)
        return h + F.linear(F.gelu(u) if activation == "gelu" else u.relu().square(), down, down_bias)

    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = gradients(block(leaves, by_hand=True), leaves)
    for dtype, error in PATHS:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        assert_near(gradients(block(leaves, by_hand=False), leaves), expected, error)


@compiled
@functions
def test_the_same_threads_give_the_same_bits_and_any_split_the_same_rows(function: Function) -> None:
    x, *learned = (tensor.requires_grad_() for tensor in make(333, 17, torch.float32))
    norm = Pointwise(function, *learned)
    first, second = (gradients(pointwise_norm(x, norm), [x, *learned]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for cut in (1, 16, 200):
        assert torch.equal(torch.cat([pointwise_norm(part, norm) for part in x.split(cut)]), first[0])


@compiled
def test_tensors_that_do_not_fit_go_to_torch_which_says_so() -> None:
    x, alpha, *_ = make(4, 6, torch.float32)
    with pytest.raises(RuntimeError, match="size"):
        pointwise_norm(x, Pointwise("tanh", alpha, gain=torch.ones(5)))


@compiled
def test_second_derivatives_are_refused() -> None:
    x, *learned = (tensor.requires_grad_() for tensor in make(2, 3, torch.float32))
    y = pointwise_norm(x, Pointwise("erf", *learned))
    with pytest.raises(InputError, match="no derivative of its own"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
