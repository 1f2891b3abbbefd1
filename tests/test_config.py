"""Every mistake in a recipe is one line that names the key and what is allowed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kmixer.errors import InputError
from kmixer.runs.recipe import LanguageRecipe, load_recipe, packaged_recipes

QUICK = "shakespeare-quick"


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_are_valid_and_survive_being_written(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.rnak=3", "unknown key model.rnak; did you mean rank? allowed: width, layers,"),
        ("model.base_kernel.sise=3", "unknown key model.base_kernel.sise; did you mean size?"),
        ("nonsense=1", "unknown key nonsense; allowed: name, description, training"),
        ("model.base_kernel.kind=convv", "model.base_kernel.kind: got 'convv'; allowed: 'none', 'dense'"),
        ("model.decay.backend=fast", "decay.backend: got 'fast'; allowed: 'auto', 'recurrent', 'mask', 'block'"),
        ("training.steps=0", "training.steps: got 0; it should be greater than or equal to 1"),
        ("training.steps=ten", "training.steps: got 'ten'; it should be a valid integer"),
        ("training.steps=1.5", "training.steps: got 1.5; it should be a valid integer"),
        ("training.learning_rate=true", "training.learning_rate: got True; it should be a valid number"),
        ("model.decay.range=[0.9, 0.5]", "range: got [0.9, 0.5]; allowed: 0.01 <= low < high <= 1"),
        ("model.decay.range=[0.001, 0.5]", "range: got [0.001, 0.5]; allowed: 0.01 <= low < high <= 1"),
        ("model.base_kernel.rank=2", "rank goes with kind 'low_rank' and only with it"),
        ("model.head.multiplier=2", "it goes with kind 'gelu' and only with it"),
        ("model.head.dropout=0.1", "dropout goes with kind 'gelu' or 'adaptive'; 'linear' has none"),
        ("model.head.kind=adaptive", "'adaptive' needs tokenizer.vocabulary_size >= 1024, got 84"),
        ("model.base_kernel.kind=dense", "training.window: got 512; the dense base kernel has"),
        ("training.optimizer=simple", "it goes with optimizer 'muon' and only with it"),
        ("training.accumulation=5", "batch_size 32 cannot be cut into accumulation = 5 equal parts"),
        ("training.learning_rate_floor=1.0", "learning_rate_floor 1.0 is above learning_rate 0.01"),
        ("data.validation=1.5", "data: validation: got 1.5; allowed: a fraction between 0 and 1, or a list of file"),
        ("data.validation=[]", "validation: got []; allowed: a fraction between 0 and 1, or a list of file names"),
        ("data.corpus=''", "data.corpus: got ''"),
        ("training.learning_rate=nan", "training.learning_rate: got nan; it should be a finite number"),
        ("model.base_kernel.gate_init=inf", "model.base_kernel.gate_init: got inf; it should be a finite number"),
        ("evaluation.protocols=[]", "evaluation.protocols: got []; it should not be empty"),
        ("model.kind=rnn", "model.kind: got 'rnn'; allowed: 'k-stack', 'transformer'"),
        ("model.kind=transformer", "unknown key model.rank; allowed: width, layers"),
        ("model=3", "model: got 3; it should be a group of keys"),
        ("training.steps", "--set training.steps: got no value; write it as key=value"),
        ("name.x=1", "name is a value, not a group of keys"),
        ("training.optimizer=", "training.optimizer is missing"),
    ],
)
def test_mistakes_are_named(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_recipe(QUICK, [setting])
    assert "\n" not in str(caught.value)


def test_settings_replace_values_and_go_back_to_defaults() -> None:
    recipe = load_recipe(QUICK, ["training.steps=7", "model.decay.range=[0.1, 0.9]", "data.corpus=a/b.txt"])
    assert recipe.training.steps == 7
    assert recipe.model.decay.range == (0.1, 0.9)
    assert recipe.data.corpus == "a/b.txt"
    assert load_recipe(QUICK, ["training.evaluate_every="]).training.evaluate_every == 250
    assert load_recipe(QUICK, ["model.refinement.steps="]).model.refinement is None


def test_a_stream_needs_a_model_that_streams() -> None:
    settings = ['evaluation.protocols=["stream"]']
    assert load_recipe(QUICK, settings).evaluation.protocols == ("stream",)
    with pytest.raises(InputError, match="the dense base kernel does not"):
        load_recipe("k-operators-v2-shakespeare", settings)


def test_unknown_and_broken_recipe_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recipe 'shakespear': no such recipe; allowed: deit-b, deit-s"):
        load_recipe("shakespear")
    with pytest.raises(InputError, match="missing"):
        load_recipe(str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("name = [", encoding="utf-8")
    with pytest.raises(InputError, match="is not valid TOML"):
        load_recipe(str(broken))


def test_recipes_are_frozen() -> None:
    recipe = load_recipe(QUICK)
    assert isinstance(recipe, LanguageRecipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"


def test_a_byte_tokenizer_has_256_tokens_whatever_the_recipe_said() -> None:
    recipe = load_recipe(QUICK, ["tokenizer.kind=byte"])
    assert isinstance(recipe, LanguageRecipe)
    assert recipe.tokenizer.vocabulary_size == 256
