"""The compiled chunks are their definition: outputs, weights after every chunk, and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.ops.fast_weights import fast_weights
from tests.conftest import threads_of_torch

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@given(
    b=st.integers(1, 3),
    n=st.integers(1, 4),
    c=st.sampled_from([2, 3, 7, 64]),
    f=st.sampled_from([1, 8, 24, 130]),
    d=st.sampled_from([1, 6, 16, 40]),
    taps=st.sampled_from([1, 3, 5, 9]),
    fixed=st.sampled_from([0, 1, 2]),
    used=st.sampled_from(["both", "y", "after"]),
)
def test_it_is_its_definition(b: int, n: int, c: int, f: int, d: int, taps: int, fixed: int, used: str) -> None:
    """In float64 the definition runs, in float32 the kernel."""
    shapes = [(b, n, c, f), (b, n, c, d), (d, taps), (d, d)]
    exact = [draw(*shape) / (shape[-1] ** 0.5) for shape in shapes] + [torch.tensor(0.7).double()]
    exact += [draw(b, f, d), *([draw(d, f), draw(d)][:fixed])]
    answers = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in exact]
        hidden, targets, filter_, matrix, decay, before = leaves[:6]
        more = dict(zip(("weight", "bias"), leaves[6:], strict=False))
        y, after = fast_weights(hidden, targets, filter_, matrix, before, decay, rate=0.3, **more)
        assert y.dtype == after.dtype == dtype
        assert (type(y.grad_fn).__name__ == "_FastWeightsBackward") == (dtype == torch.float32)
        weights = [torch.linspace(-1, 1, part.numel(), dtype=dtype).view(part.shape) for part in (y, after)]
        of_y, of_after = ((part * weight).sum() for part, weight in zip((y, after), weights, strict=True))
        loss = {"both": of_y + of_after, "y": of_y, "after": of_after}[used]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        answers.append([y, after, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients))])  # noqa: B905
    for expected, got in zip(*answers, strict=True):
        scale = float(expected.detach().abs().max()) + 1e-6
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * scale)


def test_no_thread_shares_a_row() -> None:
    parts = [
        draw(5, 3, 4, 8).float(),
        draw(5, 3, 4, 6).float(),
        draw(6, 5).float(),
        draw(6, 6).float(),
        draw(5, 8, 6).float(),
    ]
    with threads_of_torch(1):
        expected = fast_weights(*parts, None, rate=0.3)
    with threads_of_torch(3):
        for got, one in zip(fast_weights(*parts, None, rate=0.3), expected, strict=True):
            assert torch.equal(got, one)
