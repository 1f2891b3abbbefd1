"""Parameter groups and the schedule of the author's recipe, and of Muon."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from torch.optim import AdamW

from kmixer.models import CausalLM
from kmixer.runs.recipe import TrainingConfig, load_recipe
from kmixer.training.muon import Muon
from kmixer.training.optimizers import author_group, build_optimizers, learning_rate_factor


def settings_of_parameters(recipe: str, *settings: str) -> dict[str, tuple[type, float, float]]:
    loaded = load_recipe(recipe, list(settings))
    model = CausalLM(loaded.model, loaded.tokenizer.vocabulary_size)
    found = {}
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in build_optimizers(model, loaded.training):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert names[parameter] not in found
                found[names[parameter]] = (type(optimizer), group["lr"], group["weight_decay"])
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedding.weight", (0.75, 0.0)),
        ("stack.first.mixer.projection.weight", (1.0, 0.02)),
        ("stack.first.mixer.projection.bias", (0.5, 0.0)),
        ("stack.first.mixing_norm.weight", (0.5, 0.0)),
        ("stack.blocks.0.mixer.query", (1.0, 0.02)),
        ("stack.blocks.0.mixer.key", (1.0, 0.02)),
        ("stack.blocks.0.mixer.decay_logit", (0.5, 0.0)),
        ("stack.blocks.0.mixer.alpha_logit", (0.5, 0.0)),
        ("stack.blocks.0.mixer.gate_logit", (0.5, 0.0)),
        ("stack.shared_kernel.weights.0", (1.0, 0.02)),
        ("stack.read_out.gain", (1.0, 0.02)),
        ("stack.read_out.bias", (0.5, 0.0)),
        ("stack.read_out.norm.weight", (0.5, 0.0)),
        ("norm.weight", (0.5, 0.0)),
    ],
)
def test_grouped_is_the_authors(name: str, expected: tuple[float, float]) -> None:
    kind, rate, decay = settings_of_parameters("k-operators-local-shakespeare")[name]
    assert kind is AdamW
    assert (round(rate / 0.01, 9), decay) == expected


def test_the_untied_head_trains_with_the_matrices() -> None:
    found = settings_of_parameters("k-operators-v2-wikitext2")
    assert found["head.softmax.head.weight"][1:] == (0.01, 0.02)
    assert found["from_embedding.weight"][1:] == (0.0075, 0.0)
    assert author_group("stack.eta_logit") == "logit"


def test_simple_decays_everything_with_two_dimensions() -> None:
    found = settings_of_parameters("k-operators-v1-shakespeare")
    assert {rate for _, rate, _ in found.values()} == {0.01}
    for name in (
        "embedding.weight",
        "stack.blocks.0.mixer.base_kernel.weights.0",
        "stack.blocks.0.mixer.query",
        "head.down.weight",
    ):
        assert found[name][2] == 0.02, name
    for name in (
        "stack.eta_logit",
        "stack.blocks.0.mixer.decay_logit",
        "norm.weight",
        "stack.first.mixer.projection.bias",
    ):
        assert found[name][2] == 0.0, name


def test_muon_takes_the_matrices_of_the_stack_and_nothing_else() -> None:
    found = settings_of_parameters(
        "k-operators-v2-shakespeare", "training.optimizer=muon", "training.muon_learning_rate=0.02"
    )
    by_muon = {name for name, (kind, _, _) in found.items() if kind is Muon}
    assert by_muon == {
        name
        for name in found
        if name.startswith("stack.") and name.endswith((".weight", ".query", ".key")) and "norm" not in name
    }
    assert found["stack.shared_kernel.weights.0"][0] is AdamW
    assert found["embedding.weight"] == (AdamW, 0.01, 0.02)


def config(**values: Any) -> TrainingConfig:
    base = {
        "steps": 100,
        "batch_size": 1,
        "window": 1,
        "optimizer": "simple",
        "learning_rate": 0.01,
        "learning_rate_floor": 0.001,
        "warmup_steps": 20,
    }
    return TrainingConfig.parse(base | values, source="test")


def test_the_schedule_is_the_authors() -> None:
    """Step k uses lambda(k - 1): max(s, 1) / warmup, then a cosine from 1 to the floor."""
    schedule = config()
    factors = [learning_rate_factor(step, schedule) for step in range(1, 101)]
    assert factors[:3] == [1 / 20, 1 / 20, 2 / 20]
    assert factors[19] == 19 / 20
    assert factors[20] == 1.0
    assert math.isclose(factors[60], 0.1 + 0.9 * 0.5)
    assert 0.1 < factors[99] < 0.101
    assert all(a > b for a, b in itertools.pairwise(factors[20:]))


def test_the_schedule_without_warm_up() -> None:
    assert learning_rate_factor(1, config(warmup_steps=0)) == 1.0
    assert learning_rate_factor(1, config(warmup_steps=0, steps=1)) == 1.0
