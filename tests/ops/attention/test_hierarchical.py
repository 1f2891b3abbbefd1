"""Laws of hierarchical attention: its formula, its scores as U S U^T, and every gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops import hierarchical_attention
from kmixer.ops.attention import hierarchical_blocked
from kmixer.ops.attention.hierarchical import BACKENDS, MAX_NATIVE_LEVELS, hierarchical_scores
from kmixer.ops.attention.hierarchical_blocked import BLOCK

B, H, E = 2, 2, 4
# The compiled kernel computes in float32 and has a test of its own.
backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "native"])


def make(t: int, levels: int, e: int = E) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t + 1000 * levels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries, keys = ([normal(B, H, -(-t >> level), e) for level in range(levels)] for _ in range(2))
    return queries, keys, normal(B, H, t, e), torch.softmax(normal(H, levels), -1)


def spreading(t: int, level: int) -> Tensor:
    """U (t, ceil(t / 2^l)): every position takes the row of its cell."""
    matrix = torch.zeros(t, -(-t >> level), dtype=torch.float64)
    for i in range(t):
        matrix[i, math.floor(i / 2**level)] = 1
    return matrix


def formula(queries: list[Tensor], keys: list[Tensor], values: Tensor, weights: Tensor, causal: bool) -> Tensor:
    t = values.shape[2]
    scores = torch.zeros(B, H, t, t, dtype=torch.float64)
    for level, (q, k) in enumerate(zip(queries, keys, strict=True)):
        u = spreading(t, level)
        scores += weights[:, level, None, None] * (u @ (q @ k.mT) @ u.T) / math.sqrt(E)
    if causal:
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
    return torch.softmax(scores, -1) @ values


@backends
@pytest.mark.parametrize("causal", [True, False])
@given(st.integers(1, 2 * BLOCK + 9), st.integers(1, 4))
def test_it_is_its_formula(backend: Any, causal: bool, t: int, levels: int) -> None:
    parts = make(t, levels)
    found = hierarchical_attention(*parts, t=t, causal=causal, backend=backend)
    torch.testing.assert_close(found, formula(*parts, causal))


@pytest.mark.parametrize("name", ["blocked", "sdpa"])
@pytest.mark.parametrize("causal", [True, False])
@given(st.integers(1, 2 * BLOCK + 9), st.integers(1, 4))
def test_gradients_are_those_of_the_definition(name: str, causal: bool, t: int, levels: int) -> None:
    def gradients(backend: Any) -> tuple[Tensor, ...]:
        queries, keys, values, weights = make(t, levels)
        leaves = [leaf.requires_grad_() for leaf in (*queries, *keys, values, weights)]
        y = hierarchical_attention(queries, keys, values, weights, t=t, causal=causal, backend=backend)
        return torch.autograd.grad((y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)).sum(), leaves)

    for found, expected in zip(gradients(name), gradients("naive"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")
@pytest.mark.parametrize("causal", [True, False])
@given(st.integers(1, 2 * BLOCK + 9), st.integers(1, MAX_NATIVE_LEVELS), st.integers(1, 20))
def test_the_compiled_kernel_is_the_definition(causal: bool, t: int, levels: int, f: int) -> None:
    assert_the_compiled_kernel_is_the_definition(causal, t, levels, E, f)


@pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("e", [32, 64])
@pytest.mark.parametrize("t", [1, 77, 2 * BLOCK + 9])
def test_the_compiled_kernel_is_the_definition_for_heads_of_models(causal: bool, e: int, t: int) -> None:
    assert_the_compiled_kernel_is_the_definition(causal, t, 3, e, e)


def assert_the_compiled_kernel_is_the_definition(causal: bool, t: int, levels: int, e: int, f: int) -> None:
    """Outputs and every gradient in float32, for heads of width e and values of width f, against float64."""

    def computed(backend: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        queries, keys, _, weights = make(t, levels, e)
        values = torch.cos(torch.arange(B * H * t * f, dtype=torch.float64)).view(B, H, t, f)
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (*queries, *keys, values, weights)]
        taken = leaves[:levels], leaves[levels : 2 * levels], leaves[-2], leaves[-1]
        y = hierarchical_attention(*taken, t=t, causal=causal, backend=backend)
        weighted = y * torch.sin(torch.arange(y.numel(), dtype=dtype)).view_as(y)
        return y.detach(), *torch.autograd.grad(weighted.sum(), leaves)

    exact = computed("naive", torch.float64)
    for found, expected in zip(computed("native", torch.float32), exact, strict=True):
        scale = float(expected.abs().max()) + 0.1
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * scale)


@given(st.integers(1, 60), st.integers(1, 4), st.data())
def test_the_last_queries_alone_give_the_end_of_the_whole(s: int, levels: int, data: st.DataObject) -> None:
    queries, keys, values, weights = make(s, levels)
    t = data.draw(st.integers(1, s))
    last = [q[:, :, (s - t) >> level :] for level, q in enumerate(queries)]
    whole = hierarchical_attention(queries, keys, values, weights, t=s)
    for backend in ("auto", "sdpa"):
        found = hierarchical_attention(last, keys, values, weights, t=t, backend=backend)
        torch.testing.assert_close(found, whole[:, :, s - t :])


@given(st.integers(1, 40), st.integers(1, 4))
def test_positive_semidefinite_levels_make_a_positive_semidefinite_score(t: int, levels: int) -> None:
    queries, _, _, weights = make(t, levels)
    scores = hierarchical_scores(queries, queries, weights, s=t, t=t)
    assert float(torch.linalg.eigvalsh(scores).min()) > -1e-10 * t


def test_one_level_is_softmax_attention_and_so_is_all_weight_on_it() -> None:
    queries, keys, values, _ = make(37, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(queries[0], keys[0], values, is_causal=True)
    one = torch.ones(H, 1, dtype=torch.float64)
    torch.testing.assert_close(hierarchical_attention(queries[:1], keys[:1], values, one, t=37), expected)
    first = torch.tensor([[1.0, 0, 0]] * H, dtype=torch.float64)
    torch.testing.assert_close(hierarchical_attention(queries, keys, values, first, t=37), expected)


def test_the_blocked_form_is_a_well_formed_operator() -> None:
    """Schema, shapes without data, autograd and tracing, as torch.library checks them."""
    queries, keys, values, weights = make(BLOCK + 9, 2)
    for tensor in (*queries, *keys, values, weights):
        tensor.requires_grad_()
    torch.library.opcheck(hierarchical_blocked._forward, (queries, keys, values, weights, True))


def test_derivatives_that_the_blocks_lack_are_refused() -> None:
    queries, keys, values, weights = make(40, 2)

    def total(values: Tensor) -> Tensor:
        return hierarchical_attention(queries, keys, values, weights, t=40, backend="blocked").sin().sum()

    with pytest.raises(InputError, match=r"no derivative in forward mode: .* 'naive' for hierarchical_attention"):
        torch.func.jvp(total, (values,), (values,))
    with pytest.raises(InputError, match=r"for second derivatives use .* 'naive' for hierarchical_attention"):
        torch.autograd.grad(total(values.requires_grad_()), values, create_graph=True)


def test_what_does_not_fit_is_named() -> None:
    queries, keys, values, weights = make(9, 2)
    with pytest.raises(InputError, match="backend: got 'fast'; allowed: auto, naive, blocked, native, sdpa"):
        hierarchical_attention.__wrapped__(queries, keys, values, weights, t=9, backend="fast")
    with pytest.raises(InputError, match=r"backend 'native': it needs the compiled kernels.* and no float64"):
        hierarchical_attention(queries, keys, values, weights, t=9, backend="native")
    last = [queries[0][:, :, 4:], queries[1][:, :, 2:]]
    for backend, why in (
        ("blocked", "'blocked': got 5 queries of 9 positions"),
        ("native", "all positions as queries"),
    ):
        with pytest.raises(InputError, match=why):
            hierarchical_attention(last, keys, values, weights, t=5, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="levels: got 1 of queries, 2 of keys, 2 weights"):
        hierarchical_attention(queries[:1], keys, values, weights, t=9)
    with pytest.raises(InputError, match="level 1: got 4 queries and 5 keys; 9 queries of 9 positions have 5 and 5"):
        hierarchical_attention([queries[0], queries[1][:, :, 1:]], keys, values, weights, t=9)
    with pytest.raises(InputError, match="t: got 10 queries for 9 positions"):
        hierarchical_attention(queries, keys, values, weights, t=10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("t", [1, 77, 300])
def test_on_a_gpu_it_is_the_definition(t: int, dtype: torch.dtype, tolerance: float) -> None:
    def computed(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        queries, keys, values, weights = make(t, 3, 32)
        leaves = [leaf.to(device, dtype).requires_grad_() for leaf in (*queries, *keys, values, weights)]
        y = hierarchical_attention(leaves[:3], leaves[3:6], leaves[6], leaves[7], t=t)
        weighted = y.double() * torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(device)
        return y.detach(), *torch.autograd.grad(weighted.sum(), leaves)

    for found, expected in zip(computed("cuda", dtype), computed("cpu", torch.float64), strict=True):
        scale = float(expected.abs().max()) + 0.1
        torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=tolerance * scale)
