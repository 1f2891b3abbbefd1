"""Decay and filter in one operator: the sum of both, each by its definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.layers import BaseKernel
from kmixer.layers.k_operators import K2Mixer
from kmixer.ops.base_kernel import base_kernel
from kmixer.ops.decay.recurrence import decayed_linear_attention
from kmixer.ops.mixing import decayed_and_filtered, mixes

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")


def by_definition(
    q: Tensor, k: Tensor, x: Tensor, log_decay: Tensor, lags: Tensor, state: Tensor, history: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    y, after = decayed_linear_attention(q, k, x, log_decay, state=state, backend="recurrent")
    base, kept = base_kernel(x, (lags,), kind="conv", state=history)
    assert isinstance(kept, Tensor)
    return y + base, after, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.integers(1, 3), st.integers(2, 70), st.integers(1, 9), st.integers(1, 70), st.integers(1, 12))
def test_it_is_the_sum_of_both(dtype: torch.dtype, b: int, t: int, r: int, d: int, n: int) -> None:
    """Sum, both states, and the gradients of everything through all three."""
    generator = torch.Generator().manual_seed(t)
    shapes = ((b, t, r), (b, t, r), (b, t, d), (r,), (n,), (b, r, d), (b, n - 1, d))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[3] = -inputs[3].abs()
    results = []
    for function, of in ((decayed_and_filtered, dtype), (by_definition, torch.float64)):
        # Inputs and history in the dtype of the stream, rounded to it in both; all else is float32.
        leaves = [x.to(dtype) if i in (2, 6) else x for i, x in enumerate(inputs)]
        leaves = [(x.double() if of == torch.float64 else x).clone().requires_grad_() for x in leaves]
        y, state, history = function(*leaves)
        assert (y.dtype, state.dtype == torch.float64) == (of, of == torch.float64)
        weigh = [torch.cos(torch.arange(z.numel())).view(z.shape).to(dtype).to(z.dtype) for z in (y, state, history)]
        torch.autograd.backward([y, state, history], weigh)
        results.append([y.detach(), state.detach(), history.detach(), *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results, strict=True):
        if expected.numel():
            # Rounded once more than in float32: what the decay path gives, to which the filter is added.
            unit = 2.0**-7 if actual.dtype == torch.bfloat16 else 1e-5
            terms = 1.0 if actual.dtype == torch.bfloat16 else 10.0 * t  # of sums that may cancel
            assert (actual - expected).abs().max() <= unit * (terms + expected.abs().max())


def make_mixer(kind: str = "conv", dtype: torch.dtype = torch.float32) -> K2Mixer:
    torch.manual_seed(0)
    return K2Mixer(12, 3, base_kernel=BaseKernel(kind, 5)).to(dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["conv", "toeplitz"])
def test_a_layer_mixes_by_it_what_its_branches_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = make_mixer(kind), torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(K2Mixer, "branches", None)  # which is not asked
    whole, _ = mixer.mix(x)
    first, state = mixer.mix(x[:, :7])
    second, state = mixer.mix(x[:, 7:], state)
    monkeypatch.undo()
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    decay, base, after = mixer.branches(x)
    assert base is not None
    torch.testing.assert_close(whole, decay + base)
    torch.testing.assert_close(state, after)


def test_what_it_does_not_know_goes_the_plain_way() -> None:
    x, mixer = torch.randn(2, 9, 12), make_mixer()
    weights = (mixer.query, mixer.key)
    lags = mixer.base_kernel.weights[0]
    state, history = mixer.initial_state(2)

    assert mixes(x, weights, lags, 3, None, None)
    assert mixes(x, weights, lags, 3, state, history)
    assert not mixes(x[:, :1], weights, lags, 3, None, None)
    assert not mixes(x[:, :0], weights, lags, 3, None, None)
    assert not mixes(x.double(), weights, lags, 3, None, None)
    assert not mixes(x, weights, lags, 3, state.double(), None)
    assert not mixes(x, weights, lags, 3, state, history[:, 1:])
    assert not mixes(x, weights, lags, 3, state[:1], history)
    assert not mixes(x, weights, torch.ones(100), 3, None, None)
    with torch.autocast("cpu", torch.float16):
        assert not mixes(x, weights, lags, 3, None, None)
    torch.func.vmap(lambda row: mixer(row[None])[0])(x)
