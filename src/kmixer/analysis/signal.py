"""What `kmixer lab signal` measures: how gradients grow, of a recipe at initialisation or of a run's best weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmixer.analysis.lab_inputs import Asked, Model, OfTask, Source, Symmetric
from kmixer.analysis.lab_models import initialisations, trained_model, variants_of
from kmixer.measure.mean_field import TheoryBlock, agreement, fit_laws, predict
from kmixer.measure.signal import Stream, measure_stream, summarise, sums_over_positions
from kmixer.measure.signal_theory import advise, scores_too_large, theory_blocks, weak_branches
from kmixer.runs.lab import identity_of
from kmixer.runs.recipe import load_recipe
from kmixer.runs.run_folder import RunFolder

# What takes longer is said after the second initialisation, in seconds.
LONG = 60.0


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
    units = [recipe.by_key()["model.layers"] for recipe in recipes]
    curves: list[dict[str, Any]] = []

    def estimate(seconds: float) -> None:
        whole = seconds * asked.initialisations * sum(units) / units[0]
        if not curves and whole > LONG:
            told(f"this will take about {whole / 60:.1f} minutes")

    for variant, changed, layers in zip(variants, recipes, units, strict=True):
        curve = _measure_at_start(initialisations(changed, source, asked), source, asked, estimate)
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
    model, inputs, enter = trained_model(run, asked, corpus, data_dir)
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
