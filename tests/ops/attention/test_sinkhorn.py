"""Laws of Sinkhorn's normalisation, and of attention with it by every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.ops import sinkhorn, sinkhorn_attention
from kmixer.ops.attention import sinkhorn_blocked
from kmixer.ops.attention.sinkhorn import BACKENDS, column_residual
from kmixer.ops.attention.sinkhorn_converged import MAX_HALF_STEPS

B, H, E = 2, 2, 4
ODD = st.sampled_from([1, 3, 5, 21])
compiled = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")


def logits(t: int, s: int | None = None, deviation: float = 2.0, seed: int = 0) -> Tensor:
    return deviation * torch.randn(t, s or t, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(t: int, e: int = E, f: int = E, deviation: float = 1.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(t)
    widths = (e, e, f)
    return [deviation * torch.randn(B, H, t, width, generator=generator, dtype=torch.float64) for width in widths]


def drawn_mask(t: int, seed: int) -> Tensor:
    """Some positions of every row, one at least."""
    mask = torch.rand(B, t, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[:, seed % t] = True
    return mask


def computed(backend: Any, dtype: torch.dtype, tensors: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Outputs, and the gradients of a weighted sum of them."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    y = sinkhorn_attention(*leaves, backend=backend, **options)
    weighted = y * torch.sin(torch.arange(y.numel(), dtype=dtype)).view_as(y)
    return y.detach(), *torch.autograd.grad(weighted.sum(), leaves)


def assert_near(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(found, exact, strict=True):
        scale = float(other.abs().max()) + 0.1
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * scale)


# The laws of the iteration.


@given(st.integers(1, 40), st.integers(1, 40))
def test_one_half_step_is_softmax(t: int, s: int) -> None:
    scores = logits(t, s)
    torch.testing.assert_close(sinkhorn(scores, 1), torch.softmax(scores, -1), rtol=0, atol=1e-14)
    q, k, v = make(t)
    expected = F.scaled_dot_product_attention(q, k, v)
    for backend in ("auto", "naive", "blocked"):
        torch.testing.assert_close(sinkhorn_attention(q, k, v, iterations=1, backend=backend), expected)  # type: ignore[arg-type]


@given(st.integers(1, 40), ODD, st.sampled_from([0.5, 2.0, 8.0]))
def test_rows_add_to_one_after_any_number_of_half_steps(t: int, iterations: int, deviation: float) -> None:
    sums = sinkhorn(logits(t, deviation=deviation), iterations).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-13)


def test_columns_come_to_add_to_one() -> None:
    residuals = [float(column_residual(sinkhorn(logits(64), n))) for n in (3, 5, 21, 51, 201)]
    assert residuals == sorted(residuals, reverse=True)
    assert all(found < most for found, most in zip(residuals, (0.8, 0.3, 2e-3, 1e-6, 1e-13), strict=True))
    assert residuals[1] > 0.01  # after five half-steps W is not doubly stochastic


def test_they_come_slower_for_larger_scores() -> None:
    residuals = [float(column_residual(sinkhorn(logits(64, deviation=d), 5))) for d in (1.0, 2.0, 4.0, 8.0)]
    assert residuals == sorted(residuals)
    assert residuals[0] < 0.02 < 0.3 < residuals[-1]


@given(st.integers(2, 20), ODD)
def test_what_is_added_to_a_row_changes_nothing_and_to_a_column_nothing_in_the_limit(t: int, iterations: int) -> None:
    scores, more = logits(t), logits(t, 1, seed=1)
    torch.testing.assert_close(sinkhorn(scores + more, iterations), sinkhorn(scores, iterations))
    limit = sinkhorn(logits(t, deviation=1.0), 401)
    torch.testing.assert_close(sinkhorn(logits(t, deviation=1.0) + more.T, 401), limit, rtol=0, atol=1e-12)


def test_before_the_limit_what_is_added_to_a_column_counts() -> None:
    scores, more = logits(16), logits(16, 1, seed=1)
    assert (sinkhorn(scores + more.T, 5) - sinkhorn(scores, 5)).abs().max() > 1e-3


@given(st.integers(1, 30), ODD)
def test_positions_in_another_order_give_the_same_in_that_order(t: int, iterations: int) -> None:
    scores, order = logits(t), torch.randperm(t, generator=torch.Generator().manual_seed(t))
    expected = sinkhorn(scores, iterations)[order][:, order]
    torch.testing.assert_close(sinkhorn(scores[order][:, order], iterations), expected)


def test_in_the_limit_it_is_symmetric_in_rows_and_columns_and_keeps_the_mean() -> None:
    scores, values = logits(20), logits(20, 3, seed=1)
    weights = sinkhorn(scores, 401)
    torch.testing.assert_close(sinkhorn(scores.T, 401), weights.T, rtol=0, atol=1e-12)
    torch.testing.assert_close((weights @ values).mean(0), values.mean(0), rtol=0, atol=1e-13)


def test_one_position_sees_itself_and_equal_keys_are_seen_alike() -> None:
    assert float(sinkhorn(torch.tensor([[3.0]]), 5)) == 1.0
    q, k, v = make(7)
    y = sinkhorn_attention(q, k[:, :, :1].expand_as(k), v)
    torch.testing.assert_close(y, v.mean(2, keepdim=True).expand_as(y))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "native" or native.kernels() is not None])
@pytest.mark.parametrize("deviation", [20.0, 60.0])
def test_large_scores_give_finite_numbers_and_rows_that_add_to_one(backend: Any, deviation: float) -> None:
    """Scores of deviation 20 and far beyond: sums over columns that leave float32's range are made again."""
    q, k, _ = make(64, e=1, deviation=deviation**0.5)
    ones = torch.ones(B, H, 64, 1, dtype=torch.float64)
    y, *gradients = computed(backend, torch.float32, [q, k, ones], scale=1.0)
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=1e-6)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    y = computed(backend, torch.float32, make(64, deviation=5.0))[0]
    exact = computed("naive", torch.float64, make(64, deviation=5.0))[0]
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-3)


@given(st.integers(1, 30), st.sampled_from([3, 5]))
def test_it_is_softmax_attention_with_a_bias_for_every_key(t: int, iterations: int) -> None:
    """W = softmax(S + g): one more feature of queries and keys, and any fused attention computes the output."""
    q, k, v = make(t)
    scores = q @ k.mT / math.sqrt(E)
    weights = sinkhorn(scores, iterations)
    bias = (weights / scores.exp()).log()[:, :, :1]  # f_1 + g_j
    wide_q = torch.cat([q / math.sqrt(E), torch.ones_like(q[..., :1])], -1)
    wide_k = torch.cat([k, bias.mT], -1)
    expected = F.scaled_dot_product_attention(wide_q, wide_k, v, scale=1.0)
    torch.testing.assert_close(sinkhorn_attention(q, k, v, iterations=iterations), expected)


@given(st.integers(1, 12), st.integers(1, 12))
def test_other_sums_of_rows_and_columns(t: int, s: int) -> None:
    rows, columns = torch.softmax(logits(t, 1)[:, 0], 0), torch.softmax(logits(s, 1, seed=1)[:, 0], 0)
    weights = sinkhorn(logits(t, s, 1.0), 401, rows.log(), columns.log())
    torch.testing.assert_close(weights.sum(-1), rows)
    torch.testing.assert_close(weights.sum(-2), columns)
    shifted = sinkhorn(logits(t, s, 1.0), 5, columns=torch.full((s,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(shifted, sinkhorn(logits(t, s, 1.0), 5))


def test_a_later_query_changes_an_earlier_row_and_a_causal_mask_leads_to_the_identity() -> None:
    """Why there is no causal form."""
    scores, changed = logits(16, deviation=1.0), logits(16, deviation=1.0)
    changed[-1] += logits(1, 16, seed=1)[0]
    assert torch.equal(sinkhorn(scores, 1)[0], sinkhorn(changed, 1)[0])
    assert (sinkhorn(scores, 3)[0] - sinkhorn(changed, 3)[0]).abs().max() > 1e-4
    masked = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
    distances = [float((sinkhorn(masked, n) - torch.eye(16)).abs().max()) for n in (5, 51, 501, 4001)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.5 and distances[-1] < 0.05


# Attention, by every backend.


@settings(max_examples=15)
@given(st.integers(1, 70), ODD, st.integers(1, 9), st.none() | st.integers(0, 1000))
def test_blocks_are_the_definition(t: int, iterations: int, f: int, seed: int | None) -> None:
    options = {"iterations": iterations, "mask": None if seed is None else drawn_mask(t, seed)}
    exact = computed("naive", torch.float64, make(t, f=f), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinkhorn_blocked, "BLOCK_NUMBERS", 700)  # several heads at once, and a few rows of one
        found = computed("blocked", torch.float64, make(t, f=f), **options)
    assert_near(found, exact, 1e-10)
    assert_near(computed("blocked", torch.float32, make(t, f=f), **options), exact, 1e-4)


@compiled
@settings(max_examples=20)
@given(st.integers(1, 120), ODD, st.integers(1, 9), st.none() | st.integers(0, 1000))
def test_the_compiled_kernel_is_the_definition(t: int, iterations: int, f: int, seed: int | None) -> None:
    options = {"iterations": iterations, "mask": None if seed is None else drawn_mask(t, seed)}
    exact = computed("naive", torch.float64, make(t, f=f), **options)
    assert_near(computed("native", torch.float32, make(t, f=f), **options), exact, 1e-4)


@compiled
@pytest.mark.parametrize("e", [32, 64])
@pytest.mark.parametrize("t", [1, 97, 301, 777])
def test_the_compiled_kernel_is_the_definition_for_heads_of_models(e: int, t: int) -> None:
    exact = computed("naive", torch.float64, make(t, e, e, 1.0))
    assert_near(computed("native", torch.float32, make(t, e, e, 1.0)), exact, 5e-5)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "native" or native.kernels() is not None])
@given(st.integers(1, 20), ODD, st.integers(0, 1000))
def test_padded_rows_are_as_they_are_alone(backend: Any, t: int, iterations: int, seed: int) -> None:
    """Whatever stands at positions that do not count, which may be in the middle; their own output is 0."""
    dtype = torch.float32 if backend == "native" else torch.float64
    tensors, mask = [tensor.to(dtype) for tensor in make(t)], drawn_mask(t, seed)
    y = sinkhorn_attention(*tensors, iterations=iterations, mask=mask, backend=backend)
    assert bool((y.transpose(1, 2)[~mask] == 0).all())
    for row in range(B):
        alone = [tensor[row : row + 1, :, mask[row]] for tensor in tensors]
        expected = sinkhorn_attention(*alone, iterations=iterations, backend=backend)
        tolerance = 1e-4 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(y[row : row + 1, :, mask[row]], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["naive", "blocked"])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_the_derivatives(backend: Any, padded: bool) -> None:
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]]) if padded else None
    leaves = [tensor[:, :1].requires_grad_() for tensor in make(5, 2, 3)]
    assert torch.autograd.gradcheck(lambda *qkv: sinkhorn_attention(*qkv, mask=mask, backend=backend), leaves)


def test_the_definition_has_second_derivatives() -> None:
    leaves = [tensor[:1, :1].requires_grad_() for tensor in make(3, 2, 2)]
    assert torch.autograd.gradgradcheck(lambda *qkv: sinkhorn_attention(*qkv, iterations=3, backend="naive"), leaves)
    scores = logits(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sinkhorn(s.masked_fill(torch.eye(3, 4) == 1, -torch.inf), 5), scores)


@pytest.mark.parametrize("padded", [False, True])
def test_carried_on_to_the_limit_it_has_the_gradient_of_the_limit(padded: bool) -> None:
    mask = torch.tensor([[True] * 9, [True] * 5 + [False] * 4]) if padded else None
    found = computed("auto", torch.float64, make(9, deviation=1.0), tolerance=1e-14, mask=mask)
    exact = computed("naive", torch.float64, make(9, deviation=1.0), iterations=MAX_HALF_STEPS, mask=mask)
    assert_near(found, exact, 1e-10)


def test_five_half_steps_have_nearly_the_gradient_of_the_limit() -> None:
    unrolled, limit = (
        computed("naive", torch.float64, make(16, deviation=1.0), **options)[1]
        for options in ({"iterations": 5}, {"tolerance": 1e-14})
    )
    distance = float((unrolled - limit).norm() / limit.norm())
    assert 1e-6 < distance < 0.1


def test_a_tolerance_stops_where_it_is_kept() -> None:
    q, k, _ = make(12, deviation=1.0)
    identity = torch.eye(12, dtype=torch.float64).expand(B, H, 12, 12)
    weights = sinkhorn_attention(q, k, identity, tolerance=0.01)
    assert float(column_residual(weights).max()) <= 0.01
    assert float(column_residual(weights).max()) > 1e-9


@pytest.mark.parametrize("backend", ["naive", "blocked", "auto"])
def test_bfloat16_is_near(backend: Any) -> None:
    tensors = [tensor.bfloat16() for tensor in make(40, deviation=1.0)]
    exact = sinkhorn_attention(*(tensor.double() for tensor in tensors), backend="naive")
    y = sinkhorn_attention(*tensors, backend=backend)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)


def test_no_position_gives_none() -> None:
    assert sinkhorn_attention(*make(0, f=3)).shape == (B, H, 0, 3)


def test_the_blocked_form_is_a_well_formed_operator() -> None:
    """Schema, shapes without data, autograd and tracing, as torch.library checks them."""
    q, k, v = (tensor.flatten(0, 1).requires_grad_() for tensor in make(9))
    torch.library.opcheck(sinkhorn_blocked._forward, (q, k, v, None, 3, 0.5))


def test_derivatives_that_the_backends_lack_are_refused() -> None:
    q, k, v = make(8)

    def total(values: Tensor, backend: Any = "blocked", **options: Any) -> Tensor:
        return sinkhorn_attention(q, k, values, backend=backend, **options).sin().sum()

    with pytest.raises(InputError, match=r"no derivative in forward mode: .* and sinkhorn_attention"):
        torch.func.jvp(total, (v,), (v,))
    with pytest.raises(InputError, match=r"tolerance has no part in torch.func"):
        torch.func.grad(lambda values: total(values, "auto", tolerance=0.1))(v)
    with pytest.raises(InputError, match=r"for second derivatives use .* 'naive' for"):
        torch.autograd.grad(total(v.requires_grad_()), v, create_graph=True)
    if native.kernels() is not None:
        q, k, v = (tensor.detach().float() for tensor in (q, k, v))
        with pytest.raises(InputError, match="for second derivatives use"):
            torch.autograd.grad(total(v.requires_grad_(), "native"), v, create_graph=True)


def test_what_does_not_fit_is_named() -> None:
    q, k, v = make(6)
    for iterations in (0, 2, -1):
        with pytest.raises(InputError, match=f"iterations: got {iterations}; allowed: an odd number, 1 or more"):
            sinkhorn_attention(q, k, v, iterations=iterations)
        with pytest.raises(InputError, match=f"iterations: got {iterations}"):
            sinkhorn(logits(3), iterations)
    with pytest.raises(InputError, match="backend: got 'fast'; allowed: auto, naive, blocked, native"):
        sinkhorn_attention.__wrapped__(q, k, v, backend="fast")
    with pytest.raises(InputError, match=r"backend 'native': it needs the compiled kernels.* and no float64"):
        sinkhorn_attention(q, k, v, backend="native")
    with pytest.raises(InputError, match="they are of the same positions"):
        sinkhorn_attention.__wrapped__(q, k[:, :, :5], v)
    with pytest.raises(InputError, match=r"mask: got \(2, 6\) in torch.float64; allowed: \(2, 6\) in torch.bool"):
        sinkhorn_attention.__wrapped__(q, k, v, mask=torch.ones(2, 6, dtype=torch.float64))
