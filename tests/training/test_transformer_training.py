"""A transformer of several mixers goes the whole way: trained on byte pairs, resumed, loaded, streamed, measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kmixer
from kmixer.layers.roles import roles_of
from kmixer.models import TransformerConfig
from kmixer.models.stack_config import CopyMemoryConfig
from kmixer.runs.recipe import LanguageRecipe, load_language_recipe
from kmixer.training.language import LanguageTask
from kmixer.training.loop import train
from kmixer.training.optimizers import build_optimizers
from tests.training.test_loop import CrashError, StopAfter


@pytest.fixture
def hybrid(text_file: Path) -> LanguageRecipe:
    settings = [f"data.corpus={text_file}", "data.validation=0.2", "tokenizer.vocabulary_size=300"]
    settings += ["model.width=16", "model.layers=3", "model.heads=2", "model.mixers=['gaussian', 'k2', 'softmax']"]
    settings += ["model.windows=SLS", "model.window=9", "model.value_embeddings=true", "model.dropout.mlp=0.1"]
    settings += ["training.steps=8", "training.batch_size=4", "training.window=32", "training.warmup_steps=2"]
    return load_language_recipe("transformer-plays", [*settings, "training.evaluate_every=4", "training.log_every=2"])


def test_it_trains_resumes_loads_and_generates(hybrid: LanguageRecipe, tmp_path: Path) -> None:
    train(hybrid, tmp_path / "whole")
    with pytest.raises(CrashError):
        train(hybrid, tmp_path / "broken", reporter=StopAfter(6))
    train(hybrid, tmp_path / "broken", resume=True)
    whole, broken = (kmixer.load(tmp_path / name) for name in ("whole", "broken"))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), broken.state_dict().values(), strict=True)
    )

    results = json.loads((tmp_path / "whole/results.json").read_text())
    measured = {(each["protocol"], each["window"]): each for each in results["best"]["validation"]}
    assert {("windows", 32), ("windows", 256), ("stream", None)} <= measured.keys()
    assert measured["stream", None]["bits_per_byte"] > 0
    assert results["flops"] > 0

    text = whole.generate("The ", max_new_tokens=20, seed=1)
    assert text.startswith("The ")
    assert text == "".join(["The ", *whole.generate("The ", max_new_tokens=20, seed=1, stream=True)])


def test_attention_to_the_whole_past_is_measured_in_windows_only(hybrid: LanguageRecipe) -> None:
    assert not hybrid.model.state_grows
    whole = load_language_recipe("transformer-plays", ["model.windows=SLL", "model.window=9", "model.mixers=gaussian"])
    assert whole.model.state_grows
    task = LanguageTask(hybrid.model_copy(update={"model": hybrid.model.model_copy(update={"windows": "SLL"})}))
    measured = task.final_measures(task.build_model())["validation"]
    assert [each["protocol"] for each in measured] == ["windows"] * 3
    assert [each["window"] for each in measured] == [32, 256, 1024]


@pytest.mark.parametrize("memory", [None, 64])
def test_a_copy_memory_without_end_is_measured_in_windows_only(hybrid: LanguageRecipe, memory: int | None) -> None:
    model = hybrid.model.model_copy(update={"copy_memory": CopyMemoryConfig(memory=memory)})
    task = LanguageTask(hybrid.model_copy(update={"model": model}))
    measured = task.final_measures(task.build_model())["validation"]
    assert [each["protocol"] for each in measured] == ["windows"] * 3 + ["stream"] * (memory is not None)


def test_bandwidths_and_scalars_take_no_decay_and_no_matrix_optimiser(hybrid: LanguageRecipe) -> None:
    values = hybrid.model.model_dump() | {"layers": 4, "mixers": ["gaussian", "k2", "softmax", "hierarchical"]}
    values |= {
        "windows": "L",
        "window": None,
        "softmax": {"convolution": 3},
        "hierarchical": {"convolution_head": True},
    }
    model = kmixer.LanguageModel(TransformerConfig.parse(values, source="test"), 300)
    parameters = dict(model.named_parameters())
    special = [name for name in parameters if name.endswith(("log_sigma", "_scale", "_logit"))]
    assert len(special) == 8
    filters = [name for name in parameters if name.endswith(".filter")]
    assert len(filters) == 4  # of softmax, of two levels, of the convolution head
    roles = roles_of(model)
    muon, adam = build_optimizers(model, hybrid.training)
    in_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    outside = [name for name in parameters if "embedding" in name or name.startswith("head.")]
    for name in [*special, *filters, *outside]:
        assert id(parameters[name]) not in in_muon, name
        assert roles[name].matrix is None
    assert id(parameters["stack.blocks.3.mixer.downsample.0.mixing"]) in in_muon
    undecayed = {id(p) for group in adam.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    for name in special:
        assert id(parameters[name]) in undecayed, name
        assert roles[name].group == "logit"
