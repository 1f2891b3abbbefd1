"""Recipes: which task they are of, and a warm-up that training sees the end of."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmixer.errors import InputError
from kmixer.runs.recipe import RECIPES, ImageRecipe, LanguageRecipe, SequenceRecipe, load_recipe, packaged_recipes
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import train
from kmixer.training.tasks import TASKS
from tests.training.test_loop import make_recipe


def test_every_recipe_says_its_task_and_has_one() -> None:
    assert {
        "language": LanguageRecipe,
        "image-classification": ImageRecipe,
        "sequence-classification": SequenceRecipe,
    } == RECIPES
    assert TASKS.keys() == set(RECIPES.values())
    for name in packaged_recipes():
        assert type(load_recipe(name)) in TASKS


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_end_their_warm_up(name: str) -> None:
    load_recipe(name).check_schedule()


def test_a_warm_up_longer_than_training_is_refused(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"training\.warmup_steps 20 is longer than training\.steps 10: .* lower training\.warmup_steps to 10",
    ):
        train(make_recipe(text_file, steps=10, warmup_steps=20), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    make_recipe(text_file, steps=10, warmup_steps=10).check_schedule()


def test_a_run_made_before_that_was_refused_is_read(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    recipe = make_recipe(text_file, steps=10, warmup_steps=20)
    RunFolder(tmp_path / "run").write_recipe(recipe)
    assert RunFolder(tmp_path / "run").read_recipe() == recipe
