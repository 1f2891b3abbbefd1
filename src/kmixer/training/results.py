"""results.json: what a finished run gave, for the weights chosen by validation loss and for the last ones."""

from __future__ import annotations

import copy
from typing import Any

from kmixer.data.token_files import Dataset
from kmixer.files import write_json
from kmixer.models.causal_lm import CausalLM
from kmixer.models.flops import count_flops
from kmixer.models.model_folder import WEIGHTS, load_weights, put_weights
from kmixer.training.checkpoint import Progress
from kmixer.training.evaluation import evaluate, loss_by_position
from kmixer.training.recipe import Protocol, Recipe
from kmixer.training.run_folder import RESULTS, RunFolder

# Every model is measured at these windows too, where it and the text reach so far.
COMMON_WINDOWS = (256, 1024)


def write_results(run: RunFolder, model: CausalLM, dataset: Dataset, *, recipe: Recipe, progress: Progress) -> None:
    """Evaluate both sets of weights on every held-out part, and write them beside the size and cost of the run.

    The test part, where the recipe holds one out, is measured here and nowhere else.
    """
    config = recipe.training
    tokens = config.steps * config.batch_size * config.window
    tensors, about = load_weights(run.path)
    best = copy.deepcopy(model)
    put_weights(best, {name: tensor.to(model.embedding.weight.device) for name, tensor in tensors.items()}, WEIGHTS)
    write_json(
        run.path / RESULTS,
        {
            "recipe": recipe.name,
            "seed": config.seed,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": config.steps,
            "tokens": tokens,
            "flops": 3 * tokens * count_flops(model, config.window),
            "seconds": progress.seconds,
            "best": {"step": about["step"], **_losses(best, dataset, recipe)},
            "last": {"step": progress.step, **_losses(model, dataset, recipe)},
        },
    )


def _losses(model: CausalLM, dataset: Dataset, recipe: Recipe) -> dict[str, Any]:
    """Evaluations of every part: the recipe's protocols first, then the common windows, then as one stream."""
    parts = {"validation": dataset.validation, "test": dataset.test if recipe.evaluation.test else None}
    found: dict[str, Any] = {}
    for name, split in parts.items():
        if split is None:
            continue
        limit = min(model.config.max_positions or len(split.tokens), len(split.tokens) - 1)
        windows = [window for window in COMMON_WINDOWS if window <= limit]
        measures: dict[tuple[Protocol, int | None], None] = {}
        for protocol in recipe.evaluation.protocols:
            measures[protocol, recipe.evaluation_window if protocol == "windows" else None] = None
        measures |= {("windows", window): None for window in windows}
        if model.config.max_positions is None:
            measures["stream", None] = None
        found[name] = [evaluate(model, split, protocol, window or 0).to_json() for protocol, window in measures]
    found["loss_by_position"] = loss_by_position(model, dataset.validation, recipe.evaluation_window)
    return found
