"""Measures of attention on weights whose answers are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kmixer.layers import GaussianAttention, SoftmaxAttention
from kmixer.layers.heads import split_heads
from kmixer.measure.dynamics import measure_dynamics
from kmixer.measure.locality import attention_rollout, attention_weights, measure_locality
from kmixer.models import CausalLM, TransformerConfig
from kmixer.models.vision import VisionConfig, VisionTransformer


def test_one_key_and_all_keys() -> None:
    t = 6
    own, mean = torch.eye(t).expand(2, 1, t, t), torch.full((2, 1, t, t), 1 / t)
    found = measure_locality([torch.cat([own, mean], dim=1)])
    distances = sum(abs(i - j) for i in range(t) for j in range(t)) / t**2
    assert found["effective_keys"] == [pytest.approx([1, t])]
    assert found["distance"] == [pytest.approx([0, distances])]
    assert found["self_weight"] == [pytest.approx([1, 1 / t])]


def test_distances_of_patches_are_those_of_the_grid() -> None:
    config = VisionConfig(image_size=6, channels=1, patch_size=2, classes=2, width=4, layers=1)
    places = VisionTransformer(config).patch_places()
    assert places.tolist() == [[row, column] for row in range(3) for column in range(3)]
    # The class token takes half; of the rest, all is on the patch in the lower right corner.
    w = torch.zeros(1, 1, 10, 10)
    w[..., 0], w[..., 9] = 0.5, 0.5
    found = measure_locality([w], places)
    expected = sum(math.hypot(2 - row, 2 - column) for row in range(3) for column in range(3)) / 9
    assert found["distance"] == [pytest.approx([expected])]
    assert found["effective_keys"] == [pytest.approx([2])]


def test_rollout_keeps_rows_and_order() -> None:
    torch.manual_seed(0)
    first, second = (torch.softmax(torch.randn(2, 3, 5, 5), -1) for _ in range(2))
    rollout = attention_rollout([first, second])
    torch.testing.assert_close(rollout.sum(-1), torch.ones(2, 5))
    half = [0.5 * w.mean(1) + 0.5 * torch.eye(5) for w in (first, second)]
    torch.testing.assert_close(rollout, half[1] @ half[0])


@pytest.mark.parametrize("layer", [GaussianAttention(8, 2, window=4), SoftmaxAttention(8, 2, window=4)], ids=str)
def test_the_weights_of_a_layer_make_its_output(layer: Any) -> None:
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    y, _ = layer(x)
    weights = layer.attention_weights(x)
    if isinstance(layer, GaussianAttention):
        values = layer._heads_of(x, layer.initial_state(len(x)).position, 0)[0]
    else:
        values = split_heads(layer.query_key_value(x).chunk(3, -1)[2], 2)
    torch.testing.assert_close(layer.out((weights @ values).transpose(1, 2).flatten(2)), y)
    assert bool((weights[:, :, 8, :5] == 0).all())


def test_dynamics_of_a_hybrid_hold_what_each_mixer_has() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(width=16, layers=3, heads=2, mixers=("gaussian", "k2", "softmax"))
    model = CausalLM(config, 30)
    found = measure_dynamics(model, torch.randint(30, (3, 40)))
    assert found["sigma"] == [pytest.approx([8**0.5] * 2)]
    assert [len(found[key]) for key in ("decay", "alpha", "gate", "base_share", "base_kernel")] == [1] * 5
    assert 0 < found["base_share"][0] < 1
    assert [len(layer) for layer in found["locality"]["effective_keys"]] == [2, 2]
    assert "eta" not in found
    assert len(attention_weights(model, torch.randint(30, (1, 7)))) == 2
