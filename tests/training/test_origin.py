"""Training that begins with the weights of another model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import kmixer
from kmixer.errors import InputError
from kmixer.runs.check import check_run
from kmixer.runs.recipe import LanguageRecipe, load_language_recipe
from kmixer.runs.run_folder import RunFolder
from kmixer.tensor_files import load_tensors
from kmixer.training.loop import Reporter, train
from kmixer.training.origin import open_origin, weights_digest
from kmixer.training.tasks import open_task
from tests.conftest import tiny_recipe_values
from tests.training.test_loop import CrashError, StopAfter, assert_same_run, make_recipe


@pytest.fixture
def source(text_file: Path, tmp_path: Path) -> Path:
    train(make_recipe(text_file), tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def other_text(text: str, tmp_path: Path) -> Path:
    """Letters of the first text, in another order."""
    (tmp_path / "other.txt").write_text(text[::-1][:9000])
    return tmp_path / "other.txt"


def first_loss(run: Path) -> float:
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return float(line["validation"][0]["loss"])


def test_it_begins_with_those_weights_and_that_tokenizer(source: Path, other_text: Path, tmp_path: Path) -> None:
    recipe = make_recipe(other_text, steps=4, evaluate_every=1)
    result = train(recipe, tmp_path / "run", begin_from=source)
    assert result.finished
    tensors, about = load_tensors(source / "model.safetensors")
    assert (tmp_path / "run/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    there = json.loads((tmp_path / "run/environment.json").read_text())["from"]
    assert there["path"] == str(source)
    assert there["about"] == about["about"]
    fresh = train(recipe, tmp_path / "fresh")
    assert first_loss(result.run) < first_loss(fresh.run)
    still = {"learning_rate": 1e-30, "muon_learning_rate": 1e-30, "learning_rate_floor": 0.0, "weight_decay": 0.0}
    begun = train(make_recipe(other_text, steps=1, **still), tmp_path / "still", begin_from=source)
    kept, _ = load_tensors(begun.run / "model.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in kept.items())


def test_it_resumes_bit_for_bit(source: Path, other_text: Path, tmp_path: Path) -> None:
    recipe = make_recipe(other_text)
    train(recipe, tmp_path / "whole", begin_from=source)
    with pytest.raises(CrashError):
        train(recipe, tmp_path / "parts", begin_from=source, reporter=StopAfter(4))
    train(recipe, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert json.loads((tmp_path / "parts/environment.json").read_text())["from"]["path"] == str(source)


def test_a_packaged_model(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("KING:\nNow is the winter of our discontent\n" * 200)
    settings = [f"data.corpus={tmp_path / 'more.txt'}", "data.validation=0.2", "training.steps=1"]
    settings += ["training.warmup_steps=0", "training.batch_size=1", "training.window=32", "evaluation.window=32"]
    recipe = load_language_recipe("shakespeare-small", settings)
    train(recipe, tmp_path / "run", begin_from=Path("shakespeare-small"))
    model = kmixer.load(tmp_path / "run")
    assert model.vocabulary_size == 65


def values(corpus: Path, **changed: Any) -> LanguageRecipe:
    whole = tiny_recipe_values(corpus)
    for key, value in changed.items():
        whole[key] |= value
    return LanguageRecipe.parse(whole, source="test")


def test_what_does_not_fit_is_named(source: Path, text_file: Path, tmp_path: Path) -> None:
    for recipe, message in (
        (values(text_file, model={"rank": 3}), r"holds another model than recipe tiny: model\.rank is 2 there and 3"),
        (
            values(text_file, tokenizer={"kind": "byte", "vocabulary_size": 256}),
            r"is of kind 'char'.*tokenizer\.kind=char",
        ),
    ):
        with pytest.raises(InputError, match=message):
            train(recipe, tmp_path / "run", begin_from=source)
    with pytest.raises(InputError, match="is not a run or model folder"):
        train(make_recipe(text_file), tmp_path / "run", begin_from=tmp_path / "nothing")
    (tmp_path / "strange.txt").write_text("a text with a ☃ in it, which the first had not\n" * 400)
    with pytest.raises(InputError, match="☃") as error:
        train(make_recipe(tmp_path / "strange.txt"), tmp_path / "run", begin_from=source)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    dropout = values(text_file, model={"dropout": {"embedding": 0.0}})
    assert train(dropout, tmp_path / "run", begin_from=source).finished
    check_run(RunFolder(tmp_path / "run"))


# Settings that add parameters to the tiny model, and what the new ones are called.
ADDED: list[tuple[dict[str, Any], str]] = [
    ({"output_gate": True}, "output_gate"),
    ({"copy_memory": {"match_length": "both"}}, "copy_memory"),
    ({"refinement": {"steps": 2}}, "eta_logit"),
    ({"fast_weights": {"layers": [1], "chunk": 8}}, "feed_forward.fast"),
]


@pytest.mark.parametrize(("settings", "called"), ADDED, ids=str)
def test_what_is_not_there_begins_fresh_and_is_named(
    settings: dict[str, Any], called: str, source: Path, text_file: Path, tmp_path: Path
) -> None:
    """At step 0 every weight is the source's, or the one that the recipe draws without a source."""
    told: list[tuple[Sequence[str], Sequence[str]]] = []

    class Told(Reporter):
        def begun_from(self, source: Path, fresh: Sequence[str], changed: Sequence[str]) -> None:
            told.append((fresh, changed))

    recipe = values(text_file, model=settings)
    with pytest.raises(CrashError):
        train(recipe, tmp_path / "fresh", reporter=StopAfter(1))
    result = train(recipe, tmp_path / "run", begin_from=source, reporter=Told())
    drawn, _ = load_tensors(tmp_path / "fresh/checkpoints/last.safetensors")  # written before the first step
    theirs, _ = load_tensors(source / "model.safetensors")
    ((fresh, changed),) = told
    assert set(fresh) == {name.removeprefix("model/") for name in drawn if name.startswith("model/")} - theirs.keys()
    assert fresh
    assert all(called in name for name in fresh)
    assert [key.split(" ")[0] for key in changed] == [f"model.{next(iter(settings))}"]
    record = RunFolder(result.run).environment()["from"]
    assert (record["fresh"], record["changed"]) == (list(fresh), list(changed))
    assert record["weights_sha256"] == weights_digest(source)
    model = open_task(recipe, tokenizer=kmixer.load(source).tokenizer).build_model()
    assert open_origin(source, recipe).put_into(model) == list(fresh)
    for name, tensor in model.state_dict().items():
        if name in theirs:
            assert torch.equal(tensor, theirs[name]), name
        else:
            assert tensor.shape == drawn[f"model/{name}"].shape, name


@pytest.mark.parametrize("settings", [{"output_gate": True}, {"fast_weights": {"chunk": 8}}], ids=str)
def test_a_run_with_fresh_parameters_resumes_bit_for_bit(
    settings: dict[str, Any], source: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = values(text_file, model=settings)
    train(recipe, tmp_path / "whole", begin_from=source)
    with pytest.raises(CrashError):
        train(recipe, tmp_path / "parts", begin_from=source, reporter=StopAfter(4))
    train(recipe, tmp_path / "parts", begin_from=source, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_parameter_that_the_new_model_lacks_is_an_error(source: Path, text_file: Path, tmp_path: Path) -> None:
    gated = values(text_file, model={"output_gate": True})
    train(gated, tmp_path / "gated", begin_from=source)
    with pytest.raises(InputError, match=r"output_gate is True there.*output_gate.* does not belong to this model"):
        train(make_recipe(text_file), tmp_path / "run", begin_from=tmp_path / "gated")
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed_with_its_own_origin_only(source: Path, text_file: Path, tmp_path: Path) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    train(make_recipe(text_file, seed=7), other)
    train(make_recipe(text_file), run, begin_from=source)
    assert train(make_recipe(text_file), run, begin_from=source, resume=True).finished
    for begun, origin in ((run, other), (source, other)):
        with pytest.raises(InputError, match="did not begin with these weights; leave --from out"):
            train(make_recipe(text_file), begun, begin_from=origin, resume=True)
