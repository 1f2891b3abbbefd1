"""What `kmixer lab` feeds a model: validation windows and examples, or symmetric inputs that need no data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kmixer.data.images import channel_statistics
from kmixer.errors import InputError
from kmixer.measure.signal import symmetric_inputs
from kmixer.models.causal_lm import CausalLM
from kmixer.models.classifiers import Classifier
from kmixer.models.sequence_classifier import SequenceClassifier, SequenceClassifierConfig, lengths_of
from kmixer.models.vision import VisionConfig, VisionTransformer
from kmixer.runs.recipe import AnyRecipe, ClassificationRecipe, as_language
from kmixer.training.classification import ClassificationTask
from kmixer.training.language import LanguageTask
from kmixer.training.tasks import open_task

# Positions of a window where nothing else is asked for.
WINDOW = 64
# Symmetric inputs: how many, mean square, and product of different tokens.
SYMMETRIC_INPUTS, SYMMETRIC_Q, SYMMETRIC_P = 4, 1.0, 0.2
Model = CausalLM | Classifier


@dataclass(frozen=True)
class Asked:
    """How to measure."""

    initialisations: int = 8
    inputs: int | None = 4  # windows or examples of the validation part; None: symmetric inputs
    probes: int = 2
    window: int | None = None
    read_out: bool = False
    seed: int = 0
    without_data: str = ""  # added to an error where there is no data: what to ask for instead


class Symmetric:
    """Inputs of a recipe that needs no data: what the model reads does not count, because h^0 is replaced."""

    pixels = None

    def __init__(self, recipe: AnyRecipe, asked: Asked) -> None:
        classifies = isinstance(recipe, ClassificationRecipe)
        self.vocabulary = 0 if classifies else as_language(recipe).tokenizer.vocabulary_size
        self.asked, self.enter = asked, symmetric(asked)

    def inputs(self, model: Model) -> Tensor:
        return placeholder(model, self.asked)


class OfTask:
    """Inputs from the validation part of a recipe's data."""

    enter = None

    def __init__(self, recipe: AnyRecipe, asked: Asked, data_dir: Path | None) -> None:
        try:
            task = open_task(recipe, data_dir=data_dir)
        except InputError as error:
            raise InputError(f"{error}{asked.without_data}") from None
        self.pixels: tuple[Tensor, Tensor] | None = None
        self.vocabulary = 0
        if isinstance(task, LanguageTask):
            self.vocabulary = task.recipe.tokenizer.vocabulary_size
            self.chosen = windows(task.dataset.validation.tokens, asked)
        else:
            assert isinstance(task, ClassificationTask)
            self.chosen = examples(task, asked)
            if isinstance(task.recipe.model, VisionConfig):
                self.pixels = channel_statistics(task.dataset.train.inputs)

    def inputs(self, model: Model) -> Tensor:
        return self.chosen


class OfModel:
    """Inputs that a trained model has been given, for fresh ones of its recipe."""

    enter = None

    def __init__(self, model: Model, chosen: Tensor) -> None:
        self.chosen = chosen
        self.vocabulary = model.vocabulary_size if isinstance(model, CausalLM) else 0
        self.pixels: tuple[Tensor, Tensor] | None = None
        if isinstance(model, VisionTransformer):
            self.pixels = model.pixel_mean, model.pixel_deviation

    def inputs(self, model: Model) -> Tensor:
        return self.chosen


Source = Symmetric | OfTask | OfModel


def symmetric(asked: Asked) -> Callable[[Tensor], Tensor]:
    return symmetric_inputs(SYMMETRIC_Q, SYMMETRIC_P, asked.seed)


def placeholder(model: Model, asked: Asked) -> Tensor:
    """What a model takes, of the size asked for."""
    if isinstance(model, VisionTransformer):
        _check_no_window(asked)
        config = model.config
        return torch.zeros(SYMMETRIC_INPUTS, config.channels, config.image_size, config.image_size)
    sequences = isinstance(model, SequenceClassifier)
    window = asked.window or min(WINDOW, model.config.length if isinstance(model, SequenceClassifier) else WINDOW)
    tokens = torch.ones(SYMMETRIC_INPUTS, window, dtype=torch.int64)
    return tokens if sequences else tokens - 1


def windows(tokens: Tensor, asked: Asked) -> Tensor:
    """Windows (b, n), spread evenly over a text."""
    assert asked.inputs is not None
    window = asked.window or min(WINDOW, len(tokens))
    if window > len(tokens):
        raise InputError(f"--window: got {window}; the validation part has {len(tokens)} tokens")
    starts = torch.linspace(0, len(tokens) - window, asked.inputs, dtype=torch.float64).long()
    return torch.stack([tokens[start : start + window] for start in starts.tolist()]).long()


def examples(task: ClassificationTask, asked: Asked) -> Tensor:
    """Validation examples: images as they are, sequences cut to one length."""
    assert asked.inputs is not None
    inputs = task.dataset.validation.inputs
    if isinstance(task.recipe.model, SequenceClassifierConfig):
        lengths = lengths_of(inputs)
        window = asked.window or min(WINDOW, int(lengths.max()))
        inputs = inputs[lengths >= window][:, :window].long()
    else:
        _check_no_window(asked)
    if len(inputs) < asked.inputs:
        raise InputError(f"got {asked.inputs} inputs; the validation part has {len(inputs)} that are long enough")
    return inputs[: asked.inputs]


def _check_no_window(asked: Asked) -> None:
    if asked.window is not None:
        raise InputError("--window: an image has the positions of its patches; leave it out")
