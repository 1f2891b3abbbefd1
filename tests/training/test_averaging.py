"""The average of the weights is its recursion, and is what a run keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import kmixer
from kmixer.layers import HierarchicalAttention
from kmixer.runs.recipe import LanguageRecipe
from kmixer.tensor_files import load_tensors
from kmixer.training.averaging import WeightAverage
from kmixer.training.loop import train
from tests.conftest import tiny_recipe_values
from tests.training.test_loop import CrashError, InterruptAfter, StopAfter


def test_the_average_is_its_recursion() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.5)
    expected = 0.0
    for step in range(1, 20):
        nn.init.constant_(model.weight, float(step))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert average.tensors["weight"].item() == pytest.approx(expected, rel=1e-6)
    with average.applied():
        assert model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 19.0
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert model.weight.item() == 19.0


def test_what_does_not_train_is_left_alone() -> None:
    model = HierarchicalAttention(8, 2, levels=2, fixed_weights=(1.0, 0.0))  # a logit of minus infinity
    fixed = model.level_logit.clone()
    average = WeightAverage(model, 0.5)
    average.update(1)
    assert "level_logit" not in average.tensors
    assert all(bool(tensor.isfinite().all()) for tensor in average.tensors.values())
    with average.applied():
        assert torch.equal(model.level_logit, fixed)


def test_an_averaged_run_with_fixed_weights_resumes(text_file: Path, tmp_path: Path) -> None:
    values = tiny_recipe_values(text_file)
    hierarchical = {"levels": 2, "fixed_weights": [1.0, 0.0]}
    values["model"] = {"kind": "transformer", "width": 16, "layers": 1, "heads": 2, "mixers": ["hierarchical"]}
    values["model"]["hierarchical"] = hierarchical
    values["training"] |= {"average": 0.9}
    recipe = LanguageRecipe.parse(values, source="test")
    train(recipe, tmp_path / "whole")
    with pytest.raises(CrashError):
        train(recipe, tmp_path / "broken", reporter=StopAfter(5))
    train(recipe, tmp_path / "broken", resume=True)
    assert not train(recipe, tmp_path / "stopped", reporter=InterruptAfter(5)).finished  # and has not diverged
    whole, broken = (kmixer.load(tmp_path / name).state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert not any(bool(tensor.isnan().any()) for tensor in whole.values())


def test_a_run_keeps_the_average_and_trains_the_weights(text_file: Path, tmp_path: Path) -> None:
    values = tiny_recipe_values(text_file)
    values["training"] |= {"average": 0.9, "evaluate_every": 8}
    averaged = train(LanguageRecipe.parse(values, source="test"), tmp_path / "averaged")
    del values["training"]["average"]
    train(LanguageRecipe.parse(values, source="test"), tmp_path / "plain")
    saved = [load_tensors(tmp_path / name / "checkpoints/last.safetensors")[0] for name in ("averaged", "plain")]
    name = "stack.first.mixer.projection.weight"
    assert torch.equal(saved[0][f"model/{name}"], saved[1][f"model/{name}"])
    assert not torch.equal(saved[0][f"average/{name}"], saved[0][f"model/{name}"])
    assert averaged.best["step"] == 8
    assert torch.equal(kmixer.load(tmp_path / "averaged").state_dict()[name], saved[0][f"average/{name}"])
