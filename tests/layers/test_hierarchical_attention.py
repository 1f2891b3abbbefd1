"""Downsampling and the hierarchical layer; the laws of every mixer are in tests/models/test_mixers.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.layers import HierarchicalAttention, SoftmaxAttention
from kmixer.layers.heads import split_heads
from kmixer.layers.hierarchical_attention import Downsample
from kmixer.models.flops import operations
from kmixer.models.mixers.card import Place
from kmixer.models.mixers.choice import MixersConfig, build_mixer
from kmixer.models.mixers.cost import linear_operations
from kmixer.ops import hierarchical_attention

WIDTH = 8


def inputs(t: int) -> Tensor:
    return torch.randn(2, t, WIDTH, generator=torch.Generator().manual_seed(t), dtype=torch.float64)


def tail(taps: int) -> Tensor:
    return torch.zeros(2, taps - 1, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["depthwise", "dense", "average"])
@pytest.mark.parametrize("t", [1, 2, 7, 8])
def test_it_starts_as_the_average_of_what_came_before(kind: Any, t: int) -> None:
    x, taps = inputs(t), 3
    found = Downsample(WIDTH, taps, kind).double()(x, tail(taps), 0)
    assert found.shape == (2, (t + 1) // 2, WIDTH)
    for k in range(found.shape[1]):
        expected = sum(x[:, 2 * k - r] for r in range(taps) if 2 * k - r >= 0) / taps
        torch.testing.assert_close(found[:, k], expected)


def test_the_identity_keeps_every_second_row() -> None:
    module = Downsample(WIDTH, 4, "depthwise").double()
    with torch.no_grad():
        assert module.filter is not None
        module.filter.copy_(torch.eye(4)[0].expand(WIDTH, 4))
    torch.testing.assert_close(module(inputs(9), tail(4), 0), inputs(9)[:, ::2])


def test_dense_downsampling_is_its_formula() -> None:
    torch.manual_seed(0)
    x, taps = inputs(9), 3
    module = Downsample(WIDTH, taps, "dense").double()
    assert module.matrices is not None
    torch.nn.init.normal_(module.matrices)
    found = module(x, tail(taps), 0)
    for k in range(5):
        expected = sum(x[:, 2 * k - r] @ module.matrices[r] for r in range(taps) if 2 * k - r >= 0)
        torch.testing.assert_close(found[:, k], expected)


def test_its_gradient_is_right() -> None:
    module = Downsample(WIDTH, 3, "depthwise").double()
    assert torch.autograd.gradcheck(lambda x: module(x, tail(3), 0), [inputs(5).requires_grad_()])


@pytest.mark.parametrize("t", [9, 16, 23])
def test_a_level_anchored_to_the_right_leaks(t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a row that holds the end of its cell shows later positions to earlier ones."""
    torch.manual_seed(0)
    layer = HierarchicalAttention(WIDTH, 2, levels=3).double()
    for parameter in layer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.7)
    place = t // 2 * 2 - 1  # the second position of a cell

    def change_before(x: Tensor) -> float:
        changed = x.clone()
        changed[:, place] += 1
        return float((layer(x)[0] - layer(changed)[0])[:, :place].detach().abs().max())

    assert change_before(inputs(t)) < 1e-12

    left_anchored = Downsample.forward

    def right_anchored(self: Downsample, x: Tensor, before: Tensor, start: int) -> Tensor:
        later = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)
        return left_anchored(self, later, before, start)

    monkeypatch.setattr(Downsample, "forward", right_anchored)
    assert change_before(inputs(t)) > 1e-6


def test_one_level_is_softmax_attention() -> None:
    torch.manual_seed(0)
    layer, softmax = HierarchicalAttention(WIDTH, 2, levels=1).double(), SoftmaxAttention(WIDTH, 2).double()
    weights = {"query_key_value.weight": layer.query_key_value[0].weight, "out.weight": layer.out.weight}
    softmax.load_state_dict(weights)
    torch.testing.assert_close(layer(inputs(13))[0], softmax(inputs(13))[0])


def test_the_convolution_head_goes_from_attention_to_a_causal_convolution() -> None:
    torch.manual_seed(0)
    layer = HierarchicalAttention(WIDTH, 2, convolution_head=True).double()
    plain = HierarchicalAttention(WIDTH, 2).double()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "convolution" not in name})
    x = inputs(11)
    with torch.no_grad():
        assert layer.convolution_logit is not None
        assert layer.convolution is not None
        layer.convolution.filter.normal_()
        layer.convolution_logit.fill_(100.0)
        torch.testing.assert_close(layer(x)[0], plain(x)[0])
        layer.convolution_logit.fill_(-100.0)
        padded = torch.cat([tail(4), x], dim=1)
        filtered = sum(layer.convolution.filter[:, r] * padded[:, 3 - r : 3 - r + 11] for r in range(4))
        torch.testing.assert_close(layer(x)[0], layer.out(filtered))


def test_level_weights_are_convex_and_start_equal() -> None:
    weights = HierarchicalAttention(WIDTH, 2, levels=4).level_weights()
    torch.testing.assert_close(weights, torch.full((2, 4), 0.25))


def test_fixed_weights_stay_and_the_first_level_alone_is_softmax_attention() -> None:
    torch.manual_seed(0)
    layer = HierarchicalAttention(WIDTH, 2, fixed_weights=(1.0, 0.0, 0.0)).double()
    assert not layer.level_logit.requires_grad
    assert torch.equal(layer.level_weights(), torch.tensor([[1.0, 0.0, 0.0]] * 2, dtype=torch.float64))
    softmax = SoftmaxAttention(WIDTH, 2).double()
    weights = {"query_key_value.weight": layer.query_key_value[0].weight, "out.weight": layer.out.weight}
    softmax.load_state_dict(weights)
    torch.testing.assert_close(layer(inputs(13))[0], softmax(inputs(13))[0])
    thirds = HierarchicalAttention(WIDTH, 2, fixed_weights=(0.333, 0.333, 0.333)).level_weights()
    torch.testing.assert_close(thirds, torch.full((2, 3), 1 / 3))
    with pytest.raises(InputError, match=r"fixed_weights: got \[0.5, 0.5\] for 3 levels; allowed: as many"):
        HierarchicalAttention(WIDTH, 2, fixed_weights=(0.5, 0.5))


def test_its_weights_make_its_output() -> None:
    torch.manual_seed(0)
    layer = HierarchicalAttention(WIDTH, 2).double()
    x = inputs(10)
    values = layer.query_key_value[0](x).chunk(3, -1)[2]
    y = (layer.attention_weights(x) @ split_heads(values, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.out(y), layer(x)[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("t", [1, 8, 11])
def test_output_fusion_is_its_formula(causal: bool, t: int) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"levels": 3, "fusion": "output", "causal": causal, "rotary": False}
    layer, x = HierarchicalAttention(WIDTH, 2, **settings).double(), inputs(t)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    alpha, rows = torch.softmax(layer.level_logit, -1), x
    y = torch.zeros(2, 2, t, WIDTH // 2, dtype=torch.float64)
    for level in range(3):
        if level:
            rows = layer.downsample[level - 1](rows, tail(4), 0)
        n = rows.shape[1]
        q, k, v = (split_heads(part, 2) for part in layer.query_key_value[level](rows).chunk(3, -1))
        scores = q @ k.mT / (WIDTH // 2) ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        attended = torch.softmax(scores, -1) @ v
        y = y + alpha[:, level, None, None] * attended.repeat_interleave(2**level, dim=2)[:, :, :t]
    torch.testing.assert_close(layer(x)[0], layer.out(y.transpose(1, 2).flatten(2)))


def test_under_autocast_the_weights_of_the_levels_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def noting(queries: Any, keys: Any, values: Tensor, weights: Tensor, **options: Any) -> Tensor:
        given.append(weights)
        return hierarchical_attention(queries, keys, values, weights, **options)

    monkeypatch.setattr("kmixer.layers.hierarchical_attention.hierarchical_attention", noting)
    layer = HierarchicalAttention(WIDTH, 2)
    torch.nn.init.normal_(layer.level_logit)
    with torch.autocast("cpu", torch.bfloat16):
        layer(inputs(9).float())
    assert given[0].dtype == torch.float32
    torch.testing.assert_close(given[0].sum(-1), torch.ones(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["naive", "blocked", "native", "sdpa"])
def test_a_layer_decodes_whatever_its_backend(backend: Any) -> None:
    if backend == "native" and native.kernels() is None:
        pytest.skip("the compiled kernels were not built")
    torch.manual_seed(0)
    layer, x = HierarchicalAttention(WIDTH, 2, backend=backend), inputs(11).float()
    whole, _ = layer(x)
    first, state = layer(x[:, :6])
    second, _ = layer(x[:, 6:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_names_that_are_not_known_are_named() -> None:
    with pytest.raises(InputError, match="downsampling: got 'max'; allowed: depthwise, dense, average"):
        Downsample.__init__.__wrapped__(Downsample.__new__(Downsample), WIDTH, 3, "max")
    with pytest.raises(InputError, match="fusion: got 'sum'; allowed: score, output"):
        HierarchicalAttention.__init__.__wrapped__(
            HierarchicalAttention.__new__(HierarchicalAttention), WIDTH, 2, fusion="sum"
        )


@pytest.mark.parametrize(("fusion", "part"), [("score", (1.3125 + 1) / 2), ("output", 1.3125)])
def test_products_of_attention_cost_what_the_levels_say(fusion: str, part: float) -> None:
    t, place = 1 << 14, Place(WIDTH)
    settings = {"heads": 2, "hierarchical": {"levels": 3, "fusion": fusion}}
    config = MixersConfig.parse(settings, source="test")
    ours, softmax = (
        operations(mixer, t, every_key=True) - linear_operations(mixer.out)
        for mixer in (build_mixer(name, config, place) for name in ("hierarchical", "softmax"))
    )
    assert ours / softmax == pytest.approx(part, rel=2e-3)  # at this length the linear maps are a thousandth
