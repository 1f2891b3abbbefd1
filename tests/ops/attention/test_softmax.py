"""Fused softmax attention is its formula, whichever kernel computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.ops.attention.softmax import causal_mask, sdpa_attention, softmax_attention

REQUIRES_KERNELS = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")


def make(b: int, h: int, t: int, e: int, f: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(t)
    return [torch.randn(b, h, t, width, generator=generator) for width in (e, e, f)]


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(~causal_mask(q.shape[2], k.shape[2], None, q.device), -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


def results(attention: Any, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and the gradient of every input, as float64."""
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
    y = attention(*leaves)
    gradients = torch.autograd.grad((y * torch.cos(torch.arange(y.numel())).view(y.shape)).sum(), leaves)
    return [value.detach().double() for value in (y, *gradients)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attention", [softmax_attention, sdpa_attention])
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 200),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([None, 0.3, 1.0]),
)
def test_it_is_its_formula(
    attention: Any, causal: bool, batch_and_heads: tuple[int, int], t: int, e: int, f: int, scale: float | None
) -> None:
    inputs = make(*batch_and_heads, t, e, f)
    found = results(lambda *z: attention(*z, scale=scale, causal=causal), inputs, torch.float32)
    exact = results(lambda *z: formula(*z, scale, causal), inputs, torch.float64)
    for actual, expected in zip(found, exact, strict=True):
        assert (actual - expected).abs().max().item() <= 1e-5 * (1 + expected.abs().max().item())


@REQUIRES_KERNELS
def test_the_compiled_kernel_takes_whole_sequences_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("kmixer.ops.attention.softmax.native_attention", lambda *z, **_: called.append(z) or z[2])
    q, k, v = make(2, 2, 5, 4, 4)
    softmax_attention(q, k, v)
    softmax_attention(q, k, v, reach=5)
    softmax_attention(q, k, v, causal=False)
    assert len(called) == 3
    softmax_attention(q, k, v, reach=4)
    softmax_attention(q[:, :, 2:], k, v)
    softmax_attention(q[:1, :1], k[:1, :1], v[:1, :1])  # no work for a second thread
    softmax_attention(q.double(), k.double(), v.double())
    long = torch.zeros(2, 2, 2049, 2)
    softmax_attention(long, long, long, causal=False)
    assert len(called) == 3


def test_no_later_position_changes_an_earlier_output() -> None:
    q, k, v = make(2, 2, 150, 8, 8)
    y = softmax_attention(q, k, v)
    for tensor in (q, k, v):
        tensor[:, :, 70:] += 1
    assert torch.equal(softmax_attention(q, k, v)[:, :, :70], y[:, :, :70])
