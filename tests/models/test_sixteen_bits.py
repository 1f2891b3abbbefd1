"""Under autocast what lies between the layers of a stack has 16 bits; parameters, gradients and states have 32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kmixer import native
from kmixer.layers.block import Block
from kmixer.models import CausalLM, ModelConfig, TransformerConfig, k_stack, transformer

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")

VOCABULARY, WIDTH = 40, 36
MODELS: dict[str, Any] = {
    "k-stack": ModelConfig(width=WIDTH, layers=2, rank=12),
    "gated, erf": ModelConfig(width=WIDTH, layers=2, rank=12, output_gate=True, norm={"kind": "derf"}),
    "layer norms": ModelConfig(width=WIDTH, layers=2, rank=12, norm={"kind": "layer"}),
    "dense": ModelConfig(width=WIDTH, layers=2, rank=12, base_kernel={"kind": "dense", "size": 64}),
    "refined": ModelConfig(width=WIDTH, layers=2, rank=12, refinement={"steps": 2}),
    "copies": ModelConfig(width=WIDTH, layers=2, rank=12, copy_memory={"layers": [0, 1]}),
    "fast weights": ModelConfig(width=WIDTH, layers=2, rank=12, fast_weights={"layers": [1], "chunk": 8}),
    "nanochat": TransformerConfig(width=WIDTH, layers=2, heads=3, blocks="nanochat"),
    **{
        name: TransformerConfig(width=WIDTH, layers=2, heads=3, mixers=[name])
        for name in ("softmax", "gaussian", "hierarchical", "k2")
    },
}


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 51), generator=torch.Generator().manual_seed(1))


def streams(model: nn.Module) -> list[torch.dtype]:
    """A list that the dtype of what every block gives is put into."""
    seen: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda *a: seen.append(a[2][0].dtype))
    return seen


def trained_once(model: CausalLM, *, autocast: bool) -> tuple[float, Tensor]:
    """The loss, and all gradients as one vector."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(tokens()[:, :-1], targets=tokens()[:, 1:]).losses.mean()
    loss.backward()
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    assert {x.dtype for x in gradients} == {x.dtype for x in model.parameters()}
    return loss.item(), torch.cat([x.flatten().double() for x in gradients])


@pytest.mark.parametrize("name", MODELS)
def test_training_in_16_bits_is_as_near_to_float64_as_autocast_with_a_wide_stream(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the mean over seeds: the gradient of short vectors that are made unit vectors is sensitive here or there."""
    errors = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = CausalLM(MODELS[name], VOCABULARY)
        for parameter in model.parameters():  # away from a beginning where branches hardly count
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        loss, gradients = trained_once(copy.deepcopy(model).double(), autocast=False)
        seen = streams(model)
        narrow_loss, narrow = trained_once(model, autocast=True)
        assert narrow_loss == pytest.approx(loss, abs=0.01)
        model.zero_grad()
        with monkeypatch.context() as changed:
            for stack in (k_stack, transformer):
                changed.setattr(stack, "narrowed", lambda x: x)
            _, wide = trained_once(model, autocast=True)
        blocks = len(seen) // 2
        assert seen == blocks * [torch.bfloat16] + blocks * [torch.float32]
        errors.append([float((g - gradients).norm() / gradients.norm()) for g in (narrow, wide)])
    of_narrow, of_wide = torch.tensor(errors).mean(0).tolist()
    assert of_narrow < 1.5 * of_wide + 0.01


@pytest.mark.parametrize("name", MODELS)
def test_a_split_in_16_bits_is_the_whole_but_for_rounding(name: str) -> None:
    torch.manual_seed(0)
    model = CausalLM(MODELS[name], VOCABULARY).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(tokens()).logits
        first = model(tokens()[:, :17])
        second = model(tokens()[:, 17:], first.state)
    parts = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(parts, whole, rtol=0.05, atol=0.05)


def test_without_autocast_or_with_another_type_the_stream_is_as_it_was() -> None:
    model = CausalLM(MODELS["k-stack"], VOCABULARY)
    seen = streams(model)
    model(tokens())
    with torch.autocast("cpu", torch.float16):
        model(tokens())
    assert set(seen) == {torch.float32}
