"""Laws of the causal base kernel: it is a lower-triangular matrix, and its state is explicit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops import base_kernel
from kmixer.ops.base_kernel import KINDS, MAX_NATIVE_LAGS, initial_state
from tests.models.laws import assert_a_split_gives_the_whole, draw_cuts

WINDOW = 150
STREAMING = ("toeplitz", "conv")


def make_weights(kind: str, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"dense": [(WINDOW, WINDOW)], "low_rank": [(WINDOW, 3)] * 2, "toeplitz": [(60,)], "conv": [(8,)]}
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes[kind])


def matrix(kind: str, weights: tuple[Tensor, ...], t: int) -> Tensor:
    """The (t, t) kernel, written down from its definition."""
    if kind == "dense":
        return weights[0][:t, :t].tril()
    if kind == "low_rank":
        return (weights[0][:t] @ weights[1][:t].T).tril()
    result = torch.zeros(t, t, dtype=torch.float64)
    for lag, weight in enumerate(weights[0][:t]):
        result += weight * torch.diag(torch.ones(t - lag, dtype=torch.float64), -lag)
    return result


def inputs(t: int, b: int = 2, d: int = 3) -> Tensor:
    return torch.randn(b, t, d, generator=torch.Generator().manual_seed(t), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, WINDOW), st.integers(1, 3), st.integers(1, 4))
def test_it_is_its_matrix(kind: Any, t: int, b: int, d: int) -> None:
    weights, x = make_weights(kind), inputs(t, b, d)
    y, _ = base_kernel(x, weights, kind=kind)
    torch.testing.assert_close(y, matrix(kind, weights, t) @ x, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")
@given(st.integers(1, WINDOW), st.integers(1, 4), st.sampled_from([16, 48, 80]))
def test_the_compiled_dense_kernel_is_its_matrix(t: int, b: int, d: int) -> None:
    (weights,) = make_weights("dense")
    x = inputs(t, b, d)
    weigh = torch.cos(torch.arange(x.numel()).view(x.shape))
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (x, weights)]
        y, _ = base_kernel(leaves[0], (leaves[1],), kind="dense")
        (y * weigh).sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*found, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6 * (1 + scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 8, 32, 33, 61, 150])
def test_gradients_are_those_of_the_matrix(kind: Any, t: int) -> None:
    weights, x = make_weights(kind), inputs(t)
    leaves = [x, *weights]
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    theirs = [leaf.clone().requires_grad_() for leaf in leaves]
    weigh = torch.cos(torch.arange(x.numel()).view(x.shape))
    (base_kernel(ours[0], tuple(ours[1:]), kind=kind)[0] * weigh).sum().backward()
    (matrix(kind, tuple(theirs[1:]), t) @ theirs[0] * weigh).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, WINDOW), st.data())
def test_any_split_gives_the_whole(kind: Any, t: int, data: st.DataObject) -> None:
    weights, x = make_weights(kind), inputs(t)
    start = None if data.draw(st.booleans()) else initial_state(kind, weights, 2, 3)
    assert_a_split_gives_the_whole(
        lambda part, state: base_kernel(x[:, part], weights, kind=kind, state=state),
        *(t, draw_cuts(data, t)),
        start=start,
        tolerance=1e-10,
    )


@pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40), st.integers(1, MAX_NATIVE_LAGS), st.booleans())
def test_the_compiled_filter_is_the_filter(b: int, t: int, d: int, lags: int, started: bool) -> None:
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(b, t, d, generator=generator)
    weights = torch.randn(lags, generator=generator)
    history = torch.randn(b, lags - 1, d, generator=generator) * started
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [leaf.clone().to(dtype).requires_grad_() for leaf in (x, weights, history)]
        y, state = base_kernel(leaves[0], (leaves[1],), kind="conv", state=leaves[2])
        (y * torch.cos(torch.arange(y.numel()).view(y.shape))).sum().backward(retain_graph=True)
        if state.numel():
            (state * 0.5).sum().backward()
        gradients = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
        results.append([value.double() for value in (y, state, *gradients)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", STREAMING)
def test_a_stream_has_no_end_and_a_state_of_constant_size(kind: Any) -> None:
    weights = make_weights(kind)
    state = initial_state(kind, weights, 1, 2)
    for _ in range(5):
        before = state.shape
        y, state = base_kernel(inputs(200, 1, 2), weights, kind=kind, state=state)
        assert y.shape == (1, 200, 2)
        assert state.shape == before


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_past_the_window_the_error_says_what_streams(kind: Any) -> None:
    weights = make_weights(kind)
    _, state = base_kernel(inputs(WINDOW), weights, kind=kind)
    with pytest.raises(InputError, match=rf"{kind} base kernel ends at position {WINDOW}.*toeplitz or conv"):
        base_kernel(inputs(1), weights, kind=kind, state=state)
    with pytest.raises(InputError, match=f"{WINDOW + 1} were asked for"):
        base_kernel(inputs(WINDOW + 1), weights, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_causal(kind: Any) -> None:
    weights, x = make_weights(kind), inputs(100)
    before, _ = base_kernel(x, weights, kind=kind)
    x[:, 50] += 1.0
    after, _ = base_kernel(x, weights, kind=kind)
    torch.testing.assert_close(before[:, :50], after[:, :50], rtol=0, atol=0)
    assert not torch.equal(before[:, 50], after[:, 50])


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(InputError, match="got 'convv'; allowed: dense, low_rank, toeplitz, conv"):
        base_kernel.__wrapped__(inputs(3), make_weights("conv"), kind="convv")
