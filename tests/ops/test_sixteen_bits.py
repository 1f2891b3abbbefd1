"""Kernels that read and write bfloat16: their definition in float64, of the same rounded inputs, rounded at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.ops.base_kernel import base_kernel
from kmixer.ops.decay.recurrence import decayed_linear_attention
from kmixer.ops.feed_forward import feed_forward
from kmixer.ops.fused import (
    dropout,
    keep_and_rms_norm,
    linear_dropout_add,
    linear_gelu_dropout,
    rms_norm,
    scaled_norm_add,
    silu_gate,
)
from kmixer.ops.linear import linear_map
from kmixer.ops.pointwise_norm import Pointwise, pointwise_norm

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")

EPS = 1e-8
UNIT = 2.0**-8  # half a unit in the last place of bfloat16, at most, of the number itself

shapes = st.tuples(st.integers(1, 3), st.integers(1, 60), st.integers(1, 70))


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def results(function: Callable[..., Tensor], inputs: list[Tensor], narrow: int, dtype: torch.dtype) -> list[Tensor]:
    """Output and the gradient of every input; the first `narrow` of these are rounded to bfloat16."""
    rounded = [x.bfloat16() if i < narrow else x for i, x in enumerate(inputs)]
    leaves = [(x.double() if dtype == torch.float64 else x).clone().requires_grad_() for x in rounded]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = function(*leaves)
    assert y.dtype == dtype
    y.backward(torch.cos(torch.arange(y.numel())).view(y.shape).bfloat16().to(dtype))
    return [y.detach(), *(x.grad for x in leaves if x.grad is not None)]


def assert_rounded_once(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    *,
    narrow: int = 1,
    size_of_terms: float = 0.0,
    slack: float = 1e-5,
    reference: Callable[..., Tensor] | None = None,
) -> None:
    """What comes in 16 bits is off by a rounding, what comes in 32 by `slack`, of the size of the terms of its sums."""
    actual = results(function, inputs, narrow, torch.bfloat16)
    expected = results(reference or function, inputs, narrow, torch.float64)
    for one, other in zip(actual, expected, strict=True):
        scale = size_of_terms + (other.abs().max().item() if other.numel() else 0.0)
        allowed = slack * scale + (UNIT * other.abs() if one.dtype == torch.bfloat16 else 0.0)
        assert ((one.double() - other).abs() <= allowed).all()


@given(shapes, st.floats(1e-2, 1e2))
def test_rms_norm(shape: tuple[int, int, int], scale: float) -> None:
    x, weight, bias = drawn(shape, shape[-1:], shape[-1:])
    largest = 1 / (scale * x).square().mean(-1).sqrt().min().item()  # the gradient by x is of this order
    assert_rounded_once(lambda x, w: rms_norm(x, w, EPS), [scale * x, weight], size_of_terms=1 + 10 * largest)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        kept, normed = keep_and_rms_norm(x, weight, EPS)
        return normed if kept.dtype != x.dtype else scaled_norm_add(kept, weight, bias.to(weight.dtype), EPS)

    # Sums of two numbers that may cancel, the gradient of one of which was rounded before.
    terms = 10 * (1 + scale + largest)
    assert_rounded_once(layer, [scale * x, weight], size_of_terms=terms, slack=UNIT / 4)


@given(shapes, st.floats(0.1, 100))
def test_silu_gate(shape: tuple[int, int, int], scale: float) -> None:
    x, gate = drawn(shape, shape)
    assert_rounded_once(silu_gate, [x, scale * gate], narrow=2, size_of_terms=1.0)


@pytest.mark.parametrize("function", ["tanh", "erf"])
@given(shapes)
def test_pointwise_norm(function: Any, shape: tuple[int, int, int]) -> None:
    x, shift, gain, bias = drawn(shape, (), shape[-1:], shape[-1:])
    alpha = torch.tensor(0.7)

    def norm(x: Tensor, *learned: Tensor) -> Tensor:
        return pointwise_norm(x, Pointwise(function, *learned))

    terms = float(x.numel())  # the gradients of alpha and shift are sums over all
    assert_rounded_once(norm, [x, alpha, shift, gain, bias], size_of_terms=terms)


@given(shapes, st.integers(1, 9), st.booleans())
def test_decayed_linear_attention(shape: tuple[int, int, int], rank: int, carried: bool) -> None:
    b, t, d = shape
    v, q, k, log_decay, state = drawn(shape, (b, t, rank), (b, t, rank), (rank,), (b, rank, d))

    def mix(v: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
        start = state if carried else None
        return decayed_linear_attention(q, k, v, -log_decay.abs(), state=start, backend="auto")[0]

    assert_rounded_once(mix, [v, q, k, log_decay, state], size_of_terms=10.0 * t)


@given(shapes, st.integers(1, 12))
def test_filters(shape: tuple[int, int, int], lags: int) -> None:
    b, _, d = shape
    x, history, weights = drawn(shape, (b, lags - 1, d), (lags,))

    def mix(x: Tensor, history: Tensor, weights: Tensor) -> Tensor:
        return base_kernel(x, (weights,), kind="conv", state=history)[0]

    assert_rounded_once(mix, [x, history, weights], narrow=2, size_of_terms=float(lags))


@given(shapes, st.integers(1, 140))
def test_linear_maps(shape: tuple[int, int, int], outputs: int) -> None:
    """Whatever the number of inputs, outputs and rows, odd ones too: products are of pairs."""
    x, weight, bias = drawn(shape, (outputs, shape[-1]), (outputs,))
    rounded = weight.bfloat16().float()  # as products of bfloat16 have it
    assert_rounded_once(linear_map, [x, rounded, bias], size_of_terms=10.0)
    assert_rounded_once(lambda x, w: linear_map(x, w), [x, rounded], size_of_terms=10.0)


def rounding(x: Tensor, *, back: bool = False) -> Tensor:
    """x rounded to bfloat16; its gradient too where `back` holds."""

    class Rounding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.bfloat16().to(x.dtype)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient.bfloat16().to(gradient.dtype) if back else gradient

    return Rounding.apply(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
@pytest.mark.parametrize("norm", ["rms", "none", "erf"])
@given(shapes, st.integers(1, 100))
def test_feed_forward_blocks(activation: Any, norm: str, shape: tuple[int, int, int], m: int) -> None:
    """The definition that rounds where the block writes 16 bits: what enters either product, and what is kept."""
    d = shape[-1]
    h, gain, up, up_bias, down, down_bias = drawn(shape, (d,), (m, d), (m,), (d, m), (d,))
    up, down = (up / d**0.5).bfloat16().float(), (down / m**0.5).bfloat16().float()

    def normed(h: Tensor, gain: Tensor) -> Any:
        if norm == "erf":
            return Pointwise("erf", gain.new_tensor(0.5), None, gain)
        return gain if norm == "rms" else None

    def block(h: Tensor, gain: Tensor, *weights: Tensor) -> Tensor:
        return feed_forward(h, normed(h, gain), *weights, eps=EPS, dropout=0.0, activation=activation)

    def reference(h: Tensor, gain: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        one = normed(h, gain)
        x = pointwise_norm(h, one) if norm == "erf" else F.rms_norm(h, h.shape[-1:], one, EPS)
        u = rounding(F.linear(rounding(x), up), back=True) + up_bias
        z = F.gelu(u) if activation == "gelu" else u.relu().square()
        return h + F.linear(rounding(z), down, down_bias)

    # A sum in float32 may be rounded to the other side: one unit of one number, in sums of many.
    terms = 4 * (1 + 1 / h.square().mean(-1).sqrt().min().item())
    assert_rounded_once(
        block, [h, gain, up, up_bias, down, down_bias], size_of_terms=terms, slack=UNIT, reference=reference
    )


@given(shapes, st.integers(1, 20))
def test_neighbours_of_linear_maps(shape: tuple[int, int, int], outputs: int) -> None:
    x, weight, bias, residual = drawn(shape, (outputs, shape[-1]), (outputs,), (*shape[:-1], outputs))
    weight = weight.bfloat16().float()

    def units(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_gelu_dropout(x, weight, bias, 0.0)

    def added(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_dropout_add(residual, x, weight, bias, 0.0)

    # The product is rounded before the rest is made of it.
    assert_rounded_once(units, [x, weight, bias], size_of_terms=10.0, slack=UNIT)
    assert_rounded_once(added, [x, residual, weight, bias], narrow=2, size_of_terms=10.0, slack=UNIT)


def test_dropout_draws_what_it_draws_in_float32() -> None:
    x = torch.ones(300, 40)
    masks = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        masks.append(dropout(x.to(dtype), 0.25).float())
    torch.testing.assert_close(masks[0], masks[1], rtol=UNIT, atol=0.0)
    assert 0.7 < (masks[0] > 0).float().mean() < 0.8


def test_numbers_at_the_ends_of_the_range() -> None:
    """NaN and infinity stay; what rounds beyond the largest number is infinite; the least numbers are kept."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.3895e38, 1e-40, -0.0, 1.0, 1.00390625, 1.01171875])
    ones = torch.ones(9)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_dropout_add(special.bfloat16()[None], torch.zeros(1, 9).bfloat16(), torch.eye(9), 0 * ones, 0.0)
    torch.testing.assert_close(y[0], special.bfloat16(), rtol=0.0, atol=0.0, equal_nan=True)
    gate = torch.full((9,), 100.0).bfloat16()
    torch.testing.assert_close(
        silu_gate(special.bfloat16(), gate), (100 * special.bfloat16().float()).bfloat16(), equal_nan=True
    )


def test_what_is_not_known_goes_the_plain_way() -> None:
    """Products in bfloat16 are autocast's, of float32 weights: with others torch says what it has to say."""
    x, weight = torch.randn(3, 4).bfloat16(), torch.randn(5, 4)
    assert not native.multiplies(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert native.multiplies(x, weight)
        assert not native.multiplies(x.float(), weight)
        assert not native.multiplies(x, weight.bfloat16())
    with torch.autocast("cpu", torch.float16):
        assert not native.multiplies(x, weight)
        assert not native.multiplies(x.half(), weight)
    with pytest.raises(RuntimeError, match="dtype"):
        linear_map(x, weight)
