"""Classifiers train, resume bit for bit, and are measured, compared and reported as language models are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kmixer.errors import InputError
from kmixer.experiments.arms import read_arms
from kmixer.experiments.compare import compare
from kmixer.experiments.tables import cells, head
from kmixer.models.model_folder import load_classifier
from kmixer.runs.recipe import ImageRecipe, load_recipe
from kmixer.training.images import ImageTask
from kmixer.training.loop import Reporter, train
from tests.data.test_images import write_npz


class CrashError(Exception):
    pass


class StopAfter(Reporter):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def trained(self, step: int, loss: float, units_per_second: float, seconds_left: float) -> None:
        if step == self.steps:
            raise CrashError


@pytest.fixture
def recipe(tmp_path: Path) -> ImageRecipe:
    settings = ["data.dataset=" + str(write_npz(tmp_path)), "data.test=0.0", "model.channels=3", "model.classes=4"]
    settings += [
        "model.width=16",
        "model.layers=2",
        "model.mixers=gaussian",
        "training.steps=8",
        "training.log_every=2",
    ]
    settings += ["training.batch_size=8", "training.warmup_steps=2", "training.evaluate_every=3"]
    loaded = load_recipe("vit-digits", settings)
    assert isinstance(loaded, ImageRecipe)
    return loaded


def test_a_run_that_crashed_ends_like_one_that_did_not(recipe: ImageRecipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "whole")
    with pytest.raises(CrashError):
        train(recipe, tmp_path / "broken", reporter=StopAfter(5))
    train(recipe, tmp_path / "broken", resume=True)
    whole, broken = (load_classifier(tmp_path / name)[0].state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    results = json.loads((tmp_path / "whole/results.json").read_text())
    assert results["images"] == 64
    assert results["best"]["test"][0]["examples"] == 10
    assert len(results["best"]["class_token"]["rollout"][0]) == 16
    losses = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if "validation" in line] == [0, 3, 6, 8]
    assert "sigma" in losses[0]["dynamics"]


def test_a_layer_without_weights_leaves_the_class_token_out(recipe: ImageRecipe, tmp_path: Path) -> None:
    fused = {"mixers": ["gaussian", "hierarchical"], "hierarchical": {"fusion": "output"}, "layers": 2}
    values = recipe.model_dump(exclude_none=True)
    values["model"] |= fused
    results = train(ImageRecipe.parse(values, source="test"), tmp_path / "run").run / "results.json"
    best = json.loads(results.read_text())["best"]
    assert "class_token" not in best
    assert best["test"][0]["examples"] == 10


def test_the_mean_over_patches_is_read_out_and_resumed(recipe: ImageRecipe, tmp_path: Path) -> None:
    values = recipe.model_dump(exclude_none=True)
    values["model"]["pooling"] = "mean"
    pooled = ImageRecipe.parse(values, source="test")
    train(pooled, tmp_path / "whole")
    with pytest.raises(CrashError):
        train(pooled, tmp_path / "broken", reporter=StopAfter(5))
    train(pooled, tmp_path / "broken", resume=True)
    whole, broken = (load_classifier(tmp_path / name)[0] for name in ("whole", "broken"))
    assert whole.class_token is None
    assert all(torch.equal(value, broken.state_dict()[name]) for name, value in whole.state_dict().items())
    best = json.loads((tmp_path / "whole/results.json").read_text())["best"]
    assert "class_token" not in best
    (measured,) = ImageTask(pooled).evaluate(whole)
    assert best["validation"][0]["loss"] == pytest.approx(measured.loss)
    with pytest.raises(InputError, match="cannot resume"):
        train(recipe, tmp_path / "whole", resume=True)


def test_loss_and_accuracy_are_those_of_the_logits(recipe: ImageRecipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run")
    model, about = load_classifier(tmp_path / "run")
    task = ImageTask(recipe)
    (measured,) = task.evaluate(model)
    images = task.dataset.validation
    with torch.no_grad():
        chances = torch.softmax(model(images.inputs).double(), -1)
    expected = -chances[torch.arange(len(images)), images.labels].log().mean()
    assert measured.loss == pytest.approx(float(expected))
    assert measured.accuracy == pytest.approx(float((chances.argmax(-1) == images.labels).double().mean()))
    assert about["validation"][0]["loss"] == pytest.approx(measured.loss)


def test_accuracies_are_compared(recipe: ImageRecipe, tmp_path: Path) -> None:
    for seed in (1, 2):
        changed = recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": seed})})
        train(changed, tmp_path / f"run{seed}")
    rows = compare(read_arms([tmp_path / "run1", tmp_path / "run2"]))
    assert rows[0].metric == "accuracy"
    accuracy = rows[0].mean("accuracy")
    assert accuracy is not None
    assert 0 <= accuracy <= 1
    assert {"accuracy", "images"} < set(head(rows))
    assert cells(rows[0])[head(rows).index("images")] == "64"
