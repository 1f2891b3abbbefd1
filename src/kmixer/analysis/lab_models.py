"""The models that the lab measures: a recipe's with fresh weights, at several depths and norms, and those of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kmixer.analysis.lab_inputs import Asked, Model, Source, examples, placeholder, symmetric, windows
from kmixer.errors import InputError
from kmixer.language_model import load
from kmixer.measure.signal import blocks_of, entering
from kmixer.measure.texts import held_out
from kmixer.models.causal_lm import CausalLM
from kmixer.models.classifiers import build_classifier
from kmixer.models.model_folder import find_model_folder, load_classifier, read_config
from kmixer.models.sequence_classifier import SequenceClassifierConfig
from kmixer.models.vision import VisionConfig, VisionTransformer
from kmixer.runs.recipe import AnyRecipe, ClassificationRecipe, as_language
from kmixer.runs.run_folder import RunFolder
from kmixer.training.norm_matching import match_norms
from kmixer.training.tasks import open_classifier

# Norms that have an alpha.
BOUNDED = ("dyt", "derf")


class Variant(NamedTuple):
    """A recipe with another depth or norm: the name of its curve, and the settings that make it."""

    name: str
    settings: list[str]


def variants_of(recipe: AnyRecipe, depths: list[int], norms: list[str], alphas: list[float]) -> list[Variant]:
    """Every norm asked for at every depth; the recipe's own where none is. Alphas are for norms that have one.

    Raises InputError for alphas without such a norm.
    """
    if alphas and not set(norms) & set(BOUNDED):
        raise InputError(f"--alpha goes with --norm {' or '.join(BOUNDED)}")
    of_norms: list[tuple[str, list[str]]] = []
    for norm in norms:
        kind = f"model.norm.kind={norm}"
        if norm in BOUNDED and alphas:
            of_norms += [(f"{norm} {alpha:g}, ", [kind, f"model.norm.alpha={alpha}"]) for alpha in alphas]
        else:
            none = [] if norm in BOUNDED else ["model.norm.alpha=", "model.norm.match="]
            of_norms.append((f"{norm}, ", [kind, *none]))
    layers = depths or [recipe.by_key()["model.layers"]]
    return [
        Variant(f"{name}{depth} layers", [*settings, f"model.layers={depth}"])
        for name, settings in of_norms or [("", [])]
        for depth in layers
    ]


def trained_model(
    run: RunFolder, asked: Asked, corpus: str | None, data_dir: Path | None
) -> tuple[Model, Tensor, Callable[[Tensor], Tensor] | None]:
    """The model, its inputs, and what is put in the place of h^0 if anything."""
    folder = find_model_folder(run.path)
    config = read_config(folder).model
    classifies = isinstance(config, VisionConfig | SequenceClassifierConfig)
    if asked.inputs is None:
        model: Model = load_classifier(folder)[0] if classifies else load(run.path)
        return model, placeholder(model, asked), symmetric(asked)
    if not run.exists():
        raise InputError(f"{run.path} is a model without its run, so without data{asked.without_data}")
    if classifies:
        task, classifier = open_classifier(run.path, data_dir, corpus)
        return classifier, examples(task, asked), None
    model = load(run.path)
    assert model.tokenizer is not None
    _, split = held_out(run, model.tokenizer, corpus, data_dir)
    return model, windows(split.tokens, asked), None


def initialisations(recipe: AnyRecipe, source: Source, asked: Asked) -> Iterator[Model]:
    """Fresh models, from seeds that follow each other. The generator of the process is left as it was."""
    for index in range(asked.initialisations):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(asked.seed + index)
            model = _build(recipe, source.vocabulary)
        if isinstance(model, VisionTransformer) and source.pixels is not None:
            model.pixel_mean, model.pixel_deviation = source.pixels
        if model.config.norm.match == "unit":
            _match(model, source)
        yield model


def _match(model: Model, source: Source) -> None:
    """Begin as training would, but with the inputs that are measured in the place of the first batch."""

    def run() -> None:
        with entering(blocks_of(model)[0], source.enter or (lambda h: h)):
            model(source.inputs(model))

    match_norms(model, run)


def _build(recipe: AnyRecipe, vocabulary: int) -> Model:
    if isinstance(recipe, ClassificationRecipe):
        return build_classifier(recipe.model)
    return CausalLM(as_language(recipe).model, vocabulary)
