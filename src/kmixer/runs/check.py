"""Whether a run is whole: every file of it is read, and what one of them says of another is true."""

from __future__ import annotations

import torch
from torch import nn

from kmixer.errors import InputError, shown_name
from kmixer.files import is_there
from kmixer.models.causal_lm import CausalLM
from kmixer.models.classifiers import build_classifier
from kmixer.models.model_folder import (
    CONFIG,
    WEIGHTS,
    SavedConfig,
    load_tokenizer,
    load_weights,
    put_weights,
    read_config,
)
from kmixer.models.sequence_classifier import SequenceClassifierConfig
from kmixer.models.vision import VisionConfig
from kmixer.models.weight_names import current_names
from kmixer.runs import integrity
from kmixer.runs.recipe import AnyRecipe, ClassificationRecipe, LanguageRecipe
from kmixer.runs.records import check_diverged
from kmixer.runs.run_folder import DIVERGED, ENVIRONMENT, RECIPE, RunFolder
from kmixer.tensor_files import load_tensors


def check_run(run: RunFolder) -> None:
    """Read every file of a run.

    Raises InputError, one line, for a file that is damaged or missing, for weights that do not fit the model, and for
    files of which one belongs to another run.
    """
    recipe = run.read_recipe()
    run.check_files()
    config = read_config(run.path)
    if not isinstance(recipe, LanguageRecipe | ClassificationRecipe) or recipe.model != config.model:
        raise InputError(f"{run.path / RECIPE} and {run.path / CONFIG} are of different models")
    model = _model(config)
    if isinstance(model, CausalLM):
        tokenizer = load_tokenizer(run.path)
        if tokenizer.vocabulary_size != model.vocabulary_size:
            raise InputError(
                f"{run.path}: the tokenizer has {tokenizer.vocabulary_size} tokens, the model {model.vocabulary_size}"
            )
    tensors, _ = load_weights(run.path)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    put_weights(model, tensors, str(run.path / WEIGHTS))
    run.read_metrics()
    if is_there(run.path / ENVIRONMENT):
        run.environment()
    if is_there(run.path / DIVERGED):
        check_diverged(run.path / DIVERGED)
    _check_results(run, recipe)
    if is_there(run.checkpoint):
        _check_checkpoint(run, expected)


def _model(config: SavedConfig) -> nn.Module:
    with torch.device("meta"):
        if isinstance(config.model, VisionConfig | SequenceClassifierConfig):
            return build_classifier(config.model)
        if config.vocabulary_size is None:
            raise InputError(f"{CONFIG} of a language model needs a vocabulary_size")
        return CausalLM(config.model, config.vocabulary_size)


def _check_results(run: RunFolder, recipe: AnyRecipe) -> None:
    results = run.results()
    if results is None:
        return
    training = recipe.training
    for key, ours in (("recipe", recipe.name), ("seed", training.seed), ("steps", training.steps)):
        if results[key] != ours:
            raise InputError(f"{run.path}: results.json is of {key} {results[key]!r}, {RECIPE} of {ours!r}")


def _check_checkpoint(run: RunFolder, expected: dict[str, torch.Size]) -> None:
    tensors, metadata = load_tensors(run.checkpoint)
    weights = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    weights = current_names(weights, metadata.get("format", 1), str(run.checkpoint))
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or weights[name].shape != expected.get(name):
            raise InputError(f"{run.checkpoint}: tensor {shown_name(name)} does not fit the run's model")
    integrity.check_metrics(run.path)
