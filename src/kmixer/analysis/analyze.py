"""What `kmixer analyze` measures: the dynamics of a model's best weights, on its own text or on any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kmixer.errors import InputError
from kmixer.language_model import load
from kmixer.measure.dynamics import first_windows, measure_dynamics
from kmixer.measure.evaluation import loss_by_position
from kmixer.measure.texts import check_one_text, held_out, read_tokens, window_for
from kmixer.runs.recipe import ClassificationRecipe
from kmixer.runs.run_folder import RunFolder
from kmixer.training.tasks import open_classifier

# A decay of 1 has no window; float32 knows no decay nearer to it than this.
LEAST = 1e-7


def analyze(
    target: Path,
    text: str | None = None,
    corpus: str | None = None,
    window: int | None = None,
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """The measures of a model's mixers, see `measure_dynamics`, and of text the loss at each position of a window.

    Args:
        target: a run folder, a model folder or the name of a packaged model.
        text: a file to measure on, as a whole; "-" is standard input. None: the validation part of the run's own text.
        corpus: where the data of the run is now, if it was moved.
        window: tokens of a window; by default as many as the weights were chosen by; of another text see `window_for`.
        data_dir: where corpora and datasets are looked for first.

    Raises:
        InputError: no model, no text to measure on, or one that the tokenizer does not know.
    """
    check_one_text(text, corpus)
    run = RunFolder(target)
    if run.exists() and isinstance(run.read_recipe(), ClassificationRecipe):
        if text is not None or window is not None:
            raise InputError(f"{target} is a classifier, measured on the data of its recipe: leave --text, --window")
        task, classifier = open_classifier(target, data_dir, corpus)
        measured = task.analyze(classifier)
    else:
        measured = _analyze_language(run, text, corpus, window, data_dir)
    if "decay" in measured:
        measured["effective_window"] = [[1 / max(1 - decay, LEAST) for decay in decays] for decays in measured["decay"]]
    return measured


def _analyze_language(
    run: RunFolder, text: str | None, corpus: str | None, window: int | None, data_dir: Path | None
) -> dict[str, Any]:
    model = load(run.path)
    assert model.tokenizer is not None
    if text is not None:
        split = read_tokens(text, model.tokenizer)
        window = window or window_for(run, model, split)
    elif run.exists():
        recipe, split = held_out(run, model.tokenizer, corpus, data_dir)
        window = window or recipe.evaluation_window
    else:
        raise InputError(f"{run.path} is a model without its run, so without a text; give one with --text FILE")
    losses = loss_by_position(model, split, window)  # refuses a text that is too short
    return measure_dynamics(model, first_windows(split.tokens, window)) | {"loss_by_position": losses}
