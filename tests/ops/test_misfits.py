"""Tensors that do not fit each other reach no compiled kernel, and what a kernel is given need not be contiguous."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kmixer.errors import InputError
from kmixer.layers import K0, K1, K2, GaussianAttention, HierarchicalAttention, SoftmaxAttention
from kmixer.layers.depthwise_convolution import DepthwiseConvolution
from kmixer.ops import hierarchical_attention
from kmixer.ops.attention.softmax import softmax_attention
from kmixer.ops.base_kernel import base_kernel
from kmixer.ops.cross_entropy import cross_entropies
from kmixer.ops.downsampling import filter_and_halve
from kmixer.ops.feed_forward import feed_forward, hidden_units
from kmixer.ops.fused import dropout, linear_dropout_add, linear_gelu_dropout, rms_norm, silu_gate
from kmixer.ops.linear import linear_map

pytestmark = pytest.mark.usefixtures("unchecked")


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize(
    "layer",
    [K0(16), K1(16), K2(16, 3), SoftmaxAttention(16, 2), GaussianAttention(16, 2), HierarchicalAttention(16, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_refuse_another_width(layer: torch.nn.Module, width: int) -> None:
    with pytest.raises((RuntimeError, InputError)):
        layer(ones(2, 5, width))


MISFITS: dict[str, Callable[[], object]] = {
    "linear map": lambda: linear_map(ones(4, 3), ones(2, 6)),
    "bias of a linear map": lambda: linear_map(ones(4, 3), ones(2, 3), ones(3)),
    "norm": lambda: rms_norm(ones(2, 5, 16), ones(3), 1e-8),
    "bias before GELU": lambda: linear_gelu_dropout(ones(4, 3), ones(2, 3), ones(3), 0.0),
    "bias before a sum": lambda: linear_dropout_add(ones(4, 2), ones(4, 3), ones(2, 3), ones(3), 0.0),
    "feed-forward": lambda: feed_forward(ones(4, 6), None, ones(8, 3), None, ones(3, 8), None, eps=1e-8, dropout=0.0),
    "hidden units": lambda: hidden_units(ones(4, 6), ones(8, 3), ones(8), dropout=0.0),
    "bias of hidden units": lambda: hidden_units(ones(4, 3), ones(8, 3), ones(3), dropout=0.0),
    "targets": lambda: cross_entropies(ones(4, 7), torch.zeros(6, dtype=torch.int64)),
    "softmax attention": lambda: softmax_attention(ones(2, 4, 9, 8), ones(2, 4, 9, 4), ones(2, 4, 9, 4)),
}


@pytest.mark.parametrize("call", MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_refused_as_torch_does(call: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        call()


def test_what_torch_broadcasts_is_broadcast() -> None:
    x, gate = torch.randn(4, 6), torch.randn(1, 6)
    torch.testing.assert_close(silu_gate(x, gate), x * F.silu(gate))
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 1, 9, 8)
    torch.testing.assert_close(softmax_attention(q, k, k), softmax_attention(q, *[k.expand_as(q).contiguous()] * 2))


def test_levels_of_other_shapes_are_named() -> None:
    def attend(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        return hierarchical_attention([q], [k], ones(2, 4, 9, 8), weights, t=9)

    q, weights = ones(2, 4, 9, 8), ones(4, 1)
    with pytest.raises(InputError, match=r"level 0: got keys \(1, 4, 8\); allowed: \(2, 4, 8\)"):
        attend(q, q[:1], weights)
    with pytest.raises(InputError, match=r"level 0: got keys \(2, 1, 8\)"):
        attend(q, q[:, :1], weights)
    with pytest.raises(InputError, match=r"level 0: got keys \(2, 4, 4\)"):
        attend(q, q[..., :4], weights)
    with pytest.raises(InputError, match=r"weights: got \(1, 1\); allowed: \(4, 1\)"):
        attend(q, q, weights[:1])


def test_filters_and_kernels_say_what_they_need() -> None:
    with pytest.raises(InputError, match="downsampling: got 3 rows for a filter of 4"):
        filter_and_halve(ones(8, 0, 16), ones(8, 3, 16), ones(16, 4))
    with pytest.raises(InputError, match=r"the dense base kernel: got \(8, 4\); it is square"):
        base_kernel(ones(1, 6, 16), (ones(8, 4),), kind="dense")
    with pytest.raises(InputError, match="state: got 1 inputs; a filter of 4 lags keeps 3"):
        base_kernel(ones(1, 6, 16), (ones(4),), kind="conv", state=ones(1, 1, 16))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SoftmaxAttention(8, 0),
        lambda: HierarchicalAttention(8, -1),
        lambda: SoftmaxAttention(8, 2, convolution=0),
        lambda: K2(8, 0),
        lambda: K2(8, 2, decay_init="lin"),  # type: ignore[arg-type]
        lambda: HierarchicalAttention(8, 2, levels=2, fixed_weights=(float("nan"), 1.0)),
        lambda: SoftmaxAttention(8, 2, value_embedding=True)(ones(1, 3, 8)),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        make()


def test_parameters_may_lie_apart() -> None:
    torch.manual_seed(0)
    x, wide, bias, up = torch.randn(5, 8), torch.randn(16), torch.randn(24)[::2], torch.randn(12, 8)
    norm = wide[::2]
    torch.testing.assert_close(rms_norm(x, norm, 1e-8), F.rms_norm(x, (8,), norm, 1e-8))
    expected = F.gelu(F.linear(x, up, bias))
    torch.testing.assert_close(linear_gelu_dropout(x, up, bias, 0.0), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden_units(x, up, bias, dropout=0.0), expected, atol=1e-5, rtol=1e-5)
    arguments = (norm, up, bias, torch.randn(8, 12), torch.randn(16)[::2])
    whole = feed_forward(x, *(each.contiguous() for each in arguments), eps=1e-8, dropout=0.0)
    torch.testing.assert_close(feed_forward(x, *arguments, eps=1e-8, dropout=0.0), whole)


def test_a_whole_number_caps_as_its_fraction_does() -> None:
    logits = (10 * torch.randn(3, 7)).requires_grad_()
    targets = torch.tensor([0, 3, 6])
    whole, exact = cross_entropies(logits, targets, 15), cross_entropies(logits, targets, 15.0)
    assert torch.equal(whole, exact)
    assert torch.autograd.grad(whole.sum(), logits)[0].abs().sum() > 0


def test_where_all_is_dropped_nothing_is_left() -> None:
    assert not dropout(ones(4, 4), 1.0).any()


def test_hierarchical_attention_can_be_checkpointed() -> None:
    torch.manual_seed(0)
    layer, x = HierarchicalAttention(24, 3, levels=3), torch.randn(2, 9, 24, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    y = checkpoint(lambda z: layer(z)[0], x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "layer",
    [
        GaussianAttention(16, 2, value_source="pre_rope", head_norm=False).double(),
        GaussianAttention(16, 2, rotary=False, head_norm=False).double(),
        SoftmaxAttention(16, 2, value_projection=False).double(),
        lambda x, state: base_kernel(x, (torch.eye(8).double(),), kind="dense", state=state),
        lambda x, state: base_kernel(x[..., :16].float(), (torch.ones(8, 8),), kind="dense", state=state),
    ],
)
def test_a_caller_may_fill_the_same_memory_with_the_next_inputs(
    layer: Callable[[Tensor, object], tuple[Tensor, object]],
) -> None:
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    _, state = layer(x[:, :4].clone(), None)
    expected, _ = layer(x[:, 4:].clone(), state)
    buffer = x[:, :4].clone()
    _, state = layer(buffer, None)
    buffer.copy_(x[:, 4:])
    torch.testing.assert_close(layer(buffer, state)[0], expected, atol=0, rtol=0)


@torch.no_grad()
def test_states_of_a_window_hold_no_more_memory_than_it() -> None:
    x = torch.randn(1, 400, 16)
    _, windowed = SoftmaxAttention(16, 2, window=8)(x)
    _, tail = DepthwiseConvolution(16, 3, ones(3))(x, torch.zeros(1, 2, 16))
    _, levels = HierarchicalAttention(16, 2)(x)
    for tensor in (windowed.keys, windowed.values, tail, *levels.query, *levels.tails):
        assert tensor.untyped_storage().nbytes() <= 8 * 16 * 4
