"""Laws of Gaussian kernel attention (section 5 of its specification), over every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer.errors import InputError
from kmixer.ops import gaussian_attention
from kmixer.ops.attention.gaussian import BACKENDS, as_softmax

HEADS, WIDTH = 2, 6
backends = pytest.mark.parametrize("backend", BACKENDS)
fast = pytest.mark.parametrize("backend", ["sdpa", "flex"])
differentiable = ["auto", "naive", "sdpa"]
# Windows (W), with and without the position itself in the count, and self-exclusion.
SEEN: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window": 1},
    {"window": 5},
    {"window": 4, "window_inclusive": True},
    {"exclude_self": True},
    {"window": 3, "exclude_self": True},
]
views = pytest.mark.parametrize("seen", SEEN, ids=str)


def tokens(t: int, b: int = 2, width: int = WIDTH, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, HEADS, t, width, generator=torch.Generator().manual_seed(t), dtype=dtype)


def bandwidths(*sigmas: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([math.log(sigma) for sigma in sigmas], dtype=dtype)


def allowed(i: int, j: int, seen: dict[str, Any]) -> bool:
    """Whether query i may look at key j: the words of the specification, one pair at a time."""
    if not seen.get("causal", True):
        return True
    if seen.get("exclude_self") and i == j:
        return i == 0
    window = seen.get("window", 10**9)
    return j <= i and (i - j <= window if seen.get("window_inclusive") else i - j < window)


def weights(x: Tensor, log_sigma: Tensor, seen: dict[str, Any]) -> Tensor:
    """W (b, h, t, t) from its formula."""
    t = x.shape[2]
    distances = (x[:, :, :, None] - x[:, :, None]).square().sum(-1)
    kernel = torch.exp(-distances / (2 * torch.exp(log_sigma) ** 2)[:, None, None])
    mask = torch.tensor([[allowed(i, j, seen) for j in range(t)] for i in range(t)])
    kernel = kernel * mask
    return kernel / kernel.sum(-1, keepdim=True)


def measured_weights(x: Tensor, log_sigma: Tensor, seen: dict[str, Any], backend: Any) -> Tensor:
    """W as a backend has it: the answer to values that are the rows of the identity."""
    b, h, t, _ = x.shape
    identity = torch.eye(t, dtype=x.dtype).expand(b, h, t, t)
    return gaussian_attention(x, log_sigma, values=identity, backend=backend, **seen)


@backends
@views
@given(st.integers(1, 40))
def test_it_is_its_formula_and_rows_sum_to_one(backend: Any, seen: dict[str, Any], t: int) -> None:
    x, log_sigma = tokens(t), bandwidths(0.8, 2.5)
    expected = weights(x, log_sigma, seen)
    torch.testing.assert_close(gaussian_attention(x, log_sigma, backend=backend, **seen), expected @ x)
    found = measured_weights(x, log_sigma, seen, backend)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert bool((found >= 0).all())
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


@fast
@pytest.mark.parametrize("part", [0.05, 0.3, 1, 5, 20])
def test_in_float32_it_agrees_with_naive(backend: Any, part: float) -> None:
    width = 64
    sigma = part * math.sqrt(width)
    log_sigma = bandwidths(sigma, sigma, dtype=torch.float32)
    plain = tokens(70, width=width, dtype=torch.float32)
    crowded = plain[:, :, :7].repeat(1, 1, 10, 1) + 0.1 * plain
    for x in (plain, crowded):
        for seen in ({}, {"causal": False}, {"window": 9}):
            expected = gaussian_attention(x, log_sigma, backend="naive", **seen)
            found = gaussian_attention(x, log_sigma, backend=backend, **seen)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_softmax_form_has_the_scores_of_the_kernel() -> None:
    x, log_sigma = tokens(9), bandwidths(0.7, 3)
    queries, keys = as_softmax(x, x, log_sigma, causal=False)
    found = torch.softmax(queries @ keys.mT, dim=-1)
    torch.testing.assert_close(found, weights(x, log_sigma, {"causal": False}))
    assert queries.shape[-1] % 8 == 0


@backends
@views
@given(st.integers(1, 30), st.data())
def test_later_tokens_and_those_outside_the_window_change_nothing(
    backend: Any, seen: dict[str, Any], t: int, data: st.DataObject
) -> None:
    x, log_sigma = tokens(t), bandwidths(1, 2)
    place = data.draw(st.integers(0, t - 1))
    changed = x.clone()
    changed[:, :, place] += 1.0
    before, after = (gaussian_attention(z, log_sigma, backend=backend, **seen) for z in (x, changed))
    same = [i for i in range(t) if i != place and not allowed(i, place, seen)]
    exact = 0.0 if backend == "naive" else 1e-12
    torch.testing.assert_close(before[:, :, same], after[:, :, same], rtol=0, atol=exact)


@fast
@pytest.mark.parametrize("seen", [{}, {"window": 6}, {"exclude_self": True}], ids=str)
@pytest.mark.parametrize("place", [1, 7, 30])
def test_a_far_token_rounds_nothing_before_it_otherwise(backend: Any, seen: dict[str, Any], place: int) -> None:
    x, log_sigma = tokens(40, dtype=torch.float32), bandwidths(1, 2, dtype=torch.float32)
    far = x.clone()
    far[:, :, place] *= 1e4
    before, after = (gaussian_attention(z, log_sigma, backend=backend, **seen)[:, :, :place] for z in (x, far))
    assert torch.equal(before, after)


@fast
def test_a_far_first_token_costs_the_others_little(backend: Any) -> None:
    x, log_sigma = tokens(40, dtype=torch.float32), bandwidths(1, 2, dtype=torch.float32)
    x[:, :, 0] *= 20
    found = gaussian_attention(x, log_sigma, backend=backend)
    expected = gaussian_attention(x, log_sigma, backend="naive")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@backends
def test_a_narrow_kernel_copies_and_a_wide_one_averages(backend: Any) -> None:
    x = tokens(12)
    x[:, :, 7] = x[:, :, 3]
    y = gaussian_attention(x, bandwidths(1e-3, 1e-3), causal=False, backend=backend)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-6)
    found = measured_weights(x, bandwidths(1e-3, 1e-3), {"causal": False}, backend)
    torch.testing.assert_close(found[:, :, 3, [3, 7]], torch.full((2, HEADS, 2), 0.5, dtype=torch.float64))
    y = gaussian_attention(x, bandwidths(1e4, 1e4), backend=backend)
    mean = x.cumsum(2) / torch.arange(1, 13, dtype=x.dtype)[:, None]
    torch.testing.assert_close(y, mean, rtol=1e-6, atol=1e-6)


@backends
@views
def test_shifts_rotations_and_scales(backend: Any, seen: dict[str, Any]) -> None:
    x, log_sigma = tokens(21), bandwidths(0.9, 2)
    y = gaussian_attention(x, log_sigma, backend=backend, **seen)

    def again(z: Tensor, sigma: Tensor = log_sigma) -> Tensor:
        return gaussian_attention(z, sigma, backend=backend, **seen)

    torch.testing.assert_close(again(x + 5), y + 5)
    rotation = torch.linalg.qr(tokens(WIDTH)[0, 0]).Q
    torch.testing.assert_close(again(x @ rotation), y @ rotation)
    torch.testing.assert_close(again(3 * x, log_sigma + math.log(3)), 3 * y)


@backends
@views
def test_outputs_are_convex_combinations_of_what_is_seen(backend: Any, seen: dict[str, Any]) -> None:
    x, log_sigma = tokens(21), bandwidths(0.9, 2)
    found = measured_weights(x, log_sigma, seen, backend)
    unseen = torch.tensor([[not allowed(i, j, seen) for j in range(21)] for i in range(21)])
    assert bool((found >= 0).all())
    assert bool((found[:, :, unseen] == 0).all())
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    torch.testing.assert_close(gaussian_attention(x, log_sigma, backend=backend, **seen), found @ x)


@backends
def test_without_a_mask_it_is_a_mean_shift(backend: Any) -> None:
    x, log_sigma = tokens(10), bandwidths(0.8, 1.7)
    y = gaussian_attention(x, log_sigma, causal=False, backend=backend)
    place = x.clone().requires_grad_()
    distances = (place[:, :, :, None] - x[:, :, None]).square().sum(-1)
    sigma = torch.exp(log_sigma)
    density = torch.logsumexp(-distances / (2 * sigma**2)[:, None, None], dim=-1).sum()
    (gradient,) = torch.autograd.grad(density, place)
    torch.testing.assert_close(y - x, (sigma**2)[:, None, None] * gradient)
    values = torch.linalg.eigvals(measured_weights(x, log_sigma, {"causal": False}, backend))
    torch.testing.assert_close(values.imag, torch.zeros_like(values.imag))
    assert bool(((values.real > -1e-9) & (values.real < 1 + 1e-9)).all())
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    shuffled = gaussian_attention(x[:, :, order], log_sigma, causal=False, backend=backend)
    torch.testing.assert_close(shuffled, y[:, :, order])


@pytest.mark.parametrize("backend", differentiable)
@views
def test_the_gradient_of_log_sigma_is_a_covariance(backend: Any, seen: dict[str, Any]) -> None:
    x, log_sigma = tokens(19, b=1), bandwidths(0.8, 1.5).requires_grad_()
    direction = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)
    y = gaussian_attention(x, log_sigma, backend=backend, **seen)
    (found,) = torch.autograd.grad((y * direction).sum(), log_sigma)
    w = weights(x, log_sigma.detach(), seen)
    squared = (x[:, :, :, None] - x[:, :, None]).square().sum(-1)
    centred = squared - (w * squared).sum(-1, keepdim=True)
    covariance = (w * centred) @ x / torch.exp(2 * log_sigma.detach())[:, None, None]
    torch.testing.assert_close(found, (covariance * direction).sum((0, 2, 3)))


@pytest.mark.parametrize("backend", differentiable)
@views
@given(st.integers(1, 30))
def test_gradients_are_those_of_naive(backend: Any, seen: dict[str, Any], t: int) -> None:
    def gradients(name: Any) -> tuple[Tensor, ...]:
        leaves = [leaf.requires_grad_() for leaf in (tokens(t), bandwidths(0.8, 1.5), tokens(t, width=4))]
        y = gaussian_attention(leaves[0], leaves[1], values=leaves[2], backend=name, **seen)
        weighted = y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
        return torch.autograd.grad(weighted.sum(), leaves, materialize_grads=True)

    for found, expected in zip(gradients(backend), gradients("naive"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
def test_gradcheck(backend: Any) -> None:
    leaves = [leaf.requires_grad_() for leaf in (tokens(18, b=1), bandwidths(0.8, 1.5))]
    assert torch.autograd.gradcheck(lambda x, s: gaussian_attention(x, s, window=3, backend=backend), leaves)


@backends
@views
@given(st.integers(1, 25), st.data())
def test_kept_keys_give_what_the_whole_gives(backend: Any, seen: dict[str, Any], t: int, data: st.DataObject) -> None:
    if not seen.get("causal", True):
        return
    x, log_sigma = tokens(t), bandwidths(0.8, 1.5)
    whole = gaussian_attention(x, log_sigma, backend=backend, **seen)
    past = data.draw(st.integers(0, t - 1))
    reach = seen["window"] + seen.get("window_inclusive", False) - 1 if "window" in seen else past
    rest = gaussian_attention(x[:, :, past:], log_sigma, keys=x[:, :, max(0, past - reach) :], backend=backend, **seen)
    torch.testing.assert_close(rest, whole[:, :, past:])


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [1e-3, 0.1, 8, 1e3])
def test_low_precision_masks_exactly_and_never_gives_nan(backend: Any, dtype: torch.dtype, sigma: float) -> None:
    x, log_sigma = tokens(20, width=64).to(dtype), bandwidths(sigma, sigma, dtype=torch.float32)
    values = torch.ones_like(x)
    values[:, :, 10:] = torch.finfo(dtype).max / 16
    y = gaussian_attention(x, log_sigma, values=values, backend=backend)
    assert y.dtype == dtype
    assert bool(torch.isfinite(y).all())
    torch.testing.assert_close(y[:, :, :10], values[:, :, :10], rtol=0.02, atol=0)
    expected = gaussian_attention(x.double(), log_sigma.double(), backend="naive")
    if sigma >= 8:
        torch.testing.assert_close(
            gaussian_attention(x, log_sigma, backend=backend).double(), expected, rtol=0, atol=0.05
        )


def test_no_positions_give_no_positions() -> None:
    assert gaussian_attention(tokens(0), bandwidths(1, 1)).shape == (2, HEADS, 0, WIDTH)
    assert gaussian_attention(tokens(0), bandwidths(1, 1), values=tokens(0, width=4)).shape == (2, HEADS, 0, 4)


def test_what_cannot_be_asked_is_named() -> None:
    x, log_sigma = tokens(4), bandwidths(1, 1)
    with pytest.raises(InputError, match=r"backend: got 'fast'; allowed: auto, naive, sdpa, flex"):
        gaussian_attention.__wrapped__(x, log_sigma, backend="fast")
    with pytest.raises(InputError, match="window and exclude_self go with causal=True"):
        gaussian_attention(x, log_sigma, causal=False, window=3)
    with pytest.raises(InputError, match="window: got 1; it leaves a position nothing to see"):
        gaussian_attention(x, log_sigma, window=1, exclude_self=True)
    with pytest.raises(InputError, match="FlexAttention has no gradient on a CPU; allowed there: sdpa, naive"):
        gaussian_attention(x, log_sigma.requires_grad_(), backend="flex")
    with pytest.raises(InputError, match="got 2 and 2 positions for 4 queries"):
        gaussian_attention(x, log_sigma, keys=x[:, :, :2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex"])
@pytest.mark.parametrize("window", [None, 40])
def test_on_a_gpu_it_is_the_definition(backend: Any, window: int | None) -> None:
    def computed(device: str, dtype: torch.dtype, backend: Any) -> tuple[Tensor, ...]:
        x = torch.sin(torch.arange(2 * 2 * 150 * 32, dtype=torch.float64).square()).view(2, 2, 150, 32)
        leaves = [leaf.detach().to(device, dtype).requires_grad_() for leaf in (x, bandwidths(2.0, 5.0))]
        y = gaussian_attention(leaves[0], leaves[1], window=window, backend=backend)
        weighted = y * torch.cos(torch.arange(y.numel(), device=device)).view_as(y)
        return y.detach(), *torch.autograd.grad(weighted.sum(), leaves)

    exact = computed("cpu", torch.float64, "naive")
    for found, expected in zip(computed("cuda", torch.float32, backend), exact, strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
