"""The prepared decoding step is the model, one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kmixer
from kmixer import native
from kmixer.generation.prepared import DecodingStep, can_prepare
from kmixer.models import ModelConfig

VOCABULARY = 37

MODELS: dict[str, dict[str, Any]] = {
    "conv": {"base_kernel": {"kind": "conv", "size": 8}, "copy_gate": True},
    "one tap, a kernel a layer": {"base_kernel": {"kind": "conv", "size": 1, "shared": False}},
    "toeplitz, one alpha": {"base_kernel": {"kind": "toeplitz", "size": 40}, "decay": {"alpha": "per_layer"}},
    "no kernel, factorised": {"base_kernel": {"kind": "none"}, "embedding_width": 10},
    "refined": {"base_kernel": {"kind": "conv"}, "refinement": {"steps": 3}},
    "gated": {"base_kernel": {"kind": "conv"}, "output_gate": True},
    "gelu head": {"base_kernel": {"kind": "conv"}, "head": {"kind": "gelu", "multiplier": 3}},
}


def tensors(state: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, torch.Tensor)]


def make_model(values: dict[str, Any], width: int = 20) -> kmixer.LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig.parse({"width": width, "layers": 2, "rank": 3, **values}, source="test")
    model = kmixer.LanguageModel(config, VOCABULARY).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")
@pytest.mark.parametrize("values", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("rows", [1, 3, 40])
@torch.no_grad()
def test_a_prepared_step_is_the_model(values: dict[str, Any], rows: int) -> None:
    model = make_model(values)
    assert can_prepare(model)
    tokens = torch.randint(VOCABULARY, (rows, 70), generator=torch.Generator().manual_seed(1))
    exact = make_model(values).double()
    whole = exact(tokens)
    for start in (0, 1, 30):
        state = model(tokens[:, :start]).state if start else model.initial_state(rows)
        step = DecodingStep(model, state)
        for t in range(start, 70):
            logits = step(tokens[:, t])
            torch.testing.assert_close(logits.double(), whole.logits[:, t], rtol=1e-4, atol=1e-4)
        for mine, reference in zip(tensors(step.state()), tensors(whole.state), strict=True):
            torch.testing.assert_close(mine.double(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")
@torch.no_grad()
def test_preparing_and_stepping_leave_the_given_state_alone() -> None:
    model = make_model(MODELS["conv"])
    state = model(torch.ones(2, 10, dtype=torch.long)).state
    before = [x.clone() for x in tensors(state)]
    step = DecodingStep(model, state)
    after_one = step(torch.ones(2, dtype=torch.long)).clone()
    kept = step.state()
    step(torch.ones(2, dtype=torch.long))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))
    assert torch.equal(DecodingStep(model, state)(torch.ones(2, dtype=torch.long)), after_one)
    torch.testing.assert_close(
        DecodingStep(model, kept)(torch.ones(2, dtype=torch.long)),
        model(torch.ones(2, 1, dtype=torch.long), kept).logits[:, 0],
    )


def test_what_cannot_be_prepared_runs_as_it_is() -> None:
    dense = make_model({"base_kernel": {"kind": "dense", "size": 20}})
    double = make_model(MODELS["conv"]).double()
    for model in (dense, double):
        assert not can_prepare(model)
        assert model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=5, seed=0).shape == (1, 8)
