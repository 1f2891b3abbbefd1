"""What a model has learned, measured against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kmixer.layers import K2
from kmixer.measure.dynamics import first_windows, measure_dynamics, measure_mixers
from kmixer.measure.locality import inputs_of
from kmixer.models import CausalLM, ModelConfig
from kmixer.models.vision import VisionConfig, VisionTransformer

KERNELS: list[dict[str, Any]] = [
    {"kind": "conv", "size": 4, "shared": True},
    {"kind": "dense", "size": 40, "shared": False},
    {"kind": "low_rank", "size": 40, "rank": 2, "shared": True},
    {"kind": "none"},
]


def make(**model: Any) -> CausalLM:
    torch.manual_seed(0)
    values = {"width": 16, "layers": 3, "rank": 4, **model}
    return CausalLM(ModelConfig.parse(values, source="test"), 20)


def tokens(b: int = 2, t: int = 30) -> torch.Tensor:
    return torch.randint(20, (b, t), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel["kind"])
def test_the_share_of_the_base_kernel_is_that_of_its_branch(kernel: dict[str, Any]) -> None:
    model = make(base_kernel=kernel)
    found = measure_dynamics(model, tokens())
    assert model.training
    assert [len(decay) for decay in found["decay"]] == [4, 4, 4]
    if kernel["kind"] == "none":
        assert "base_share" not in found
        return
    # The first K2 layer by hand.
    model.eval()
    with torch.no_grad():
        h, _ = model.stack.first(model.embedding(tokens()))
        layer = model.stack.blocks[0]
        assert isinstance(layer, K2)
        decay, base, _ = layer.mixer.branches(layer.mixing_norm(h), None, model.stack.shared_kernel)
    assert base is not None
    assert found["base_share"][0] == pytest.approx(float(base.norm() / (base.norm() + decay.norm())), rel=1e-5)
    assert len(found["base_kernel"]) == (1 if kernel["shared"] else 3)


def test_an_open_gate_has_a_larger_share_than_a_closed_one() -> None:
    """What reaches the first of them does not depend on gates: |base| / |decay| there goes with sigmoid(gate logit)."""
    odds = []
    for logit in (-4.0, 0.0, 4.0):
        model = make(base_kernel={"kind": "conv", "size": 4, "gate_init": logit})
        share = measure_dynamics(model, tokens())["base_share"][0]
        odds.append(share / (1 - share) / float(torch.sigmoid(torch.tensor(logit))))
    assert odds == pytest.approx([odds[0]] * 3, rel=1e-4)
    assert odds[0] > 0


def test_residuals_are_those_of_the_refinement_steps() -> None:
    model = make(refinement={"steps": 3, "initial_eta": 0.4}, base_kernel={"kind": "none"})
    found = measure_dynamics(model, tokens())
    assert found["eta"] == pytest.approx(0.4)
    model.eval()
    with torch.no_grad():
        h = model.embedding(tokens())
        expected = []
        for _ in range(3):
            g, _ = model.stack.first(h)
            for block in model.stack.blocks:
                g, _ = block(g)
            g = model.stack.read_out(model.stack.last(g)[0])
            expected.append(float((g - h).norm() / h.norm()))
            h = h + 0.4 * (g - h)
    assert found["residuals"] == pytest.approx(expected, rel=1e-4)
    assert not model.stack.first._forward_pre_hooks


def test_compiled_layers_are_measured_as_they_are() -> None:
    model = make(base_kernel=KERNELS[0])
    expected = measure_dynamics(model, tokens())
    model.stack.compile_layers(backend="eager")
    assert measure_dynamics(model, tokens()) == expected


@pytest.mark.parametrize("kernel", [*KERNELS[:3], {"kind": "toeplitz", "size": 40}], ids=lambda kernel: kernel["kind"])
def test_weights_by_lag_are_means_over_the_positions_that_have_it(kernel: dict[str, Any]) -> None:
    model = make(base_kernel=kernel)
    layer = model.stack.blocks[0]
    assert isinstance(layer, K2)
    module = model.stack.shared_kernel or layer.mixer.base_kernel
    assert module is not None
    torch.manual_seed(2)
    with torch.no_grad():
        for weights in module.weights:
            weights.copy_(torch.randn_like(weights))
        applied = module(torch.eye(kernel["size"])[None])[0][0]  # row i: what position i takes of each other
    expected = [float(torch.diagonal(applied, -lag).mean()) for lag in range(kernel["size"])]
    assert module.weights_by_lag() == pytest.approx(expected, abs=1e-5)


def test_first_windows() -> None:
    assert first_windows(torch.arange(100), 30).shape == (3, 30)
    assert first_windows(torch.arange(100_000), 256).shape == (64, 256)
    assert first_windows(torch.arange(100_000), 50_000).shape == (1, 50_000)


def test_the_column_residual_is_that_of_every_layer() -> None:
    torch.manual_seed(0)
    values = {"image_size": 8, "channels": 1, "patch_size": 2, "classes": 3, "width": 8, "layers": 2, "heads": 2}
    config = VisionConfig.parse({**values, "mixers": ["sinkhorn", "softmax"], "layers": 3}, source="test")
    model, images = VisionTransformer(config), torch.rand(4, 1, 8, 8)
    found = measure_mixers(model, images)
    assert len(found["locality"]["distance"]) == 3
    assert len(found["column_residual"]) == 2
    first = model.blocks[0]
    seen = inputs_of(model, [first.mixer], images)[0]
    sums = first.mixer.attention_weights(seen).double().sum(-2)
    assert found["column_residual"][0] == pytest.approx(float((sums - 1).abs().amax(-1).mean()))
