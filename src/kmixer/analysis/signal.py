"""What `kmixer lab signal` measures: how gradients grow, of a recipe at initialisation or of a run's best weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kmixer.analysis.signal_inputs import (
    Asked,
    Model,
    OfTask,
    Source,
    Symmetric,
    examples,
    placeholder,
    symmetric,
    windows,
)
from kmixer.errors import InputError
from kmixer.language_model import load
from kmixer.measure.mean_field import TheoryBlock, agreement, fit_laws, predict
from kmixer.measure.signal import Stream, blocks_of, entering, measure_stream, summarise, sums_over_positions
from kmixer.measure.signal_theory import advise, scores_too_large, theory_blocks, weak_branches
from kmixer.measure.texts import held_out
from kmixer.models.causal_lm import CausalLM
from kmixer.models.classifiers import build_classifier
from kmixer.models.model_folder import find_model_folder, load_classifier, read_config
from kmixer.models.sequence_classifier import SequenceClassifierConfig
from kmixer.models.vision import VisionConfig, VisionTransformer
from kmixer.runs.lab import identity_of
from kmixer.runs.recipe import AnyRecipe, ClassificationRecipe, as_language, load_recipe
from kmixer.runs.run_folder import RunFolder
from kmixer.training.norm_matching import match_norms
from kmixer.training.tasks import open_classifier

# Norms that have an alpha.
BOUNDED = ("dyt", "derf")
# What takes longer is said after the second initialisation, in seconds.
LONG = 60.0


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
    source = Symmetric(recipe, asked) if asked.inputs is None else OfTask(recipe, asked, data_dir)
    units = [each.by_key()["model.layers"] for each in recipes]
    curves: list[dict[str, Any]] = []

    def estimate(seconds: float) -> None:
        whole = seconds * asked.initialisations * sum(units) / units[0]
        if not curves and whole > LONG:
            told(f"this will take about {whole / 60:.1f} minutes")

    for variant, changed, layers in zip(variants, recipes, units, strict=True):
        curve = _measure_at_start(_initialisations(changed, source, asked), source, asked, estimate)
        curves.append({"name": variant.name, "layers": layers, **curve})
    seeds = list(range(asked.seed, asked.seed + asked.initialisations))
    return {**_about(recipe.name, asked, curves), "trained": False, "seeds": seeds}


def signal_of_run(
    target: Path, asked: Asked, corpus: str | None = None, data_dir: Path | None = None
) -> dict[str, Any]:
    """The best weights of a run, or those of a model folder, which has no data: symmetric inputs alone.

    Raises InputError where there is no model, or no data to measure on.
    """
    run = RunFolder(target)
    model, inputs, enter = _trained(run, asked, corpus, data_dir)
    stream = measure_stream(model, inputs, probes=asked.probes, seed=asked.seed, read_out=asked.read_out, enter=enter)
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
    return {**_about(run.path.name, asked, [curve]), "trained": True, **known}


def _trained(
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
        raise InputError(f"{run.path} is a model without its run, so without data; add --inputs symmetric")
    if classifies:
        task, classifier = open_classifier(run.path, data_dir, corpus)
        return classifier, examples(task, asked), None
    model = load(run.path)
    assert model.tokenizer is not None
    _, split = held_out(run, model.tokenizer, corpus, data_dir)
    return model, windows(split.tokens, asked), None


def _about(name: str, asked: Asked, curves: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "positions": curves[0]["positions"],
        "inputs": "symmetric" if asked.inputs is None else asked.inputs,
        "probes": asked.probes,
        "read_out": asked.read_out,
        "seed": asked.seed,
        "curves": curves,
    }


def _measure_at_start(
    models: Iterator[Model], source: Source, asked: Asked, one_took: Callable[[float], None]
) -> dict[str, Any]:
    """One curve: all initialisations, and theory where it applies to them; `one_took` is told seconds."""
    streams: list[Stream] = []
    predicted: list[Tensor] = []  # log J(L, l) of every initialisation
    blocks_of_each: list[list[TheoryBlock]] = []
    reason, sums = None, False
    begun = time.monotonic()
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
        blocks = theory_blocks(model, stream.covariance.shape[-1])
        if index == 0:
            sums = sums_over_positions(model)
            reason = _why_measured_only(model, blocks, stream, asked)
        if reason is None and not isinstance(blocks, str):
            blocks_of_each.append(blocks)
            predicted.append(predict(blocks, stream.covariance).growth.mean(0).log())
        if index == min(1, asked.initialisations - 1):  # the first pays for what is loaded and made once
            one_took(time.monotonic() - begun)
        begun = time.monotonic()
    summary = summarise(streams)
    curve = {
        **summary,
        "positions": streams[0].covariance.shape[-1],
        "sums_over_positions": sums,
        "law": fit_laws(summary["log_growth"]),
        "log_theory": None,
        "measured_only": reason,
    }
    if reason is not None:
        return curve
    log_theory = torch.stack(predicted).mean(0).tolist()
    first, covariance = blocks_of_each[0], streams[0].covariance[0]
    return curve | {
        "log_theory": log_theory,
        "agreement": agreement(curve["log_growth"], log_theory),
        "strengths": _mean_strengths(blocks_of_each),
        "norms": [norm._asdict() for block in first for norm in (block.mixing_norm, block.feed_forward_norm)],
        "advised_alpha": advise(first, covariance),
        "warning": weak_branches(first, curve["q"]),
    }


def _why_measured_only(model: Model, blocks: list[TheoryBlock] | str, stream: Stream, asked: Asked) -> str | None:
    """None where theory applies."""
    if asked.read_out:
        return "a read-out is no residual block"
    return blocks if isinstance(blocks, str) else scores_too_large(model, stream.hidden)


def _mean_strengths(initialisations: list[list[TheoryBlock]]) -> list[dict[str, float]]:
    """What each block's matrices do to a variance, over the initialisations."""
    strengths = [
        [(one.mixing_strength, one.strength_in, one.strength_out) for one in blocks] for blocks in initialisations
    ]
    means = torch.tensor(strengths, dtype=torch.float64).mean(0).tolist()
    return [dict(zip(("mixing", "in", "out"), of_block, strict=True)) for of_block in means]


def _initialisations(recipe: AnyRecipe, source: Source, asked: Asked) -> Iterator[Model]:
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
