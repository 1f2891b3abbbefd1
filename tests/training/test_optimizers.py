"""Parameter groups and the schedule of Koneko's recipe, and of Muon."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from kmixer.layers.roles import roles_of
from kmixer.models import CausalLM
from kmixer.models.classifiers import build_classifier
from kmixer.runs.recipe import ClassificationRecipe, TrainingConfig, load_recipe, packaged_recipes
from kmixer.training.muon import Muon
from kmixer.training.optimizers import build_optimizers, learning_rate_factor, norms_by_group


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
def test_grouped_is_koneko(name: str, expected: tuple[float, float]) -> None:
    kind, rate, decay = settings_of_parameters("k-operators-local-shakespeare")[name]
    assert kind is AdamW
    assert (round(rate / 0.01, 9), decay) == expected


def test_the_untied_head_trains_with_the_matrices() -> None:
    found = settings_of_parameters("k-operators-v2-wikitext2")
    assert found["head.softmax.head.weight"][1:] == (0.01, 0.02)
    assert found["from_embedding.weight"][1:] == (0.0075, 0.0)


# Recipes, with settings that make every parameter there is.
VARIANTS = [
    [
        "transformer-plays",
        "model.mixers=['gaussian','hierarchical','k2','softmax']",
        "model.softmax.convolution=3",
        "model.hierarchical.convolution_head=true",
        "model.value_embeddings=true",
    ],
    ["transformer-plays", "model.mixers=hierarchical", "model.hierarchical.downsampling=dense"],
    ["k-operators-local-shakespeare", "model.base_kernel.kind=dense", "model.base_kernel.size=2048"],
    ["k-operators-local-shakespeare", "model.output_gate=true", "model.refinement.steps=3"],
    ["listops", "model.pooling=class"],
    ["listops", "model.mixers=k2"],
    ["vit-digits", "model.mixers=hierarchical"],
    *([name] for name in packaged_recipes()),
]


# Of parameters that are younger than the record: the groups of Koneko's copy branch and what is like them; of fast
# weights, whose taps are no matrix from channels to channels.
YOUNGER = {
    "copy_memory.table.weight": "embedding decays",
    "copy_memory.gate_logit": "logit",
    "copy_memory.length_gate": "logit",
    "pointer.length_logit": "logit",
    "pointer.direction": "core",
    "stack.blocks.*.feed_forward.fast.filter": "core decays",
    "stack.blocks.*.feed_forward.fast.target": "core muon decays",
    "stack.blocks.*.feed_forward.fast.decay_logit": "logit",
}


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_roles_are_those_that_names_gave(variant: list[str]) -> None:
    """`roles.json` is recorded from the code that guessed by name: group, whether Muon takes it, whether it decays."""
    recorded = json.loads(Path(__file__).with_name("roles.json").read_text())
    expected = {pattern: role for role, patterns in recorded.items() for pattern in patterns} | YOUNGER
    loaded = load_recipe(variant[0], variant[1:])
    with torch.device("meta"):
        model = (
            build_classifier(loaded.model)
            if isinstance(loaded, ClassificationRecipe)
            else CausalLM(loaded.model, loaded.tokenizer.vocabulary_size)
        )
    said = roles_of(model)
    for name, parameter in model.named_parameters():
        role = said[name]
        words = [role.group, "muon" * (role.matrix is not None), "decays" * role.decays]
        pattern = re.sub(r"\.\d+(?=\.)", ".*", name)
        if "kernel.weights" in name:
            assert words == ["core", "", "decays" * (parameter.ndim == 2)], name
        elif parameter.requires_grad:
            assert " ".join(filter(None, words)) == expected[pattern], name


def test_norms_by_group_add_up_to_the_whole() -> None:
    loaded = load_recipe("k-operators-local-shakespeare")
    model = CausalLM(loaded.model, loaded.tokenizer.vocabulary_size)
    norms = norms_by_group(model, lambda _, parameter: parameter)
    assert set(norms) == {"embedding", "core", "bias", "norm", "logit"}
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    whole = sum(float(parameter.square().sum()) for parameter in trained)
    assert sum(norm**2 for norm in norms.values()) == pytest.approx(whole, rel=1e-5)


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


def test_the_schedule_is_konekos() -> None:
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
