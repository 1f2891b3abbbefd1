"""The feed-forward block: one compiled kernel, and the pieces it is made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops.feed_forward import Activation, feed_forward, hidden_units
from kmixer.ops.fused import linear_dropout_add, linear_gelu_dropout, rms_norm

EPS = 1e-8
compiled = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")


def make(rows: tuple[int, ...], d: int, m: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """h, norm, up, up_bias, down, down_bias."""
    generator = torch.Generator().manual_seed(sum(rows) + d + m)
    shapes = ((*rows, d), (d,), (m, d), (m,), (d, m), (d,))
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def definition(
    h: Tensor, norm: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, activation: Activation
) -> Tensor:
    x = norm * h / torch.sqrt(h.square().mean(-1, keepdim=True) + EPS)
    u = x @ up.T + up_bias
    return h + (F.gelu(u) if activation == "gelu" else u.relu().square()) @ down.T + down_bias


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weigh = torch.cos(torch.arange(y.numel()).view(y.shape))
    return [y.detach(), *torch.autograd.grad((y * weigh).sum(), leaves)]


# Rows beyond a tile of the kernel; widths below, at and beyond whole vectors.
@given(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 47, 48, 49, 120])),
    st.sampled_from([3, 16, 48, 58, 64]),
    st.sampled_from([1, 16, 40, 80, 143, 144]),
    st.sampled_from(["gelu", "squared_relu"]),
)
def test_it_is_its_definition(rows: tuple[int, int], d: int, m: int, activation: Activation) -> None:
    tensors = make(rows, d, m)
    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = gradients(definition(*leaves, activation), leaves)
    for dtype, error in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        y = feed_forward(*leaves, eps=EPS, dropout=0.0, activation=activation)
        for actual, exact in zip(gradients(y, leaves), expected, strict=True):
            scale = 1 + exact.abs().max().item()
            assert (actual - exact).abs().max().item() <= error * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_and_biases_may_be_missing(dtype: torch.dtype) -> None:
    h, norm, up, up_bias, down, down_bias = make((2, 50), 24, 40, dtype)
    there = (torch.ones_like(norm), up, torch.zeros_like(up_bias), down, torch.zeros_like(down_bias))
    for activation in ("gelu", "squared_relu"):
        actual = feed_forward(h, None, up, None, down, None, eps=EPS, dropout=0.0, activation=activation)
        torch.testing.assert_close(actual, definition(h, *there, activation), rtol=1e-4, atol=1e-4)


@compiled
def test_its_dropout_is_that_of_the_pieces() -> None:
    leaves = [x.requires_grad_() for x in make((2, 77), 32, 80, torch.float32)]
    h, norm, up, up_bias, down, down_bias = leaves
    torch.manual_seed(3)
    ours = gradients(feed_forward(*leaves, eps=EPS, dropout=0.4), leaves)
    torch.manual_seed(3)
    hidden = linear_gelu_dropout(rms_norm(h, norm, EPS), up, up_bias, 0.4)
    theirs = gradients(linear_dropout_add(h, hidden, down, down_bias, 0.0), leaves)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    whole = feed_forward(*leaves, eps=EPS, dropout=0.0)
    assert not torch.allclose(ours[0], whole, atol=0.1)


@compiled
def test_the_same_threads_give_the_same_bits() -> None:
    leaves = [x.requires_grad_() for x in make((3, 333), 64, 128, torch.float32)]
    first, second = (gradients(feed_forward(*leaves, eps=EPS, dropout=0.0), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    of_units = leaves[0], leaves[2], leaves[3]
    first, second = (gradients(hidden_units(*of_units, dropout=0.0), [*of_units]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@given(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 47, 48, 49, 120])),
    st.sampled_from([1, 3, 16, 58, 64]),
    st.sampled_from([1, 16, 40, 143, 144]),
)
def test_hidden_units_are_their_definition(rows: tuple[int, int], d: int, m: int) -> None:
    x, _, up, up_bias, *_ = make(rows, d, m)
    leaves = [part.clone().requires_grad_() for part in (x, up, up_bias)]
    expected = gradients(F.gelu(F.linear(*leaves)), leaves)
    for dtype, error in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        leaves = [part.to(dtype).requires_grad_() for part in (x, up, up_bias)]
        z = hidden_units(*leaves, dropout=0.0)
        if native.kernels() is not None:
            assert (type(z.grad_fn).__name__ == "_HiddenUnitsBackward") == (dtype == torch.float32)
        for actual, exact in zip(gradients(z, leaves), expected, strict=True):
            scale = 1 + exact.abs().max().item()
            assert (actual - exact).abs().max().item() <= error * scale


@compiled
@pytest.mark.parametrize(("d", "m"), [(32, 80), (7, 13)])
def test_dropped_hidden_units_are_those_of_the_pieces(d: int, m: int) -> None:
    x, _, up, up_bias, *_ = make((2, 77), d, m, torch.float32)
    leaves = [part.requires_grad_() for part in (x, up, up_bias)]
    answers = []
    for function in (hidden_units, linear_gelu_dropout):
        torch.manual_seed(3)
        answers.append(gradients(function(*leaves, dropout=0.4), leaves))
    for actual, expected in zip(*answers, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert 0.3 < (answers[0][0] == 0).double().mean() < 0.5


def test_gradients_of_hidden_units_are_slopes() -> None:
    """Of the definition those by small steps, in float64; of the kernel those of the definition."""
    x, _, up, up_bias, *_ = make((2, 9), 5, 7)
    leaves = [part.requires_grad_() for part in (x, up, up_bias)]
    torch.autograd.gradcheck(lambda *parts: hidden_units(*parts, dropout=0.0), leaves)
    weigh = torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.autograd.grad((hidden_units(*leaves, dropout=0.0) * weigh).sum(), leaves)
    single = [part.detach().float().requires_grad_() for part in leaves]
    ours = torch.autograd.grad((hidden_units(*single, dropout=0.0) * weigh.float()).sum(), single)
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@compiled
def test_second_derivatives_are_refused() -> None:
    leaves = [x.requires_grad_() for x in make((2, 3), 16, 32, torch.float32)]
    y = feed_forward(*leaves, eps=EPS, dropout=0.0)
    with pytest.raises(InputError, match="second"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)
    of_units = leaves[0], leaves[2], leaves[3]
    with pytest.raises(InputError, match="second"):
        torch.autograd.grad(hidden_units(*of_units, dropout=0.0).sum(), of_units, create_graph=True)


def test_rows_do_not_depend_on_each_other() -> None:
    leaves = make((2, 60), 16, 32, torch.float32)
    whole = feed_forward(*leaves, eps=EPS, dropout=0.0)
    alone = feed_forward(leaves[0][1:, 13:14], *leaves[1:], eps=EPS, dropout=0.0)
    torch.testing.assert_close(alone, whole[1:, 13:14], rtol=1e-6, atol=1e-6)
