"""Sequences are padded, cut and classified; padding changes nothing; every mixer learns."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from kmixer.data.config import SequenceDataConfig
from kmixer.data.listops import VOCABULARY
from kmixer.data.sequences import LUMINANCE, load_sequences, padded
from kmixer.errors import InputError
from kmixer.models.mixers.registry import CAUSAL_NAMES
from kmixer.models.model_folder import load_classifier
from kmixer.models.sequence_classifier import SequenceClassifier, SequenceClassifierConfig
from kmixer.runs.recipe import SequenceRecipe, load_recipe
from kmixer.training.loop import train
from kmixer.training.sequences import SequenceTask
from tests.data.test_images import write_npz

VALUES = {"vocabulary": 9, "length": 20, "classes": 3, "width": 12, "layers": 2, "heads": 3}
mixers = pytest.mark.parametrize("mixer", CAUSAL_NAMES)


def make_model(mixer: str, **values: object) -> SequenceClassifier:
    torch.manual_seed(0)
    config = SequenceClassifierConfig.parse(VALUES | {"mixers": mixer} | values, source="test")
    model = SequenceClassifier(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@mixers
@pytest.mark.parametrize("pooling", ["mean", "class"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_padded_batch_gives_what_each_sequence_gives_alone(mixer: str, pooling: str, causal: bool) -> None:
    if mixer == "k2" and not causal:
        with pytest.raises(InputError, match="k2 mixes with the past only"):
            make_model(mixer, causal=causal)
        return
    model = make_model(mixer, pooling=pooling, causal=causal)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 9, (n,), generator=generator).tolist() for n in (20, 1, 7, 13)]
    batch = padded(rows, 20).long()
    alone = torch.cat([model(torch.tensor([row])) for row in rows])
    assert torch.equal(model(batch), alone)
    full = batch[:1].repeat(3, 1)  # no padding: computed at once
    torch.testing.assert_close(model(full), alone[:1].repeat(3, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.classify_together(batch), alone, rtol=1e-12, atol=1e-12)
    # In training a causal model takes the batch with its padding at once; other products round otherwise.
    torch.testing.assert_close(model.train()(batch), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_so_does_a_mixer_that_sees_both_ways_alone(pooling: str) -> None:
    with pytest.raises(InputError, match=r"causal: sinkhorn needs all queries .*; allowed: causal = false$"):
        make_model("sinkhorn")
    model = make_model("sinkhorn", pooling=pooling, causal=False)
    rows = [[3, 1, 4, 1, 5], [9 - 1], [2, 7, 1]]
    alone = torch.cat([model(torch.tensor([row])) for row in rows])
    assert torch.equal(model(padded(rows, 20).long()), alone)
    model.train()(padded(rows, 20).long()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("causal", [True, False])
def test_only_a_model_that_is_not_causal_sees_what_comes_later(causal: bool) -> None:
    model = make_model("softmax", causal=causal)
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(torch.tensor([[1, 2, 3, 4]]))
    model(torch.tensor([[1, 2, 3, 5]]))
    assert torch.equal(seen[0][:, 0], seen[1][:, 0]) == causal


@mixers
def test_every_parameter_gets_a_gradient(mixer: str) -> None:
    model = make_model(mixer)
    model(torch.randint(1, 9, (4, 20))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_what_a_model_cannot_take_is_named() -> None:
    model = make_model("softmax")
    with pytest.raises(InputError, match="tokens: got 21 positions; this model has 20"):
        model(torch.ones(1, 21, dtype=torch.long))
    with pytest.raises(InputError, match="a row holds padding alone"):
        model(torch.tensor([[1, 2], [0, 0]]))
    with pytest.raises(InputError, match="a row holds padding alone"):
        model.classify_together(torch.tensor([[1, 2], [0, 0]]))


def test_listops_is_generated_once_and_is_the_same_again(private_cache: Path) -> None:
    config = SequenceDataConfig(dataset="listops-short", length=300, examples=30, seed=5)
    first = load_sequences(config)
    files = list(private_cache.glob("examples/*.safetensors"))
    written = [file.stat().st_mtime_ns for file in files]
    again = load_sequences(config)
    assert [file.stat().st_mtime_ns for file in files] == written
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert (len(first.train), first.train.inputs.shape[1]) == (30, 300)
    assert first.test is not None
    assert (len(first.validation), len(first.test)) == (2000, 2000)
    assert set(first.validation.labels.tolist()) == set(range(10))
    assert int(first.train.inputs.max()) < VOCABULARY
    lengths = (first.train.inputs != 0).sum(1)
    assert bool((lengths > 100).all())


def test_pixels_become_grey_sequences(tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    found = load_sequences(SequenceDataConfig(dataset="scifar", length=64), tmp_path)
    assert found.test is not None
    assert (len(found.train), len(found.validation), len(found.test)) == (36, 4, 10)
    with np.load(path) as arrays:
        grey = np.rint(arrays["x_test"].astype(np.float32) @ np.array(LUMINANCE, dtype=np.float32))
    np.testing.assert_allclose(found.test.inputs.numpy() - 1, grey.reshape(10, 64), atol=1)


def test_reviews_become_bytes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        with lzma.open(tmp_path / f"imdb_{part}.jsonl.xz", "wt", encoding="utf-8") as file:
            for i in range(20):
                file.write(json.dumps({"label": i // 10, "text": f"{part} review {i} " + "é" * i}) + "\n")
    found = load_sequences(SequenceDataConfig(dataset="imdb", length=24, validation=0.25), tmp_path)
    assert (len(found.train), len(found.validation)) == (15, 5)
    assert found.test is not None
    row = found.test.inputs[12]
    assert bytes(int(token) - 1 for token in row if token) == ("test review 12 " + "é" * 12).encode()[:24]
    with pytest.raises(InputError, match=r"imdb_train.jsonl.xz is not in"):
        load_sequences(SequenceDataConfig(dataset="imdb", length=24), tmp_path / "nowhere")


@pytest.mark.parametrize(
    "line", ["[1]", '{"label": 1, "text": null}', '{"label": null, "text": "a"}', '{"text": 3}', ""]
)
def test_broken_reviews_are_named(line: str, tmp_path: Path) -> None:
    for part in ("train", "test"):
        with lzma.open(tmp_path / f"imdb_{part}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.write(line)
    with pytest.raises(InputError, match=r"does not hold reviews with label and text|holds no review"):
        load_sequences(SequenceDataConfig(dataset="imdb", length=24), tmp_path)
    (tmp_path / "imdb_train.jsonl.xz").write_bytes((tmp_path / "imdb_train.jsonl.xz").read_bytes()[:-9])
    with pytest.raises(InputError, match="does not hold reviews with label and text"):
        load_sequences(SequenceDataConfig(dataset="imdb", length=24), tmp_path)


@pytest.mark.parametrize(
    ("label", "text", "said"),
    [(7, "good", "the test part of imdb has labels 0 to 7"), (1, "", "the test part of imdb has an empty sequence")],
)
def test_the_test_part_is_checked_before_training(label: int, text: str, said: str, tmp_path: Path) -> None:
    for part in ("train", "test"):
        with lzma.open(tmp_path / f"imdb_{part}.jsonl.xz", "wt", encoding="utf-8") as file:
            for i in range(10):
                file.write(json.dumps({"label": i // 5, "text": f"review {i}"}) + "\n")
            if part == "test":
                file.write(json.dumps({"label": label, "text": text}) + "\n")
    recipe = load_recipe("imdb", ["data.length=24", "model.length=24"])
    with pytest.raises(InputError, match=said):
        train(recipe, tmp_path / "run", data_dir=tmp_path)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_counts_every_sequence_as_it_is_alone() -> None:
    settings = ["data.length=40", "data.examples=30", "model.length=40", "model.width=12", "model.heads=3"]
    recipe = load_recipe("listops", settings)
    assert isinstance(recipe, SequenceRecipe)
    task = SequenceTask(recipe)
    model = task.build_model()
    (measured,) = task.evaluate(model)
    rows, labels = task.dataset.validation.inputs.long(), task.dataset.validation.labels
    model.eval()
    with torch.no_grad():
        chances = torch.softmax(model(rows).double(), -1)
    expected = -chances[torch.arange(len(rows)), labels].log().mean()
    assert measured.loss == pytest.approx(float(expected), rel=1e-5)
    assert measured.accuracy == float((chances.argmax(-1) == labels).double().mean())


def test_runs_that_see_the_past_only_measure_another_thing() -> None:
    past, both = (load_recipe("scifar", [f"model.causal={causal}"]).measures() for causal in ("true", "false"))
    assert past != both
    assert past == load_recipe("scifar", ["model.mixers=hierarchical"]).measures()


@mixers
def test_a_recipe_trains_and_is_measured(mixer: str, tmp_path: Path) -> None:
    write_npz(tmp_path)
    settings = ["data.length=64", "model.length=64", "model.width=12", "model.heads=3", f"model.mixers={mixer}"]
    settings += ["training.steps=6", "training.batch_size=8", "training.warmup_steps=1", "training.evaluate_every=3"]
    recipe = load_recipe("scifar", [*settings, "training.log_every=2", "model.layers=1"])
    assert isinstance(recipe, SequenceRecipe)
    train(recipe, tmp_path / "run", data_dir=tmp_path)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["sequences"] == 48
    assert 0 <= results["best"]["test"][0]["accuracy"] <= 1
    model, _ = load_classifier(tmp_path / "run")
    (measured,) = SequenceTask(recipe, tmp_path).evaluate(model)
    assert measured.loss == pytest.approx(results["best"]["validation"][0]["loss"])
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert {"softmax": "locality", "gaussian": "sigma", "hierarchical": "level_weights", "k2": "decay"}[mixer] in line[
        "dynamics"
    ]
