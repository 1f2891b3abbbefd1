"""What `kmixer lab signal` measures: how gradients grow, of a recipe at initialisation or of a run's best weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kmixer.data.images import channel_statistics
from kmixer.errors import InputError
from kmixer.language_model import load
from kmixer.measure.mean_field import TheoryBlock, agreement, fit_laws, predict
from kmixer.measure.signal import Stream, measure_stream, summarise, sums_over_positions, symmetric_inputs
from kmixer.measure.signal_theory import advise, scores_too_large, theory_blocks, weak_branches
from kmixer.measure.texts import held_out
from kmixer.models.causal_lm import CausalLM
from kmixer.models.classifiers import Classifier, build_classifier
from kmixer.models.model_folder import find_model_folder, load_classifier, read_config
from kmixer.models.sequence_classifier import SequenceClassifier, SequenceClassifierConfig, lengths_of
from kmixer.models.vision import VisionConfig, VisionTransformer
from kmixer.runs.lab import identity_of
from kmixer.runs.recipe import AnyRecipe, ClassificationRecipe, as_language, load_recipe
from kmixer.runs.run_folder import RunFolder
from kmixer.training.classification import ClassificationTask
from kmixer.training.language import LanguageTask
from kmixer.training.tasks import open_classifier, open_task

# Positions of a window where nothing else is asked for.
WINDOW = 64
# Symmetric inputs: how many, mean square, and product of different tokens.
SYMMETRIC_INPUTS, SYMMETRIC_Q, SYMMETRIC_P = 4, 1.0, 0.2
# Norms that have an alpha.
BOUNDED = ("dyt", "derf")
# What takes longer is said beforehand, in seconds.
LONG = 60.0

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
            of_norms.append((f"{norm}, ", [kind]))
    layers = depths or [recipe.by_key()["model.layers"]]
    return [
        Variant(f"{name}{depth} layers", [*settings, f"model.layers={depth}"])
        for name, settings in of_norms or [("", [])]
        for depth in layers
    ]


def signal_of_recipe(
    name: str,
    settings: list[str],
    depths: list[int],
    norms: list[str],
    alphas: list[float],
    asked: Asked,
    data_dir: Path | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Fresh weights of a recipe at every depth and with every norm asked for, beside theory where there is one.

    `told` is given one line where it will take long. Raises InputError where the recipe, or the data, is not there.
    """
    recipe = load_recipe(name, settings)
    variants = variants_of(recipe, depths, norms, alphas)
    recipes = [load_recipe(name, [*settings, *variant.settings]) for variant in variants]  # wrong ones at once
    source = _Symmetric(recipe, asked) if asked.inputs is None else _OfTask(recipe, asked, data_dir)
    units = [each.by_key()["model.layers"] for each in recipes]
    begun, curves = time.monotonic(), []
    for index, (variant, changed) in enumerate(zip(variants, recipes, strict=True)):
        models = _initialisations(changed, source, asked)
        curve = _measure_at_start(models, source, asked)
        curves.append({"name": variant.name, "layers": units[index], **curve})
        spent, left = time.monotonic() - begun, sum(units[index + 1 :])
        seconds = spent * left / sum(units[: index + 1])
        if index == 0 and spent + seconds > LONG:
            told(f"about {(spent + seconds) / 60:.1f} minutes in all, {seconds / 60:.1f} to go")
    return {**_about(recipe.name, asked, curves), "trained": False}


def signal_of_run(
    target: Path, asked: Asked, corpus: str | None = None, data_dir: Path | None = None
) -> dict[str, Any]:
    """The best weights of a run, or those of a model folder, which has no data: symmetric inputs alone.

    Raises InputError where there is no model, or no data to measure on.
    """
    run = RunFolder(target)
    model, inputs, enter = _trained(run, asked, corpus, data_dir)
    stream = measure_stream(
        model, inputs, probes=asked.probes, seed=asked.seed, read_out=asked.read_out, enter=enter
    )
    curve = {
        "name": "trained",
        **summarise([stream]),
        "positions": stream.covariance.shape[-1],
        "sums_over_positions": sums_over_positions(model),
        "log_theory": None,
        "measured_only": "these weights have been trained",
    }
    curve["law"] = fit_laws(curve["log_growth"])
    known = identity_of(run) if run.exists() else {}
    return {**_about(str(target), asked, [curve]), "trained": True, "initialisations": None, **known}


def _trained(
    run: RunFolder, asked: Asked, corpus: str | None, data_dir: Path | None
) -> tuple[Model, Tensor, Callable[[Tensor], Tensor] | None]:
    """The model, its inputs, and what is put in the place of h^0 if anything."""
    folder = find_model_folder(run.path)
    config = read_config(folder).model
    classifies = isinstance(config, VisionConfig | SequenceClassifierConfig)
    if asked.inputs is None:
        model: Model = load_classifier(folder)[0] if classifies else load(run.path)
        return model, _placeholder(model, asked), _symmetric(asked)
    if not run.exists():
        raise InputError(f"{run.path} is a model without its run, so without data; add --inputs symmetric")
    if classifies:
        task, classifier = open_classifier(run.path, data_dir, corpus)
        return classifier, _examples(task, asked), None
    model = load(run.path)
    assert model.tokenizer is not None
    _, split = held_out(run, model.tokenizer, corpus, data_dir)
    return model, _windows(split.tokens, asked), None


def _about(name: str, asked: Asked, curves: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "positions": curves[0]["positions"],
        "inputs": "symmetric" if asked.inputs is None else asked.inputs,
        "initialisations": asked.initialisations,
        "probes": asked.probes,
        "read_out": asked.read_out,
        "seed": asked.seed,
        "curves": curves,
    }


def _measure_at_start(models: Iterator[Model], source: _Source, asked: Asked) -> dict[str, Any]:
    """One curve: all initialisations, and theory where it applies to them."""
    streams: list[Stream] = []
    of_theory, strengths = [], []
    reason, blocks, sums = "", [], False
    for index, model in enumerate(models):
        stream = measure_stream(
            model,
            source.inputs(model),
            probes=asked.probes,
            seed=asked.seed + index,
            read_out=asked.read_out,
            enter=source.enter,
        )
        streams.append(stream._replace(hidden=[]))
        if index == 0:
            reason, sums = _why_measured_only(model, stream, asked), sums_over_positions(model)
        if not reason:
            blocks = theory_blocks(model, stream.covariance.shape[-1])
            assert not isinstance(blocks, str)
            of_theory.append(predict(blocks, stream.covariance).growth.mean(0).log())
            strengths.append([[block.mixing_strength, block.strength_in, block.strength_out] for block in blocks])
    summary = summarise(streams)
    curve = {
        **summary,
        "positions": streams[0].covariance.shape[-1],
        "sums_over_positions": sums,
        "law": fit_laws(summary["log_growth"]),
        "log_theory": None,
        "measured_only": reason or None,
    }
    return curve if reason else curve | _beside_theory(curve, blocks, of_theory, strengths, streams[-1])


def _why_measured_only(model: Model, stream: Stream, asked: Asked) -> str:
    """Empty where theory applies."""
    if asked.read_out:
        return "a read-out is no residual block"
    blocks = theory_blocks(model, stream.covariance.shape[-1])
    return blocks if isinstance(blocks, str) else scores_too_large(model, stream.hidden) or ""


def _beside_theory(
    curve: dict[str, Any],
    blocks: list[TheoryBlock],
    of_theory: list[Tensor],
    strengths: list[list[list[float]]],
    stream: Stream,
) -> dict[str, Any]:
    log_theory = torch.stack(of_theory).mean(0).tolist()
    norms = [norm._asdict() for block in blocks for norm in (block.mixing_norm, block.feed_forward_norm)]
    means = torch.tensor(strengths, dtype=torch.float64).mean(0).tolist()
    return {
        "log_theory": log_theory,
        "agreement": agreement(curve["log_growth"], log_theory),
        "strengths": [dict(zip(("mixing", "in", "out"), of_block, strict=True)) for of_block in means],
        "norms": norms,
        "advised_alpha": advise(blocks, stream.covariance[0]),
        "warning": weak_branches(blocks, curve["q"]),
    }


def _initialisations(recipe: AnyRecipe, source: _Source, asked: Asked) -> Iterator[Model]:
    """Fresh models, from seeds that follow each other. The generator of the process is left as it was."""
    for index in range(asked.initialisations):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(asked.seed + index)
            model = _build(recipe, source.vocabulary)
        if isinstance(model, VisionTransformer) and source.pixels is not None:
            model.pixel_mean, model.pixel_deviation = source.pixels
        yield model


def _build(recipe: AnyRecipe, vocabulary: int) -> Model:
    if isinstance(recipe, ClassificationRecipe):
        return build_classifier(recipe.model)
    return CausalLM(as_language(recipe).model, vocabulary)


class _Symmetric:
    """Inputs of a recipe that needs no data: what the model reads does not count, because h^0 is replaced."""

    pixels = None

    def __init__(self, recipe: AnyRecipe, asked: Asked) -> None:
        classifies = isinstance(recipe, ClassificationRecipe)
        self.vocabulary = 0 if classifies else as_language(recipe).tokenizer.vocabulary_size
        self.asked, self.enter = asked, _symmetric(asked)

    def inputs(self, model: Model) -> Tensor:
        return _placeholder(model, self.asked)


class _OfTask:
    """Inputs from the validation part of a recipe's data."""

    enter = None

    def __init__(self, recipe: AnyRecipe, asked: Asked, data_dir: Path | None) -> None:
        try:
            task = open_task(recipe, data_dir=data_dir)
        except InputError as error:
            raise InputError(f"{error}; --inputs symmetric needs no data") from None
        self.pixels: tuple[Tensor, Tensor] | None = None
        self.vocabulary = 0
        if isinstance(task, LanguageTask):
            self.vocabulary = task.recipe.tokenizer.vocabulary_size
            self.chosen = _windows(task.dataset.validation.tokens, asked)
        else:
            assert isinstance(task, ClassificationTask)
            self.chosen = _examples(task, asked)
            if isinstance(task.recipe.model, VisionConfig):
                self.pixels = channel_statistics(task.dataset.train.inputs)

    def inputs(self, model: Model) -> Tensor:
        return self.chosen


_Source = _Symmetric | _OfTask


def _symmetric(asked: Asked) -> Callable[[Tensor], Tensor]:
    return symmetric_inputs(SYMMETRIC_Q, SYMMETRIC_P, asked.seed)


def _placeholder(model: Model, asked: Asked) -> Tensor:
    """What a model takes, of the size asked for."""
    if isinstance(model, VisionTransformer):
        _check_no_window(asked)
        config = model.config
        return torch.zeros(SYMMETRIC_INPUTS, config.channels, config.image_size, config.image_size)
    sequences = isinstance(model, SequenceClassifier)
    window = asked.window or min(WINDOW, model.config.length if isinstance(model, SequenceClassifier) else WINDOW)
    tokens = torch.ones(SYMMETRIC_INPUTS, window, dtype=torch.int64)
    return tokens if sequences else tokens - 1


def _windows(tokens: Tensor, asked: Asked) -> Tensor:
    """Windows (b, n), spread evenly over a text."""
    assert asked.inputs is not None
    window = asked.window or min(WINDOW, len(tokens))
    if window > len(tokens):
        raise InputError(f"--window: got {window}; the validation part has {len(tokens)} tokens")
    starts = torch.linspace(0, len(tokens) - window, asked.inputs, dtype=torch.float64).long()
    return torch.stack([tokens[start : start + window] for start in starts.tolist()]).long()


def _examples(task: ClassificationTask, asked: Asked) -> Tensor:
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
        raise InputError(f"--inputs: got {asked.inputs}; the validation part has {len(inputs)} that are long enough")
    return inputs[: asked.inputs]


def _check_no_window(asked: Asked) -> None:
    if asked.window is not None:
        raise InputError("--window: an image has the positions of its patches; leave it out")
