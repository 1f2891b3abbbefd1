"""Which task a recipe is of: a recipe and its data, ready to be trained on or measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kmixer.data.tokenizers import Tokenizer
from kmixer.models.classifiers import Classifier
from kmixer.models.model_folder import load_classifier
from kmixer.runs.recipe import AnyRecipe, ClassificationRecipe, ImageRecipe, LanguageRecipe, SequenceRecipe
from kmixer.runs.run_folder import RunFolder
from kmixer.training.classification import ClassificationTask
from kmixer.training.images import ImageTask
from kmixer.training.language import LanguageTask
from kmixer.training.sequences import SequenceTask
from kmixer.training.task import Task

TASKS: dict[type[AnyRecipe], Callable[..., Task]] = {
    LanguageRecipe: LanguageTask,
    ImageRecipe: ImageTask,
    SequenceRecipe: SequenceTask,
}


def open_task(recipe: AnyRecipe, *, tokenizer: Tokenizer | None = None, data_dir: Path | None = None) -> Task:
    """A recipe with its data; text is cut by the tokenizer, where one is given. Raises InputError without the data."""
    given = {} if tokenizer is None else {"tokenizer": tokenizer}
    return TASKS[type(recipe)](recipe, data_dir, **given)


def open_classification(recipe: ClassificationRecipe, data_dir: Path | None = None) -> ClassificationTask:
    """A classification recipe with its data."""
    task = open_task(recipe, data_dir=data_dir)
    assert isinstance(task, ClassificationTask)
    return task


def open_classifier(
    run: Path, data_dir: Path | None = None, data: str | None = None
) -> tuple[ClassificationTask, Classifier]:
    """The task of a run of classification, and its best weights.

    Args:
        run: the run folder.
        data_dir: where data is looked for first.
        data: a file in the place of the recipe's, where that was moved.

    Raises InputError where the data is not what the run was trained on.
    """
    folder = RunFolder(run)
    recipe = folder.recipe_with_data(data)
    model, _ = load_classifier(run)
    folder.check_files()
    assert isinstance(recipe, ClassificationRecipe)
    task = open_classification(recipe, data_dir)
    folder.check_data(task.corpus_sha256)
    return task, model
