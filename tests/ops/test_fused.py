"""The fused elementwise functions: the compiled path is the definition, and its dropout is dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.ops.fused import (
    dropout,
    keep_and_rms_norm,
    linear_dropout_add,
    linear_gelu_dropout,
    normalize,
    rms_norm,
    scaled_norm_add,
    silu_gate,
)

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")

EPS = 1e-8


def make(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def results(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and the gradient of every input, as float64."""
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
    y = function(*leaves)
    (y * torch.cos(torch.arange(y.numel()).view(y.shape))).sum().backward()
    return [value.double() for value in (y.detach(), *(x.grad for x in leaves))]


def assert_compiled_is_definition(
    function: Callable[..., Tensor], inputs: list[Tensor], size_of_terms: float = 1.0
) -> None:
    """In float32 the compiled path runs, in float64 the definition."""
    for actual, expected in zip(*(results(function, inputs, t) for t in (torch.float32, torch.float64)), strict=True):
        # Outputs and gradients are sums of terms that may cancel: the size of the terms is part of the scale.
        scale = size_of_terms + expected.abs().max().item()
        assert (actual - expected).abs().max().item() <= 1e-5 * scale


rows = st.tuples(st.integers(1, 3), st.integers(1, 20))
widths = st.integers(1, 90)


@given(rows, widths, st.floats(1e-3, 1e3))
def test_rms_norm(shape: tuple[int, int], width: int, scale: float) -> None:
    x, weight = make((*shape, width), (width,))
    x = x * scale
    largest_inverse = 1 / x.square().mean(-1).sqrt().min().item()  # the gradient by x is of this order
    assert_compiled_is_definition(lambda x, w: rms_norm(x, w, EPS), [x, weight], 1 + largest_inverse)


@given(rows, widths, st.floats(0.1, 100))
def test_silu_gate(shape: tuple[int, int], width: int, scale: float) -> None:
    x, gate = make((*shape, width), (*shape, width))
    assert_compiled_is_definition(silu_gate, [x, scale * gate], scale)


@given(rows, widths)
def test_what_adds_to_its_input_gets_both_gradients(shape: tuple[int, int], width: int) -> None:
    x, weight, bias = make((*shape, width), (width,), (width,))
    largest_inverse = 1 / x.square().mean(-1).sqrt().min().item()

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        kept, normed = keep_and_rms_norm(x, weight, EPS)
        return kept + normed.sin()

    assert_compiled_is_definition(layer, [x, weight], 1 + largest_inverse)
    assert_compiled_is_definition(lambda *a: scaled_norm_add(*a, EPS), [x, weight, bias], 1 + largest_inverse)


def test_either_output_of_keep_and_rms_norm_may_go_unused() -> None:
    x, weight = (tensor.requires_grad_() for tensor in make((3, 5), (5,)))
    kept, _ = keep_and_rms_norm(x, weight, EPS)
    (gradient,) = torch.autograd.grad(kept.sum(), x)
    assert torch.equal(gradient, torch.ones(3, 5))
    _, normed = keep_and_rms_norm(x, weight, EPS)
    (gradient,) = torch.autograd.grad(normed.sin().sum(), x)
    (expected,) = torch.autograd.grad(F.rms_norm(x, (5,), weight, EPS).sin().sum(), x)
    torch.testing.assert_close(gradient, expected)


@given(rows, widths)
def test_normalize(shape: tuple[int, int], width: int) -> None:
    (x,) = make((*shape, width))
    largest_inverse = 1 / x.norm(dim=-1).min().item()
    assert_compiled_is_definition(lambda x: normalize(x, EPS), [x], 1 + largest_inverse)


def test_rows_of_zeros_are_divided_by_eps() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    y = normalize(x, 0.5)
    y.backward(torch.ones(2, 3))
    assert torch.equal(y, torch.zeros(2, 3))
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))


@given(rows, st.integers(1, 20), widths)
def test_linear_gelu(shape: tuple[int, int], inputs: int, outputs: int) -> None:
    tensors = make((*shape, inputs), (outputs, inputs), (outputs,))
    assert_compiled_is_definition(lambda x, w, b: linear_gelu_dropout(x, w, b, 0.0), tensors)


@given(rows, st.integers(1, 20), widths)
def test_linear_add(shape: tuple[int, int], inputs: int, outputs: int) -> None:
    tensors = make((*shape, outputs), (*shape, inputs), (outputs, inputs), (outputs,))
    assert_compiled_is_definition(lambda r, x, w, b: linear_dropout_add(r, x, w, b, 0.0), tensors)


def test_gelu_is_exact_over_its_range() -> None:
    x = torch.linspace(-12, 12, 4801)[:, None].requires_grad_()
    y = linear_gelu_dropout(x, torch.ones(1, 1), torch.zeros(1), 0.0)
    y.sum().backward()
    exact = x.detach().double().requires_grad_()
    F.gelu(exact).sum().backward()
    assert (y.double() - F.gelu(exact)).abs().max() < 1e-6
    assert (x.grad.double() - exact.grad).abs().max() < 1e-6
    infinite = torch.tensor([[torch.inf], [torch.nan]])
    assert not linear_gelu_dropout(infinite, torch.ones(1, 1), torch.zeros(1), 0.0).isfinite().any()


def dropped_gelu(x: Tensor, p: float) -> Tensor:
    return linear_gelu_dropout(x, torch.eye(x.shape[-1]), torch.zeros(x.shape[-1]), p)


def dropped_add(x: Tensor, p: float) -> Tensor:
    return linear_dropout_add(torch.zeros_like(x), x, torch.eye(x.shape[-1]), torch.zeros(x.shape[-1]), p)


@pytest.mark.parametrize("function", [dropped_gelu, dropped_add, dropout])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_dropout_keeps_its_share_scales_it_and_passes_the_same_gradient(function: Any, p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 250, requires_grad=True)
    y = function(x, p)
    kept = y != 0
    share, count = kept.double().mean().item(), x.numel()
    assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)
    full = function(x.detach(), 0.0)
    torch.testing.assert_close(y[kept], full[kept] / (1 - p))
    y.sum().backward()
    assert torch.equal(x.grad != 0, kept)
    # Neighbours along both axes are dropped independently.
    for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
        both = (a & b).double().mean().item()
        assert abs(both - (1 - p) ** 2) < 6 * math.sqrt((1 - p) ** 2 / count)


def test_dropout_follows_torchs_seed() -> None:
    x = torch.ones(50, 50)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(dropped_add(x, 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(dropped_add(x, 0.5), dropped_add(x, 0.5))


def test_under_autocast_products_are_bfloat16() -> None:
    x, weight, bias = make((5, 16), (40, 16), (40,))
    product = x.bfloat16() @ weight.bfloat16().T
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_gelu_dropout(x, weight, bias, 0.0)
        narrow = linear_dropout_add(torch.zeros(5, 40).bfloat16(), x, weight, bias, 0.0)
        wide = linear_dropout_add(torch.zeros(5, 40), x, weight, bias, 0.0)
        defined = F.linear(x, weight, bias)
    assert (y.dtype, narrow.dtype, wide.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), F.gelu(product.float() + bias), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(narrow.float(), product.float() + bias, rtol=2**-8, atol=1e-6)
    assert torch.equal(wide, defined.float())
