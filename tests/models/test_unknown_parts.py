"""In every model every part is called: one of another kind gives what it gives, and no fast path overlooks it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kmixer.layers import BaseKernel
from kmixer.models import CausalLM, ModelConfig, TransformerConfig
from kmixer.models.sequence_classifier import SequenceClassifier, SequenceClassifierConfig
from kmixer.models.vision import VisionConfig, VisionTransformer
from tests.models.unknown_parts import WAYS, Way, by_a_hook, by_a_wrapper, without_fast_paths

VOCABULARY = 30
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.Identity)
STACK = {"width": 8, "layers": 2}
BLOCKS = {**STACK, "heads": 2}


def language(config: type[ModelConfig] | type[TransformerConfig], **values: Any) -> Callable[[], nn.Module]:
    return lambda: CausalLM(config.parse(values, source="test"), VOCABULARY)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "k-stack": language(ModelConfig, **STACK, rank=2, base_kernel={"kind": "conv", "size": 4}, output_gate=True),
    "refined": language(
        ModelConfig,
        **STACK,
        rank=2,
        embedding_width=4,
        refinement={"steps": 2},
        base_kernel={"kind": "toeplitz", "size": 4, "shared": False},
        head={"kind": "gelu", "multiplier": 1},
    ),
    "copying": language(
        ModelConfig,
        **STACK,
        rank=2,
        embedding_width=4,
        base_kernel={"kind": "conv", "size": 4},
        copy_memory={"layers": [0], "memory": 6, "match_length": "both", "pointer": True},
    ),
    "copying transformer": language(
        TransformerConfig, **BLOCKS, mixers=["softmax", "k2"], copy_memory={"match_length": "gate", "pointer": True}
    ),
    "transformer": language(TransformerConfig, **BLOCKS, mixers=["softmax", "k2"]),
    "other mixers": language(TransformerConfig, **BLOCKS, mixers=["gaussian", "hierarchical"]),
    "nanochat": language(
        TransformerConfig,
        **BLOCKS,
        blocks="nanochat",
        value_embeddings=True,
        softmax={"query_key_norm": True},
        head={"kind": "untied", "soft_cap": 15.0},
    ),
    "vit": lambda: VisionTransformer(
        VisionConfig.parse({**BLOCKS, "image_size": 8, "patch_size": 4, "classes": 5}, source="test")
    ),
    "sequence classifier": lambda: SequenceClassifier(
        SequenceClassifierConfig.parse({**BLOCKS, "vocabulary": VOCABULARY, "length": 12, "classes": 4}, source="test")
    ),
}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, VisionTransformer):
        return model(torch.randn(2, 3, 8, 8, generator=generator))
    output = model(torch.randint(1, VOCABULARY, (2, 11), generator=generator))
    return output.logits if isinstance(model, CausalLM) else output


def called_parts(kind: str) -> list[str]:
    """The parts that are called, containers left out."""
    return [name for name, part in make(kind).named_modules() if name and not isinstance(part, CONTAINERS)]


def changes() -> list[Any]:
    return [
        pytest.param(kind, way, id=f"{kind}, {way.__name__}")
        for kind in MODELS
        for way in WAYS
        if way is not by_a_wrapper
    ]


@pytest.mark.parametrize(("kind", "way"), changes())
def test_a_part_of_another_kind_gives_what_its_modules_give(
    kind: str, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(kind)
    before = answer(model)
    for name in called_parts(kind):
        changed = copy.deepcopy(model)
        way(changed, name)
        fast = answer(changed)
        with monkeypatch.context() as without:
            without_fast_paths(without)
            plain = answer(changed)
        torch.testing.assert_close(fast, plain, rtol=2e-4, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert not torch.allclose(plain, before, rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("kind", MODELS)
def test_fast_paths_give_what_modules_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(kind)
    fast = answer(model)
    without_fast_paths(monkeypatch)
    torch.testing.assert_close(answer(model), fast, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["k-stack", "transformer", "nanochat"])
def test_whole_blocks_and_norms_can_be_wrapped(kind: str) -> None:
    """An adapter around a block, a norm or a linear map gives what a hook gives; attention asks more of its parts."""
    model = make(kind)
    for name, part in model.named_modules():
        inside_attention = kind != "k-stack" and ".mixer." in name
        if (
            not name.startswith("stack.")
            or inside_attention
            or isinstance(part, (*CONTAINERS, BaseKernel, nn.Embedding))
        ):
            continue
        hooked, wrapped = copy.deepcopy(model), copy.deepcopy(model)
        by_a_hook(hooked, name)
        by_a_wrapper(wrapped, name)
        torch.testing.assert_close(
            answer(wrapped), answer(hooked), rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
