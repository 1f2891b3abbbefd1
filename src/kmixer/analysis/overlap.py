"""What `kmixer lab overlap` measures: how alike tokens become, of a recipe at initialisation or of runs' weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmixer.analysis.lab_inputs import Asked, Model, OfModel, OfTask
from kmixer.analysis.lab_models import Variant, initialisations, trained_model, variants_of
from kmixer.errors import InputError
from kmixer.measure.homogenized import logistic, overlap_in_theory, simplex, simulate
from kmixer.measure.mean_field import predict
from kmixer.measure.overlap import Overlap, mean_overlap, measure_overlap
from kmixer.measure.signal import INTERVAL, covariance_of, mean_and_error, mean_cosine, stream_of
from kmixer.measure.signal_theory import scores_too_large, theory_blocks
from kmixer.runs.lab import identity_of
from kmixer.runs.recipe import load_recipe
from kmixer.runs.run_folder import RunFolder

# The toy: tokens, width and runs; its laws with scores of these deviations.
TOY_TOKENS, TOY_WIDTH, TOY_RUNS, TOY_TIME = 16, 32, 16, 3.0
TOY_DEVIATIONS = (0.0, 2.0)


def overlap_of_recipe(
    name: str, settings: list[str], depths: list[int], mixers: list[str], asked: Asked, data_dir: Path | None = None
) -> dict[str, Any]:
    """Fresh weights of a recipe at every depth, with every mixer asked for.

    Raises InputError where the recipe or its data is not there, and for mixers of a recipe that takes none.
    """
    recipe = load_recipe(name, settings)
    if mixers and "model.mixers" not in recipe.by_key():
        raise InputError(f"--mixers: recipe {name} is no transformer, whose blocks take any mixer")
    variants = variants_of(recipe, depths, [], [])
    if mixers:
        variants = [
            Variant(f"{mixer}, {variant.name}", [*variant.settings, f"model.mixers={mixer}"])
            for mixer in mixers
            for variant in variants
        ]
    recipes = [load_recipe(name, [*settings, *variant.settings]) for variant in variants]  # wrong ones at once
    source = OfTask(recipe, asked, data_dir)
    curves = []
    for variant, changed in zip(variants, recipes, strict=True):
        models = initialisations(changed, source, asked)
        curves.append({"name": variant.name, **_measure_at_start(models, source.chosen)})
    return {**_about(recipe.name, curves, asked), "trained": False}


def overlap_of_runs(
    targets: Sequence[Path], asked: Asked, corpus: str | None = None, data_dir: Path | None = None
) -> dict[str, Any]:
    """The best weights of runs, each beside fresh ones of its recipe on the same inputs.

    Raises InputError where there is no model, or no data to measure on, and for sequences of different lengths.
    """
    runs = [RunFolder(target) for target in targets]
    names = [run.path.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(target) for target in targets]
    curves = [_measure_run(run, asked, corpus, data_dir) for run in runs]
    for name, curve in zip(names, curves, strict=True):
        curve["name"] = name if len(runs) > 1 else "trained"
        if curve["positions"] != curves[0]["positions"]:
            lengths = f"{curves[0]['positions']} positions, {name} of {curve['positions']}"
            raise InputError(f"{names[0]} is measured on sequences of {lengths}; measure them one by one")
    known = identity_of(runs[0]) if len(runs) == 1 else {}
    return {**_about(", ".join(names), curves, asked), "trained": True, **known}


def _measure_run(run: RunFolder, asked: Asked, corpus: str | None, data_dir: Path | None) -> dict[str, Any]:
    """One curve: the trained weights, and under "fresh" what a recipe's curve has."""
    model, inputs, _ = trained_model(run, asked, corpus, data_dir)
    measured = measure_overlap(stream_of(model, inputs))
    fresh = initialisations(run.read_recipe(), OfModel(model, inputs), asked)
    return {
        **_summary(measured, measured.by_sequence),
        "theory": None,
        "measured_only": "these weights have been trained",
        "fresh": {"name": "at initialisation", **_measure_at_start(fresh, inputs)},
    }


def _about(name: str, curves: list[dict[str, Any]], asked: Asked) -> dict[str, Any]:
    positions = curves[0]["positions"]
    return {"name": name, "positions": positions, "windows": asked.inputs, "seed": asked.seed, "curves": curves}


def _measure_at_start(models: Iterator[Model], inputs: Tensor) -> dict[str, Any]:
    """One curve: the mean over initialisations, and theory where it applies to them."""
    measured: list[Overlap] = []
    predicted: list[Tensor] = []
    reason: str | None = None
    for index, model in enumerate(models):
        hidden = stream_of(model, inputs)
        measured.append(measure_overlap(hidden))
        blocks = theory_blocks(model, hidden[0].shape[1])
        if index == 0:
            reason = blocks if isinstance(blocks, str) else scores_too_large(model, hidden)
        if reason is None and not isinstance(blocks, str):
            covariances = predict(blocks, covariance_of(hidden[0])).covariances
            predicted.append(mean_cosine(covariances).mean(0))
    draws = torch.stack([one.overlap for one in measured])
    theory = torch.stack(predicted).mean(0).tolist() if predicted else None
    return {**_summary(mean_overlap(measured), draws), "theory": theory, "measured_only": reason}


def _summary(measured: Overlap, draws: Tensor) -> dict[str, Any]:
    """As plain numbers; errors and the band over draws (k, L + 1), of initialisations or of windows."""
    count, (_, error) = len(draws), mean_and_error(draws)
    return {
        "overlap": measured.overlap.tolist(),
        "overlap_error": error,
        "with_diagonal": measured.with_diagonal.tolist(),
        "across": measured.across.tolist(),
        "at_position": measured.at_position.tolist(),
        "spread": measured.spread.tolist(),
        "groups": {name: values.tolist() for name, values in measured.groups.items()},
        "draws": count,
        "band": INTERVAL * error[-1] if count > 1 else None,
        "positions": measured.positions,
    }


def overlap_of_toy(seed: int) -> dict[str, Any]:
    """The homogenized model of attention at random, beside its laws; curves over time in the place of layers."""
    generator = torch.Generator().manual_seed(seed)
    curves: list[dict[str, Any]] = []
    for deviation in TOY_DEVIATIONS:
        start = simplex(TOY_RUNS, TOY_TOKENS, TOY_WIDTH, 0.0, generator)
        times, with_diagonal = simulate(start, TOY_TIME, deviation=deviation, seed=seed + 1)
        kept = torch.linspace(0, len(times) - 1, 21, dtype=torch.float64).round().long()
        times, with_diagonal = times[kept], with_diagonal[kept]
        overlaps = (with_diagonal * TOY_TOKENS - 1) / (TOY_TOKENS - 1)
        mean, error = mean_and_error(overlaps.T)
        theory = overlap_in_theory(times, 0.0, TOY_TOKENS, TOY_WIDTH, deviation, seed)
        curves.append(
            {
                "name": f"scores of deviation {deviation:g}, time 0 to {TOY_TIME:g}",
                "overlap": mean,
                "overlap_error": error,
                "across": [0.0] * len(kept),
                "groups": {},
                "theory": theory.tolist(),
                "times": times.tolist(),
                "band": None,
                "measured_only": None,
            }
        )
        if not deviation:
            wide = (logistic(times, 1 / TOY_TOKENS) * TOY_TOKENS - 1) / (TOY_TOKENS - 1)
            curves[-1]["wide_theory"] = wide.tolist()
    about = {"name": f"homogenized attention, width {TOY_WIDTH}", "positions": TOY_TOKENS, "seed": seed}
    return {**about, "curves": curves, "trained": False, "toy": True}
