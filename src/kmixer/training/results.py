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
from kmixer.training.evaluation import evaluate
from kmixer.training.recipe import Recipe
from kmixer.training.run_folder import RESULTS, RunFolder


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
    parts = {"validation": dataset.validation, "test": dataset.test}
    return {
        name: [
            evaluate(model, split, protocol, recipe.evaluation_window).to_json()
            for protocol in recipe.evaluation.protocols
        ]
        for name, split in parts.items()
        if split is not None
    }
