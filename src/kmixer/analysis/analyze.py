"""What `kmixer analyze` measures: the dynamics of a model's best weights, on its own text or on any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kmixer.data.corpora import find_corpus
from kmixer.data.token_files import TokenSplit, prepare_dataset
from kmixer.errors import InputError
from kmixer.language_model import LanguageModel, load
from kmixer.measure.dynamics import first_windows, measure_dynamics
from kmixer.measure.evaluation import loss_by_position
from kmixer.runs.recipe import ClassificationRecipe, LanguageRecipe, as_language
from kmixer.runs.run_folder import RunFolder
from kmixer.training.tasks import open_classifier

# Tokens of a window where neither the run nor its weights say how long theirs were.
DEFAULT_WINDOW = 256
# A decay of 1 has no window; float32 knows no decay nearer to it than this.
LEAST = 1e-7


def analyze(
    target: Path, corpus: str | None = None, window: int | None = None, data_dir: Path | None = None
) -> dict[str, Any]:
    """The measures of a model's mixers, see `measure_dynamics`, and of text the loss at each position of a window.

    Args:
        target: a run folder, a model folder or the name of a packaged model.
        corpus: the text to measure on, a file, a folder or a registered name. The text of the run itself, wherever it
            lies now, is measured on its validation part, any other text as a whole. None: the text of the run.
        window: tokens of a window; by default as many as the weights were chosen by, or what a short text has.
        data_dir: where corpora and datasets are looked for first.

    Raises:
        InputError: no model, no text to measure on, or one that the tokenizer does not know.
    """
    run = RunFolder(target)
    recipe = run.read_recipe() if run.exists() else None
    if isinstance(recipe, ClassificationRecipe):
        if corpus is not None or window is not None:
            raise InputError(f"{target} is a classifier, measured on the data of its recipe: leave --corpus, --window")
        task, classifier = open_classifier(target, data_dir)
        measured = task.analyze(classifier)
    else:
        measured = _analyze_language(target, None if recipe is None else as_language(recipe), corpus, window, data_dir)
    if "decay" in measured:
        measured["effective_window"] = [[1 / max(1 - decay, LEAST) for decay in decays] for decays in measured["decay"]]
    return measured


def _analyze_language(
    target: Path, recipe: LanguageRecipe | None, corpus: str | None, window: int | None, data_dir: Path | None
) -> dict[str, Any]:
    model = load(target)
    split = _text_of(target, model, recipe, corpus, data_dir)
    if window is None:
        window = _window_of(model) if recipe is None else recipe.evaluation_window
        if corpus is not None:
            window = max(1, min(window, len(split.tokens) - 1))
    losses = loss_by_position(model, split, window)  # refuses a text that is too short
    return measure_dynamics(model, first_windows(split.tokens, window)) | {"loss_by_position": losses}


def _text_of(
    target: Path, model: LanguageModel, recipe: LanguageRecipe | None, corpus: str | None, data_dir: Path | None
) -> TokenSplit:
    """The part of a text to measure on."""
    assert model.tokenizer is not None
    if corpus is None:
        if recipe is None:
            raise InputError(f"{target} is a model without its run, so without a text; give one with --corpus FILE")
        return prepare_dataset(recipe.data, model.tokenizer, data_dir).validation
    text = find_corpus(corpus, data_dir)
    if recipe is not None and text.sha256() == RunFolder(target).environment()["corpus_sha256"]:
        data = recipe.data.model_copy(update={"corpus": corpus})
        return prepare_dataset(data, model.tokenizer, data_dir).validation
    whole = "".join(text.read())
    tokens = torch.from_numpy(model.tokenizer.encode(whole))
    return TokenSplit(tokens, max(1, len(whole)), max(1, len(whole.encode())), len(whole.split()))


def _window_of(model: LanguageModel) -> int:
    """The window that weights without a run were chosen by, as far as they say so and the model goes."""
    measured = model.about.get("validation") or [{}]
    window = int(measured[0].get("window") or DEFAULT_WINDOW)
    limit = model.config.max_positions
    return window if limit is None else min(window, limit)
