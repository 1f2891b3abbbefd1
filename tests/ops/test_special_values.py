"""Infinities, NaN, zeros of both signs, subnormals and the largest numbers: the compiled path is the definition.

The definition is the plain path in float32, or in float64 where the two differ: in float32 torch's own operators
overflow on the way to some finite results (GELU of 3e38), or round them to other ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.native import library
from kmixer.ops.attention.hierarchical import hierarchical_attention
from kmixer.ops.cross_entropy import cross_entropies
from kmixer.ops.feed_forward import feed_forward
from kmixer.ops.fused import linear_gelu_dropout, normalize, rms_norm, silu_gate

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")

INF, NAN = float("inf"), float("nan")
# Between -88 and -104 e^x is subnormal, and 0 in the compiled kernels.
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1e-20, 1.0, -1.0, 5.5, -13.0, 20.0, -60.0, -87.5, 88.0, -110.0]
LARGE = [1e19, -1e19, 1e38, -1e38, 3e38, -3e38, INF, -INF, NAN]
values = st.sampled_from(SPECIAL + LARGE)


def results(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients, in float64."""
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
    y = function(*leaves)
    y.sum().backward()
    return [y.detach().double(), *(x.grad.double() for x in leaves if x.grad is not None)]


def assert_definition(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    compiled = results(function, inputs, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_LIBRARY", None)
        plain = results(function, inputs, torch.float32)
    exact = [x.float().double() for x in results(function, inputs, torch.float64)]
    for position, triple in enumerate(zip(compiled, plain, exact, strict=True)):
        actual, *allowed = triple
        fits = [torch.isclose(actual, x, rtol=1e-4, atol=2e-6, equal_nan=True) for x in allowed]
        wrong = ~(fits[0] | fits[1])
        assert not wrong.any(), (position, [x[wrong] for x in (*inputs, *triple) if x.shape == wrong.shape])


def gelu(x: Tensor) -> Tensor:
    return linear_gelu_dropout(x, x.new_ones(1, 1), x.new_zeros(1), 0.0)


def squared_relu(x: Tensor) -> Tensor:
    one, zero = x.new_ones(1), x.new_zeros(1)
    return feed_forward(x, one, one[None], zero, one[None], zero, eps=1.0, dropout=0.0, activation="squared_relu")


@given(st.lists(values, min_size=1, max_size=40))
@example(SPECIAL + LARGE)
def test_gelu(numbers: list[float]) -> None:
    assert_definition(gelu, [torch.tensor(numbers)[:, None]])


@given(st.lists(st.tuples(values, values), min_size=1, max_size=40))
@example([(x, gate) for x in SPECIAL + LARGE for gate in SPECIAL + LARGE])
def test_silu_gate(pairs: list[tuple[float, float]]) -> None:
    x, gate = torch.tensor(pairs).T
    assert_definition(silu_gate, [x.contiguous()[:, None], gate.contiguous()[:, None]])


@given(st.lists(values, min_size=1, max_size=12))
@example([NAN])
def test_the_square_of_relu_keeps_nan(numbers: list[float]) -> None:
    x = torch.tensor(numbers)[:, None]
    assert_definition(squared_relu, [x])


@pytest.mark.parametrize("norm", [lambda x: rms_norm(x, None, 1e-8), lambda x: normalize(x, 1e-8)], ids=["rms", "unit"])
@given(st.lists(values, min_size=1, max_size=20))
@example([3e38] * 17)
@example([1e38, 0.0, -3e38])
@example([INF, 1.0])
def test_norms(norm: Callable[[Tensor], Tensor], numbers: list[float]) -> None:
    assert_definition(norm, [torch.tensor(numbers)[None]])


@given(st.lists(values, min_size=2, max_size=40), st.sampled_from([None, 5.0, 1e4]))
@example([1e38, 1.0, 1e38], None)
@example([1e20, 1e20], None)
@example([-INF, 0.0, 1.0], None)
@example([-INF, -INF], 5.0)
def test_cross_entropy(numbers: list[float], cap: float | None) -> None:
    logits = torch.tensor(numbers).repeat(len(numbers), 1)
    targets = torch.arange(len(numbers))
    assert_definition(lambda x: cross_entropies(x, targets, cap), [logits])


@given(st.integers(2, 200), st.sampled_from([0.0, 1e3, -1e4, 1e6, 1e20]), st.integers(0, 100))
def test_cross_entropy_does_not_follow_a_shift(v: int, offset: float, seed: int) -> None:
    logits = torch.randn(7, v, generator=torch.Generator().manual_seed(seed)) + offset
    targets = torch.arange(7) % v
    for actual, expected in zip(
        results(lambda x: cross_entropies(x, targets), [logits], torch.float32),
        results(lambda x: F.cross_entropy(x, targets, reduction="none"), [logits], torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["naive", "blocked", "native", "sdpa"])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_attention_does_not_follow_a_shift_of_scores(backend: str, offset: float) -> None:
    """A key column and a query column that are the same everywhere add the same to every score of a query."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randint(-4, 5, (1, 2, 33, 4), generator=generator).float() for _ in range(3))
    q[..., 3], k[..., 3] = 1.0, 2 * offset  # the scale is 1 / 2: scores are halves, which float32 holds

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen = "naive" if q.dtype == torch.float64 else backend
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = hierarchical_attention([q], [k], v, q.new_ones(2, 1), t=33, backend=chosen)  # type: ignore[arg-type]
        return y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)

    actual, expected = (results(attend, [q, k, v], dtype) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[3], expected[3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-4, atol=1e-4)
